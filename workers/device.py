"""Where an island computes: device by name, precisions it supports, memory it has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Literal

import torch

from workers.model.errors import ModelError


def resolve_device(name: str, *, index: int = 0) -> torch.device:
    """Turn `train.device` into a device; `auto` is the `index`-th visible GPU, or the CPU where there is none.

    Raises ModelError for an unknown name and for a GPU that is not there.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", index % num_gpus) if num_gpus else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or name == "cuda:":
        raise ModelError(f"train.device = {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    wanted = int(number) if number else index % max(num_gpus, 1)
    if wanted >= num_gpus:
        raise ModelError(
            f"train.device = {name!r}: this process sees {num_gpus} CUDA devices (torch {torch.__version__}); "
            "use 'auto' or 'cpu', or check CUDA_VISIBLE_DEVICES and the installed torch build"
        )
    return torch.device("cuda", wanted)


def check_precision(precision: Literal["fp32", "bf16"], device: torch.device) -> None:
    """Raise ModelError, with the reason, where `train.precision` is not supported by the hardware of `device`."""
    if precision == "fp32":
        return
    if device.type == "cuda":
        reason = None
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            reason = f"{torch.cuda.get_device_name(device)} has no bf16 units"
    elif device.type == "cpu":
        reason = None
        if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            reason = "this processor has no bf16 instructions that oneDNN can use (AVX-512 or Arm bf16)"
    else:
        reason = f"bf16 has not been tried on {device.type} devices"
    if reason is not None:
        raise ModelError(f"train.precision = 'bf16' on {device}: {reason}; set train.precision = 'fp32'")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of torch's allocator on a GPU, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would start from the peak of the process that forked this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
