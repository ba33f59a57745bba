"""Optimizers without torch's compiler: the same bits, and nothing of it is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers.uncompiled import uncompiled

ROOT = Path(__file__).parents[3]

IMPORTS_NOTHING = """
import sys
import numpy as np
import torch
from workers.config import ModelConfig, TrainConfig
from workers.inner_loop import InnerLoop, evaluate
from workers.model.factory import build_model
from workers.optim import build_optimizer, export_state, import_state

bundle = build_model(ModelConfig(layers=1, dim=16, heads=2), vocab_size=256, seq_len=8, seed=0)
for name in ("adamw", "muon"):
    train = TrainConfig(batch_size=2, optimizer=name)
    optimizer = build_optimizer(bundle.model, train)
    batch = np.zeros((2, 9), dtype=np.int64)
    InnerLoop(bundle, optimizer, train, torch.device("cpu")).step(batch, progress=0.1)
    import_state(optimizer, bundle.model, export_state(optimizer, bundle.model))
evaluate(bundle, dict(bundle.model.named_parameters()), [batch])
sys.exit("torch._dynamo" in sys.modules)
"""


def trained(kind: type[torch.optim.Optimizer], **settings: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4), (4, 4))]
    optimizer = kind(parameters, lr=1e-2, **settings)  # type: ignore[arg-type]
    for _ in range(5):
        optimizer.zero_grad()
        (torch.randn((2, 8), generator=generator) @ parameters[0] @ parameters[1]).square().sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize(("kind", "settings"), [(torch.optim.AdamW, {"fused": True}), (torch.optim.Muon, {})])
def test_the_bits_are_those_of_torch(kind: type[torch.optim.Optimizer], settings: dict[str, object]) -> None:
    assert all(map(torch.equal, trained(uncompiled(kind), **settings), trained(kind, **settings)))


def test_its_kind_is_that_of_torch_and_hooks_are_called() -> None:
    optimizer = uncompiled(torch.optim.AdamW)([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert isinstance(optimizer, torch.optim.AdamW) and type(optimizer).__name__ == "AdamW"
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    optimizer.step()
    assert called == [True]


def test_the_inner_loop_imports_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS_NOTHING], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr or "torch._dynamo was imported"
