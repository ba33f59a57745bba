from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workers.config import ModelConfig, TrainConfig
from workers.device import check_precision, peak_memory_bytes, resolve_device
from workers.inner_loop import InnerLoop, StepStats, autocast, evaluate
from workers.model.errors import ModelError
from workers.model.factory import ModelBundle, build_model
from workers.optim import build_optimizer, export_state, import_state
from workers.schedule import lr_at

CPU = torch.device("cpu")
SMALL = ModelConfig(layers=2, dim=32, heads=2)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")


def bundle(device: torch.device = CPU, seed: int = 0) -> ModelBundle:
    built = build_model(SMALL, vocab_size=50, seq_len=16, seed=seed)
    built.model.to(device)
    return built


def loop_of(part: ModelBundle, device: torch.device = CPU, **settings: object) -> InnerLoop:
    train = TrainConfig(**settings)  # type: ignore[arg-type]
    return InnerLoop(part, build_optimizer(part.model, train), train, device)


def data(number: int, samples: int = 8, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 50, (samples, 17)) for _ in range(number)]


def gradients(part: ModelBundle) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in part.model.named_parameters() if p.grad is not None}


# A step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_runs_have_equal_bits(optimizer: str) -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        part = bundle()
        loop = loop_of(part, optimizer=optimizer)
        losses = [loop.step(batch, progress=i / 6).loss for i, batch in enumerate(data(6))]
        runs.append((losses, [p.detach().clone() for p in part.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))


def test_a_step_equals_a_bare_torch_loop() -> None:
    train = TrainConfig(lr=0.01, grad_clip=0.5, warmup=0.2)
    ours, bare = bundle(), bundle()
    loop = InnerLoop(ours, build_optimizer(ours.model, train), train, CPU)
    matrices = [p for p in bare.model.parameters() if p.ndim >= 2]
    others = [p for p in bare.model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}], weight_decay=0.1, betas=(0.9, 0.95), fused=True
    )
    for i, batch in enumerate(data(5)):
        stats = loop.step(batch, progress=i / 5)
        tokens = torch.from_numpy(batch)
        loss = nn.functional.cross_entropy(bare.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(bare.model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(i / 5, lr=0.01, warmup=0.2, min_ratio=0.1, shape="cosine")
        optimizer.step()
        optimizer.zero_grad()
        assert (stats.loss, stats.grad_norm, stats.lr) == (loss.item(), norm.item(), optimizer.param_groups[0]["lr"])
        assert stats.num_tokens == 8 * 16 and 0 < stats.seconds < 10 and stats.finite
    for p, q in zip(ours.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_loss_falls() -> None:
    part = bundle()
    loop = loop_of(part, lr=0.01, warmup=0.0)
    batch = data(1)[0]
    losses = [loop.step(batch, progress=0.1).loss for _ in range(30)]
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_accumulation_equals_the_whole_batch(accumulation: int) -> None:
    whole, pieces = bundle(), bundle()
    loss = loop_of(whole).forward_backward(data(1)[0])
    piece_loss = loop_of(pieces, accumulation=accumulation).forward_backward(data(1)[0])
    torch.testing.assert_close(piece_loss, loss)
    expected = gradients(whole)
    for name, gradient in gradients(pieces).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_micro_batches_have_the_size_of_the_setting_also_in_a_short_batch() -> None:
    part = bundle()
    sizes: list[int] = []

    def noting(model: nn.Module, tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return part.loss_fn(model, tokens)

    loop = loop_of(ModelBundle(model=part.model, loss_fn=noting), batch_size=8, accumulation=3)
    for samples in (8, 5, 1):
        loop.forward_backward(data(1, samples)[0])
    assert sizes == [3, 3, 2, 3, 2, 1]


def test_gradients_are_those_of_the_last_batch_alone() -> None:
    part, fresh = bundle(), bundle()
    loop = loop_of(part)
    loop.forward_backward(data(2)[0])
    loop.forward_backward(data(2)[1])
    loop_of(fresh).forward_backward(data(2)[1])
    expected = gradients(fresh)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(part).items())
    loop.apply(0.5)
    assert not gradients(part), "gradients stay in memory between steps"


def test_halves_of_a_step_equal_the_step() -> None:
    whole, halves = bundle(), bundle()
    a, b = loop_of(whole), loop_of(halves)
    for i, batch in enumerate(data(3)):
        stats = a.step(batch, progress=i / 3)
        loss = b.forward_backward(batch)
        norm = b.apply(i / 3)
        assert (stats.loss, stats.grad_norm) == (loss.item(), norm.item())
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), halves.model.parameters(), strict=True))


def test_clipping_bounds_the_update_and_zero_switches_it_off() -> None:
    model = nn.Linear(4, 1, bias=False)
    part = ModelBundle(model=model, loss_fn=lambda m, tokens: m(tokens.float()).mean() * 100)
    tokens = np.arange(8).reshape(2, 4)
    moved = {}
    for clip in (0.0, 0.5):
        nn.init.zeros_(model.weight)
        train = TrainConfig(grad_clip=clip)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        stats = InnerLoop(part, sgd, train, CPU).step(tokens, progress=0.0)
        moved[clip] = model.weight.detach().norm().item()
        assert stats.grad_norm == pytest.approx(model_gradient_norm(tokens)), "the norm is that before clipping"
        assert stats.lr == 1.0, "a foreign optimizer keeps its learning rate"
    assert moved[0.5] == pytest.approx(0.5, rel=1e-4)
    assert moved[0.0] == pytest.approx(model_gradient_norm(tokens))


def model_gradient_norm(tokens: np.ndarray) -> float:
    return float(np.linalg.norm(100 * tokens.mean(axis=0)))


def test_batches_of_any_integer_type_and_read_only_ones() -> None:
    reference = loop_of(bundle()).forward_backward(data(1)[0])
    frozen = data(1)[0].copy()
    frozen.flags.writeable = False
    for batch in (data(1)[0].astype(np.int32), data(1)[0].astype(np.uint8), frozen, torch.from_numpy(data(1)[0])):
        assert torch.equal(loop_of(bundle()).forward_backward(batch), reference)


def test_a_spoiled_step_says_so() -> None:
    stats = StepStats(loss=math.nan, grad_norm=1.0, lr=0.1, num_tokens=1, seconds=0.1)
    assert not stats.finite
    part = bundle()
    with torch.no_grad():
        part.model.get_parameter("model.norm.weight").fill_(math.inf)
    assert not loop_of(part).step(data(1)[0], progress=0.1).finite


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ModelError, match=r"train\.accumulation = 9 is larger than train\.batch_size = 8"):
        loop_of(bundle(), accumulation=9)
    part = ModelBundle(model=bundle().model, loss_fn=lambda model, tokens: model(tokens[:, :-1]))
    with pytest.raises(ModelError, match=r"shape \(8, 16, 50\); expected a scalar"):
        loop_of(part).step(data(1)[0], progress=0.1)


# Evaluation --------------------------------------------------------------------------------------------------------


def test_given_parameters_are_used_in_place_and_the_model_is_untouched() -> None:
    part, other = bundle(seed=0), bundle(seed=1)
    own = {name: p.detach().clone() for name, p in part.model.named_parameters()}
    params = {name: p.detach() for name, p in other.model.named_parameters()}
    seen: list[int] = []

    def noting(model: nn.Module, tokens: Tensor) -> Tensor:
        seen.append(model.get_submodule("model.embed_tokens").weight.data_ptr())
        assert not model.training and not torch.is_grad_enabled()
        return part.loss_fn(model, tokens)

    value = evaluate(ModelBundle(model=part.model, loss_fn=noting), params, data(3))
    assert value == evaluate(other, None, data(3))
    assert set(seen) == {params["model.embed_tokens.weight"].data_ptr()}, "the parameters were copied"
    assert all(torch.equal(p, own[name]) for name, p in part.model.named_parameters())
    assert part.model.training and evaluate(part, own, data(3)) == evaluate(part, None, data(3)) != value


def test_evaluation_is_the_mean_over_samples() -> None:
    part = bundle()
    batch = data(1, 8)[0]
    uneven: Iterator[np.ndarray] = iter([batch[:5], batch[5:]])
    assert evaluate(part, None, uneven) == pytest.approx(evaluate(part, None, [batch]), rel=1e-6)


def test_evaluation_keeps_the_mode_of_each_module() -> None:
    part = bundle()
    part.model.get_submodule("model.norm").eval()
    before = [module.training for module in part.model.modules()]
    evaluate(part, None, data(1))
    assert [module.training for module in part.model.modules()] == before


def test_evaluation_names_parameters_that_do_not_fit() -> None:
    part = bundle()
    params = {name: p.detach() for name, p in part.model.named_parameters()}
    norm = "model.norm.weight"
    for given, message in (
        ({n: p for n, p in params.items() if n != norm}, f"'{norm}': it is missing"),
        (params | {"more": torch.zeros(1)}, "'more': the model has no such parameter"),
        (params | {norm: torch.zeros(3)}, rf"'{norm}' has shape \(3,\), the model has \(32,\)"),
    ):
        with pytest.raises(ModelError, match=message):
            evaluate(part, given, data(1))


def test_shared_parameters_are_substituted_together() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    part = ModelBundle(model=Shared(), loss_fn=bundle().loss_fn)
    zeros = {name: torch.zeros_like(p) for name, p in part.model.named_parameters()}
    assert list(zeros) == ["embed.weight"]
    assert evaluate(part, zeros, data(1)) == pytest.approx(math.log(50))


# Precision, device, memory -----------------------------------------------------------------------------------------


def test_bf16_trains_close_to_fp32_where_it_is_supported() -> None:
    try:
        check_precision("bf16", CPU)
    except ModelError as error:
        pytest.skip(str(error))
    losses = {}
    for precision in ("fp32", "bf16"):
        part = bundle()
        loop = loop_of(part, precision=precision, lr=0.01)
        losses[precision] = [loop.step(batch, progress=0.1).loss for batch in data(5)]
        assert all(p.dtype == torch.float32 for p in part.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
    assert evaluate(part, None, data(1), precision="bf16") == pytest.approx(evaluate(part, None, data(1)), rel=0.02)


def test_bf16_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"train.precision = 'bf16' on cpu: this processor .*; set .* 'fp32'"):
        loop_of(bundle(), precision="bf16")
    with pytest.raises(ModelError, match="not been tried on meta"):
        check_precision("bf16", torch.device("meta"))


def test_device_names() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0", ""):
        with pytest.raises(ModelError, match="expected 'auto', 'cpu', 'cuda' or 'cuda:N'"):
            resolve_device(name)
    with pytest.raises(ModelError, match=r"this process sees \d+ CUDA devices"):
        resolve_device("cuda:4096")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc, which this system does not have")
def test_peak_memory_is_between_what_is_used_now_and_what_the_system_says() -> None:
    held = torch.ones(16 << 20)
    pages_now = int(Path("/proc/self/statm").read_text().split()[1])
    now_bytes = pages_now * resource.getpagesize()
    # The kernel counts resident pages per thread and adds them up in batches.
    slack_bytes = 4 << 20
    peak_bytes = peak_memory_bytes(CPU)
    assert held.nbytes < now_bytes - slack_bytes <= peak_bytes
    assert peak_bytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + slack_bytes


def test_autocast_is_nothing_for_fp32() -> None:
    with autocast("fp32", CPU):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_trains_evaluates_and_resumes(optimizer: str) -> None:
    device = resolve_device("cuda")
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    train = TrainConfig(optimizer=optimizer, precision=precision, lr=0.01, accumulation=2)  # type: ignore[arg-type]
    part = bundle(device)
    inner = build_optimizer(part.model, train)
    loop = InnerLoop(part, inner, train, device)
    losses = [loop.step(data(1)[0], progress=0.1).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    anchor = {name: p.detach().cpu() for name, p in part.model.named_parameters()}
    assert evaluate(part, anchor, data(2)) == pytest.approx(evaluate(part, None, data(2)), rel=1e-6)
    other = bundle(device, seed=3)
    other.model.load_state_dict(part.model.state_dict())
    resumed = build_optimizer(other.model, train)
    import_state(resumed, other.model, export_state(inner, part.model))
    a = loop.step(data(1)[0], progress=0.1).loss
    b = InnerLoop(other, resumed, train, device).step(data(1)[0], progress=0.1).loss
    assert a == pytest.approx(b, rel=1e-3)
    assert peak_memory_bytes(device) > 0
