from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.config import ModelConfig
from workers.data.tokenizers import ByteTokenizer
from workers.model.errors import ModelError
from workers.model.factory import build_model
from workers.model.hf import export_hf, load_hf_tensors, token_text
from workers.model.llama import Llama

CONFIG = ModelConfig(layers=2, dim=32, heads=4, hidden=64, tie_embeddings=False)


def model(seed: int = 0, vocab_size: int = 256, **settings: object) -> Llama:
    built = build_model(CONFIG.model_copy(update=settings), vocab_size=vocab_size, seq_len=16, seed=seed).model
    assert isinstance(built, Llama)
    return built


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_hf(tmp_path, CONFIG, dict(model(seed=1).named_parameters()), ByteTokenizer(), seq_len=16)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> None:
    """Cut the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_equal(a: Llama, b: Llama) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_round_trip_whole_and_sharded(folder: Path) -> None:
    for prepare in (lambda _: None, shard):
        prepare(folder)
        assert_equal(model(seed=2, init_from=str(folder)), model(seed=1))


def test_a_member_that_fetches_the_anchor_needs_no_checkpoint() -> None:
    config = CONFIG.model_copy(update={"init_from": "/nowhere"})
    build_model(config, vocab_size=256, seq_len=16, seed=0, load_init=False)
    with pytest.raises(ModelError, match=r"looked for config.json"):
        build_model(config, vocab_size=256, seq_len=16, seed=0)


def test_views_of_one_flat_anchor_are_exported(tmp_path: Path) -> None:
    source = model(seed=1)
    flat = torch.cat([p.detach().flatten() for p in source.parameters()])
    views, start = {}, 0
    for name, parameter in source.named_parameters():
        views[name] = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    export_hf(tmp_path, CONFIG, views, ByteTokenizer(), seq_len=16)
    assert_equal(model(seed=2, init_from=str(tmp_path)), source)


def test_other_float_types_are_converted(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    loaded, source = model(seed=2, init_from=str(folder)), model(seed=1)
    for p, q in zip(loaded.parameters(), source.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.bfloat16().float())


def test_a_tied_checkpoint_starts_an_untied_model_with_equal_matrices(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing"):
        model(init_from=str(folder))
    configure(folder, tie_word_embeddings=True)
    loaded = model(init_from=str(folder))
    assert loaded.lm_head is not None and torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_tied_model_refuses_a_head_that_differs_and_takes_one_that_does_not(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"set model.tie_embeddings = false"):
        model(init_from=str(folder), tie_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    model(init_from=str(folder), tie_embeddings=True)


MISSHAPEN = r"'model.layers.1.mlp.up_proj.weight' has shape \(63, 32\), the model needs \(64, 32\)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is missing from"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(63, 32)}), MISSHAPEN),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(300, 32)}), "300 tokens.*one of 256.*tokenizer"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias', which"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit(folder, change)
    target = model(seed=2)
    with pytest.raises(ModelError, match=message):
        load_hf_tensors(folder, target)
    assert_equal(target, model(seed=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 8}, r"heads \(8 against 4\)"),
        (
            {"num_hidden_layers": 5, "hidden_size": 64},
            r"layers \(5 against 2\), dim \(64 against 32\).*set in \[model\]",
        ),
        ({"rms_norm_eps": 1e-6}, r"norm_eps \(1e-06 against 1e-05\)"),
        ({"rope_parameters": None, "rope_theta": 500000.0}, r"rope_theta \(500000.0 against 10000.0\)"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, "rope_type = 'llama3'"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 16}, "head_dim = 16"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder: Path, values: dict[str, Any], message: str) -> None:
    configure(folder, **values)
    with pytest.raises(ModelError, match=message):
        model(init_from=str(folder))


def test_broken_folders(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors cannot be read as safetensors"):
        model(init_from=str(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors"):
        model(init_from=str(folder))
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(listed["weight_map"], first)}))
    with pytest.raises(ModelError, match=r"says that model-00001-of-00002.safetensors holds"):
        model(init_from=str(folder))
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"no 'weight_map'"):
        model(init_from=str(folder))
    index.unlink()
    with pytest.raises(ModelError, match=r"found neither"):
        model(init_from=str(folder))
    (folder / "config.json").write_text("[")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        model(init_from=str(folder))


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    tensors = dict(model().named_parameters())
    with pytest.raises(ModelError, match=r"model\.factory = 'a:b'"):
        export_hf(tmp_path, ModelConfig(factory="a:b"), tensors, ByteTokenizer(), seq_len=16)
    for change, message in (
        ({"model.norm.weight": None}, "'model.norm.weight' is missing"),
        ({"model.embed_tokens.weight": None}, "'model.embed_tokens.weight' is missing"),
        ({"extra": torch.zeros(1)}, "'extra' is not one of the model"),
        ({"model.norm.weight": torch.zeros(3)}, r"'model.norm.weight' has shape \(3,\)"),
    ):
        given = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}  # type: ignore[operator]
        with pytest.raises(ModelError, match=message):
            export_hf(tmp_path, CONFIG, given, ByteTokenizer(), seq_len=16)
    assert not list(tmp_path.iterdir())


def test_token_text_looks_in_added_tokens_dict_and_list_vocabularies() -> None:
    added = {"added_tokens": [{"id": 3, "content": "<end>"}], "model": {"vocab": {"a": 0}}}
    assert token_text(json.dumps(added), 3) == "<end>"
    assert token_text(json.dumps(added), 0) == "a"
    assert token_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}), 1) == "b"
    with pytest.raises(ModelError, match="no token 9"):
        token_text(json.dumps(added), 9)
