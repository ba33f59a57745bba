"""Digests of everything in `strategies/` that must have the same bits on all members.

Run as a program, for one device and one CPU capability: prints one JSON object. `--write` stores the digests in
strategies.json: do that only when a change of the numbers is meant, since members of one run with different numbers
cannot work together.
The input comes from an integer hash, never from torch.randn, which differs between CPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from strategies.aggregate import accumulate, weighted_sum
from strategies.codecs.base import Codec
from strategies.codecs.feedback import encode_with_feedback
from strategies.codecs.int8 import Int8
from strategies.codecs.none import Bf16, Fp32
from strategies.elementwise import PASS_VALUES
from strategies.fragments import TensorSpec, plan_fragments
from strategies.merge import advance_included, rebase
from strategies.norm import sum_of_squares
from strategies.outer import Average, Nesterov, OuterAdamW, OuterStep, States

GOLDEN = Path(__file__).with_name("strategies.json")
# More than one pass, and a remainder that fills neither a block nor a vector register.
N = PASS_VALUES + 4096 + 77
COEFFICIENTS = [0.4375, 0.3, 0.123456789]


def hashed(seed: int, num: int = N, *, exponents: int = 24) -> Tensor:
    """Return fp32 values with hashed sign, significand and exponent (2^-20 ... 2^(exponents - 20))."""
    h = (np.arange(num, dtype=np.uint64) + np.uint64(seed * 1_000_003)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    h ^= h >> np.uint64(16)
    exponent = np.uint64(107) + (h >> np.uint64(23)) % np.uint64(exponents)
    bits = (h & np.uint64(0x807FFFFF)) | (exponent << np.uint64(23))
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def digest(*tensors: Tensor) -> str:
    """Return a digest of the bytes of all tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:32]


def two_steps(outer: OuterStep, anchor: Tensor, contributions: list[Tensor], **where: object) -> list[Tensor]:
    """Step twice, so that the second step starts from states that are not zero."""
    states: States = tuple(torch.zeros_like(anchor) for _ in range(outer.num_states))
    for version, g in enumerate(contributions):
        scale = outer.prepare([g[:50_000], g[50_000:]])
        anchor, states = outer.step(anchor, states, g, scale=scale, version=version, progress=0.25, **where)  # type: ignore[arg-type]
    return [anchor, *states]


def compute(device: str) -> dict[str, str]:
    """Return name -> digest."""
    anchor, *contributions = (hashed(seed).to(device) for seed in range(4))
    theta = hashed(7, exponents=18).to(device)
    result: dict[str, str] = {}
    codecs: list[Codec] = [Fp32(), Bf16(), Int8(), Int8(64)]
    for codec in codecs:
        name = f"{codec.name}-{codec.block}"
        payloads = [codec.encode(x) for x in contributions]
        decoded = [codec.decode(p, num_values=N) for p in payloads]
        reduced = weighted_sum(decoded, COEFFICIENTS)
        g = codec.decode(codec.encode(reduced), num_values=N)
        result[f"encode/{name}"] = digest(*payloads)
        result[f"decode/{name}"] = digest(*decoded)
        result[f"reduce/{name}"] = digest(reduced)
        result[f"nesterov/{name}"] = digest(*two_steps(Nesterov(lr=0.7, momentum=0.9), anchor, [g, contributions[0]]))
        compensated = encode_with_feedback(codec, contributions[0], contributions[1] * 2.0**-8, decay=0.95)
        result[f"feedback/{name}"] = digest(*compensated)
    result["accumulate"] = digest(accumulate(anchor.clone(), contributions[0], 0.1))
    result["average"] = digest(*two_steps(Average(num_states=1), anchor, contributions[:2]))
    result["sum-of-squares"] = digest(sum_of_squares(contributions[2]))
    specs = [TensorSpec(name="w", shape=(300, 200)), TensorSpec(name="b", shape=(N - 60_000,))]
    (spec,) = plan_fragments(specs, num_fragments=1, pattern="strided")
    adamw = OuterAdamW(lr_at=lambda p: 0.003, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
    result["adamw"] = digest(*two_steps(adamw, anchor, contributions[:2], spec=spec))
    for alpha in (0.0, 0.3, 1.0):
        displacement = contributions[1]
        moved = advance_included(theta.clone(), anchor, contributions[0], displacement, alpha=alpha, kappa=0.7)
        result[f"advance/{alpha}"] = digest(moved)
    result["rebase"] = digest(rebase(theta.clone(), anchor, contributions[0]))
    return result


def fused_control(device: str) -> str:
    """Digest of what is forbidden: a multiply and an add in one operation, as `alpha=` does."""
    return digest(torch.add(hashed(0).to(device), hashed(1).to(device), alpha=0.9))


def main() -> None:
    """Print or store the digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digests = compute(arguments.device)
    if arguments.write:
        GOLDEN.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"capability": capability, "control": fused_control(arguments.device), "digests": digests}))


if __name__ == "__main__":
    main()
