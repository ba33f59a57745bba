from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from workers.config import ModelConfig, TrainConfig
from workers.inner_loop import InnerLoop
from workers.model.errors import ModelError
from workers.model.factory import ModelBundle, build_model
from workers.optim import InnerOptimizer, MuonWithAdamW, build_optimizer, export_state, hidden_matrices, import_state

CPU = torch.device("cpu")
SMALL = ModelConfig(layers=1, dim=32, heads=2, tie_embeddings=False)


def bundle(seed: int = 0) -> ModelBundle:
    return build_model(SMALL, vocab_size=40, seq_len=8, seed=seed)


def batches(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 40, (4, 9), generator=generator) for _ in range(number)]


def test_adamw_decays_matrices_only_and_equals_torch() -> None:
    train = TrainConfig(lr=0.01, weight_decay=0.3, grad_clip=0, warmup=0, schedule="constant")
    ours, reference = bundle().model, bundle().model
    optimizer = build_optimizer(ours, train)
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim >= 2], "weight_decay": 0.3},
            {"params": [p for p in reference.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01, betas=(0.9, 0.95), foreach=False,
    )  # fmt: skip
    for tokens in batches(4):
        for model, stepper in ((ours, optimizer), (reference, plain)):
            bundle().loss_fn(model, tokens).backward()
            stepper.step()
            stepper.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_muon_takes_hidden_matrices_and_equals_torch() -> None:
    model = bundle().model
    names = hidden_matrices(model)
    assert len(names) == 7 and all(".layers.0." in name for name in names)
    train = TrainConfig(optimizer="muon", muon_lr=0.05, weight_decay=0.1, lr=0.01)
    optimizer = build_optimizer(model, train)
    assert isinstance(optimizer, MuonWithAdamW)
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == [2, 3, 7]
    assert sorted(group["peak_lr"] for group in optimizer.param_groups) == [0.01, 0.01, 0.05]
    reference = bundle().model
    parameters = dict(reference.named_parameters())
    plain = torch.optim.Muon([parameters[name] for name in names], lr=0.05, momentum=0.95, weight_decay=0.1)
    for target, stepper in ((model, optimizer), (reference, plain)):
        bundle().loss_fn(target, batches(1)[0]).backward()
        stepper.step()
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], parameters[name]) for name in names)
    assert not torch.equal(own["lm_head.weight"], parameters["lm_head.weight"]), "the head is stepped by AdamW"


def test_muon_moves_every_direction_of_a_matrix_alike() -> None:
    model = nn.Sequential(nn.Linear(24, 16, bias=False))
    before = model[0].weight.detach().clone()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", muon_lr=1.0, weight_decay=0.0))
    model[0].weight.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimizer.step()
    values = torch.linalg.svdvals(model[0].weight.detach() - before)
    assert 0.5 < values.min() and values.max() < 1.5


def test_muon_without_hidden_matrices_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    with pytest.raises(ModelError, match=r"'muon'.*Sequential.*'adamw'"):
        build_optimizer(model, TrainConfig(optimizer="muon"))


def test_frozen_parameters_are_left_out() -> None:
    model = bundle().model
    model.get_parameter("lm_head.weight").requires_grad_(False)
    held = {id(p) for group in build_optimizer(model, TrainConfig()).param_groups for p in group["params"]}
    assert len(held) == len(list(model.parameters())) - 1
    assert id(model.get_parameter("lm_head.weight")) not in held


def build_sgd(model: nn.Module, _: TrainConfig) -> InnerOptimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def build_plain_adam(model: nn.Module, _: TrainConfig) -> InnerOptimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True, foreach=False)


def build_adafactor(model: nn.Module, _: TrainConfig) -> InnerOptimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd", "adam", "adafactor"])
def test_a_resume_is_bit_for_bit_the_uninterrupted_run(kind: str) -> None:
    train = TrainConfig(optimizer="muon" if kind == "muon" else "adamw", warmup=0.5)
    build = {"sgd": build_sgd, "adam": build_plain_adam, "adafactor": build_adafactor}.get(kind, build_optimizer)

    def run(part: ModelBundle, optimizer: InnerOptimizer, steps: range) -> list[float]:
        loop = InnerLoop(part, optimizer, train, CPU)
        return [
            loop.step(tokens, progress=i / 8).loss for i, tokens in zip(steps, batches(8)[steps.start :], strict=False)
        ]

    whole = bundle()
    losses = run(whole, build(whole.model, train), range(8))
    first = bundle()
    optimizer = build(first.model, train)
    losses_resumed = run(first, optimizer, range(3))
    stored = load(save(export_state(optimizer, first.model)))
    weights = load(save({name: p.detach() for name, p in first.model.named_parameters()}))
    second = bundle(seed=9)
    second.model.load_state_dict(weights)
    resumed = build(second.model, train)
    import_state(resumed, second.model, stored)
    losses_resumed += run(second, resumed, range(3, 8))
    assert losses == losses_resumed
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    again = export_state(resumed, second.model)
    for name, tensor in export_state(resumed, second.model).items():
        assert torch.equal(again[name], tensor)


def test_exported_state_is_a_copy() -> None:
    part = bundle()
    optimizer = build_optimizer(part.model, TrainConfig())
    loop = InnerLoop(part, optimizer, TrainConfig(), CPU)
    loop.step(batches(1)[0], progress=0.5)
    state = export_state(optimizer, part.model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    loop.step(batches(2)[1], progress=0.5)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_state_that_belongs_to_another_model_is_named() -> None:
    part = bundle()
    optimizer = build_optimizer(part.model, TrainConfig())
    InnerLoop(part, optimizer, TrainConfig(), CPU).step(batches(1)[0], progress=0.5)
    state = export_state(optimizer, part.model)
    target = build_optimizer(part.model, TrainConfig())
    with pytest.raises(ModelError, match="'state/nobody/exp_avg' belongs to nothing"):
        import_state(target, part.model, {"state/nobody/exp_avg": torch.zeros(2)})
    with pytest.raises(ModelError, match="'group/7/lr#float' belongs to nothing"):
        import_state(target, part.model, {"group/7/lr#float": torch.zeros(())})
    wrong = {"state/model.norm.weight/exp_avg": torch.zeros(3)}
    with pytest.raises(ModelError, match=r"model.norm.weight/exp_avg' has shape \(3,\), the parameter has \(32,\)"):
        import_state(target, part.model, state | wrong)


def test_an_optimizer_whose_state_is_no_tensor_is_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match=r"LBFGS keeps a list as 'state/weight/\w+'; only tensors and numbers"):
        export_state(optimizer, model)


def test_the_facade_keeps_torch_state_dicts() -> None:
    train = TrainConfig(optimizer="muon")
    part, other = bundle(), bundle()
    optimizer, target = build_optimizer(part.model, train), build_optimizer(other.model, train)
    InnerLoop(part, optimizer, train, CPU).step(batches(1)[0], progress=0.5)
    other.model.load_state_dict(part.model.state_dict())
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the moments
    for p, o in ((part, optimizer), (other, target)):
        InnerLoop(p, o, train, CPU).step(batches(2)[1], progress=0.6)
    for p, q in zip(part.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
