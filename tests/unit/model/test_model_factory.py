from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from workers.config import ModelConfig
from workers.model.errors import ModelError
from workers.model.factory import build_model, load_factory

MODULE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50)
    def forward(self, tokens):
        return self.head(self.embed(tokens))

def build(options): return Tiny(options["width"])
def with_loss(options): return Tiny(4), lambda model, tokens: model(tokens).float().pow(2).mean()
def no_module(options): return {"a": 1}
def three(options): return Tiny(4), 1, 2
def frozen(options): return Tiny(4).requires_grad_(False)
def wrong_output(options):
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten())
    return model
def no_arguments(): return Tiny(4)
number = 3
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "atoll_test_user_model.py").write_text(MODULE)
    (tmp_path / "atoll_test_broken_model.py").write_text("import a_library_nobody_has\n")
    (tmp_path / "atoll_test_stale_model.py").write_text("from torch import a_name_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def built(function: str, **options: object) -> nn.Module:
    config = ModelConfig(factory=f"atoll_test_user_model:{function}", options=options)
    return build_model(config, vocab_size=50, seq_len=8, seed=3).model


def test_a_factory_gets_its_options_and_the_seed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = built("build", width=6), built("build", width=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.embed.weight, b.embed.weight) and a.embed.weight.shape == (50, 6)  # type: ignore[union-attr]


def test_loss_of_the_factory_and_the_default_one() -> None:
    tokens = torch.arange(18).view(2, 9)
    plain = build_model(
        ModelConfig(factory="atoll_test_user_model:build", options={"width": 4}), vocab_size=50, seq_len=8, seed=0
    )
    assert plain.loss_fn(plain.model, tokens).item() == pytest.approx(3.9, abs=1.0)
    assert plain.flops_per_token is None and plain.num_params == 50 * 4 + 4 * 50 + 50
    own = build_model(ModelConfig(factory="atoll_test_user_model:with_loss"), vocab_size=50, seq_len=8, seed=0)
    assert own.loss_fn(own.model, tokens).ndim == 0


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_package.part:build", "looked for the module 'no_such_package'.*PYTHONPATH"),
        ("workers.no_such_part:build", "looked for the module 'workers.no_such_part'"),
        ("atoll_test_broken_model:build", "imports 'a_library_nobody_has', which is not installed"),
        ("atoll_test_stale_model:build", "a_name_nobody_has"),
        ("atoll_test_user_model:biuld", "looked for the function 'biuld'.*nothing of that name; did you mean 'build'"),
        ("atoll_test_user_model:number", "something that cannot be called"),
        ("atoll_test_user_model:no_arguments", r"called with one argument.*signature is \(\)"),
        ("atoll_test_user_model:no_module", "returned dict; expected a torch.nn.Module"),
        ("atoll_test_user_model:three", r"returned \(Tiny, int, int\); expected"),
        ("atoll_test_user_model:frozen", "without trainable parameters"),
    ],
)
def test_errors_say_what_was_looked_for_and_what_came_back(factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_model(ModelConfig(factory=factory), vocab_size=50, seq_len=8, seed=0)
    assert re.search(re.escape(f"model.factory = {factory!r}"), str(caught.value))


def test_an_error_of_the_factory_itself_comes_through() -> None:
    with pytest.raises(KeyError, match="width"):
        built("build")


def test_the_built_in_loss_names_a_wrong_output() -> None:
    bundle = build_model(ModelConfig(factory="atoll_test_user_model:wrong_output"), vocab_size=50, seq_len=8, seed=0)
    with pytest.raises(ModelError, match=r"shape \(2, 32\).*\(B, T, vocabulary\)"):
        bundle.loss_fn(bundle.model, torch.zeros(2, 9, dtype=torch.int64))


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ModelError, match="load the weights inside the factory"):
        build_model(ModelConfig(factory="atoll_test_user_model:build", init_from="x"), vocab_size=50, seq_len=8, seed=0)
    with pytest.raises(ModelError, match=r"model\.options"):
        build_model(ModelConfig(options={"a": 1}), vocab_size=50, seq_len=8, seed=0)


def test_load_factory_returns_the_function() -> None:
    assert load_factory("atoll_test_user_model:build").__name__ == "build"
    for spec in ("atoll_test_user_model", "atoll_test_user_model:", ":build"):
        with pytest.raises(ModelError, match=r"expected 'package\.module:function'"):
            load_factory(spec)
