from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.config import ModelConfig
from workers.model import linear as linear_module
from workers.model.errors import ModelError
from workers.model.factory import build_model
from workers.model.flops import MEASURE_SECONDS, flops_per_token, measured_matmul_flops
from workers.model.llama import Llama, rotary_tables, rotate
from workers.model.shape import parameter_shapes, resolve_shape

SMALL = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, tie_embeddings=False)


def small(seed: int = 1) -> Llama:
    return Llama(resolve_shape(SMALL, vocab_size=50, seq_len=16), seed=seed)


def test_names_and_shapes_are_those_announced() -> None:
    for tied in (False, True):
        config = SMALL.model_copy(update={"tie_embeddings": tied})
        shape = resolve_shape(config, vocab_size=50, seq_len=16)
        model = Llama(shape, seed=0)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(shape)
        assert list(dict(model.named_parameters())) == list(parameter_shapes(shape))
        assert list(model.state_dict()) == list(parameter_shapes(shape))
        assert sum(p.numel() for p in model.parameters()) == shape.num_params


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(seed=7)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(2)
    second, other = small(seed=7), small(seed=8)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    bundle = build_model(ModelConfig(), vocab_size=257, seq_len=32, seed=0)
    tokens = torch.randint(0, 257, (4, 33), generator=torch.Generator().manual_seed(0))
    assert bundle.loss_fn(bundle.model, tokens).item() == pytest.approx(torch.tensor(257.0).log().item(), abs=0.1)


def test_no_position_sees_a_later_token() -> None:
    model = small()
    tokens = torch.arange(16)[None] % 50
    changed = tokens.clone()
    changed[0, 10] = 49
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10], b[:, 10])


def test_rotation_keeps_lengths_and_makes_scores_relative() -> None:
    cos, sin = rotary_tables(32, 8, 10_000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 32, 1, 8) for _ in range(2))
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    for offset in (0, 3, -5):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_a_window_that_is_too_long_is_an_error() -> None:
    with pytest.raises(AssertionError, match="17 positions"):
        small()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "model.heads = 5 does not divide model.dim = 32"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads = 3 does not divide model.heads = 4"),
        ({"heads": 32, "kv_heads": None}, "odd"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_shape(SMALL.model_copy(update=change), vocab_size=50, seq_len=16)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN")
def test_both_matrix_libraries_give_the_same_function_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 24, generator=generator, requires_grad=True)
    weight = torch.randn(17, 24, generator=generator, requires_grad=True)
    grad = torch.randn(3, 20, 17, generator=generator)
    ours, theirs = linear_module.OneDnnLinear.apply(x, weight), F.linear(x, weight)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(a, b)
    (alone,) = torch.autograd.grad(linear_module.OneDnnLinear.apply(x.detach(), weight), (weight,), grad)
    torch.testing.assert_close(alone, torch.autograd.grad(theirs_again(x, weight), (weight,), grad)[0])


def theirs_again(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.detach(), weight)


@pytest.mark.parametrize("onednn", [False, True])
def test_the_model_is_the_same_with_either_library(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch is built without oneDNN")
    model, tokens = small(), torch.arange(32).view(2, 16)
    expected = model(tokens)
    monkeypatch.setattr(linear_module, "prefers_onednn", lambda: onednn)
    torch.testing.assert_close(model(tokens), expected)


def test_flops_count_every_multiplied_matrix() -> None:
    shape = resolve_shape(SMALL, vocab_size=50, seq_len=16)
    matrices = sum(
        rows * columns[0]
        for name, (rows, *columns) in parameter_shapes(shape).items()
        if columns and name != "model.embed_tokens.weight"
    )
    assert flops_per_token(shape) == 6 * matrices + 12 * 2 * 32 * 16
    tied = resolve_shape(SMALL.model_copy(update={"tie_embeddings": True}), vocab_size=50, seq_len=16)
    assert flops_per_token(tied) == flops_per_token(shape), "a tied matrix is multiplied all the same"


def test_peak_is_measured_once() -> None:
    device = torch.device("cpu")
    first = measured_matmul_flops(device)
    assert first > 1e8
    assert measured_matmul_flops(device) == first
    assert MEASURE_SECONDS < 0.2
