"""The largest batch that an island's memory takes: measured before the first step (`train.fit_batch`).

    fit_batch(probe, largest, limit_bytes)     probe(b) = peak bytes of a forward and backward pass of b samples

Powers of two from 1 up to `train.batch_size`. A size is only tried if the two before it say that it will fit, because
a process that takes too much of a machine's memory is killed without a word; a GPU says so, and that is believed.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from workers.device import peak_memory_bytes
from workers.model.errors import ModelError
from workers.model.factory import LossFn

Probe = Callable[[int], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFit:
    """The batch size that was taken, what it and the limit were in bytes, and why no larger one."""

    batch_size: int
    peak_bytes: int
    limit_bytes: int
    why: str


def fit_batch(probe: Probe, *, largest: int, limit_bytes: int) -> BatchFit:
    """Return the largest power of two up to `largest` whose peak is under `limit_bytes`.

    `probe` may raise `torch.OutOfMemoryError`. Raises ModelError if not even one sample fits.
    """
    fits: list[tuple[int, int]] = []
    size = 1
    while size <= largest:
        if len(fits) > 1 and (expected := _expected(fits)) > limit_bytes:
            return _done(fits, limit_bytes, f"{size} samples would need about {expected:,} bytes")
        try:
            peak = probe(size)
        except torch.OutOfMemoryError:
            peak = limit_bytes + 1
        if peak > limit_bytes:
            return _done(fits, limit_bytes, f"{size} samples need more than {limit_bytes:,} bytes")
        fits.append((size, peak))
        size *= 2
    return _done(fits, limit_bytes, f"train.batch_size = {largest} allows no more")


def _expected(fits: list[tuple[int, int]]) -> int:
    """Peak of the next size: each doubling adds twice what the one before it added."""
    (_, before), (_, last) = fits[-2:]
    return last + 2 * max(last - before, 0)


def _done(fits: list[tuple[int, int]], limit_bytes: int, why: str) -> BatchFit:
    if not fits:
        raise ModelError(
            f"train.fit_batch: one sample needs more than the {limit_bytes:,} bytes that train.memory_fraction leaves "
            "this island; take a smaller model or data.seq_len, fewer islands on this machine, or a larger fraction"
        )
    size, peak = fits[-1]
    return BatchFit(batch_size=size, peak_bytes=peak, limit_bytes=limit_bytes, why=why)


def memory_probe(
    model: nn.Module, loss_fn: LossFn, batch_of: Callable[[int], torch.Tensor], *, later_bytes: int
) -> Probe:
    """A probe of one real forward and backward pass; model, gradients and random generators are as before.

    `batch_of(b)`: b samples on the model's device. `later_bytes`: what is allocated after the probe (the optimizer's
    moments, the anchor with its outer state), counted on top.
    """
    device = next(model.parameters()).device

    def probe(size: int) -> int:
        gc.collect()
        _forget_peak(device)
        with _untouched(model, device):
            loss_fn(model, batch_of(size)).backward()
        return peak_memory_bytes(device) + later_bytes

    return probe


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A pass changes buffers (running means), gradients and the generators of dropout: all are put back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _forget_peak(device: torch.device) -> None:
    """Peaks are of what follows. Where that is not allowed, an earlier peak may hide a later one: on the safe side."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def share_of_memory(device: torch.device, *, num_sharing: int) -> int:
    """Bytes that are one island's of a GPU, or of this machine (or of the control group it is limited to)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // max(num_sharing, 1)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total // max(num_sharing, 1)


def remember(path: Path, fit: BatchFit) -> None:
    """Keep what was measured in the run directory: a resumed island takes the same batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(fit), indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def remembered(path: Path) -> BatchFit | None:
    """What `remember` kept, or None."""
    return BatchFit(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
