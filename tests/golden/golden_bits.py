"""Digests of everything in `strategies/` that must have the same bits on all members.

Run as a program, for one device, one backend and one CPU capability: prints one JSON object. `--write` stores the
digests in strategies.json and short payloads of all codecs in payloads.json: do that only when a change of the numbers
is meant, since members of one run with different numbers cannot work together.
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
from strategies.codecs.backends import Backend
from strategies.codecs.base import Codec
from strategies.codecs.e3m0 import E3m0
from strategies.codecs.feedback import encode_with_feedback
from strategies.codecs.fp4 import Fp4
from strategies.codecs.int4 import Int4, Int4Stochastic
from strategies.codecs.int8 import Int8, Int8Stochastic
from strategies.codecs.none import Bf16, Fp32
from strategies.codecs.sign import Sign
from strategies.codecs.stochastic import mix
from strategies.codecs.topk import TopK
from strategies.elementwise import PASS_VALUES
from strategies.fragments import TensorSpec, plan_fragments
from strategies.merge import advance_included, rebase
from strategies.norm import sum_of_squares
from strategies.outer import Average, Nesterov, OuterAdamW, OuterStep, States
from strategies.strategy import result_codec_of

GOLDEN = Path(__file__).with_name("strategies.json")
PAYLOADS = Path(__file__).with_name("payloads.json")
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


def all_codecs(backend: Backend) -> list[Codec]:
    """One of each kind, in the configuration's block size."""
    key = mix(0, 17, 3)
    dense = [Int8(4096, backend), Int8(64, backend), Int8Stochastic(4096, backend, key), Int4(256, backend)]
    low_bit = [Int4Stochastic(256, backend, key), Fp4(256, backend), E3m0(256, backend)]
    return [Fp32(), Bf16(), *dense, *low_bit, Sign(4096, backend), TopK(4096, backend)]


def short_payloads(backend: Backend) -> dict[str, dict[str, str]]:
    """Name -> bytes of a payload and of what it decodes to, in hexadecimal: small enough to be looked at."""
    ends = torch.tensor([0.0, -0.0, 1e-40, -1e-30, 3.0, 2.5, -0.25, 1.0])
    x = torch.cat([hashed(5, 63), ends])
    key = mix(0, 17, 3)
    small = [Int8(32, backend), Int8Stochastic(32, backend, key), Int4(32, backend), Int4Stochastic(32, backend, key)]
    codecs = [Fp32(), Bf16(), *small, Fp4(32, backend), E3m0(32, backend), Sign(32, backend), TopK(64, backend)]
    result = {"input": {"values": as_hex(x)}}
    for codec in codecs:
        payload = codec.encode(x)
        result[codec.name] = {
            "payload": as_hex(payload),
            "decoded": as_hex(codec.decode(payload, num_values=x.numel())),
        }
    return result


def as_hex(values: Tensor) -> str:
    """Bytes in hexadecimal."""
    return values.contiguous().view(torch.uint8).numpy().tobytes().hex()


def compute(device: str, backend: Backend) -> dict[str, str]:
    """Return name -> digest."""
    anchor, *contributions = (hashed(seed).to(device) for seed in range(4))
    theta = hashed(7, exponents=18).to(device)
    result: dict[str, str] = {}
    for codec in all_codecs(backend):
        name = f"{codec.name}-{codec.block}"
        payloads = [codec.encode(x) for x in contributions]
        decoded = [codec.decode(p, num_values=N) for p in payloads]
        reduced = weighted_sum(decoded, COEFFICIENTS)
        result_codec = result_codec_of(codec)
        g = result_codec.decode(result_codec.encode(reduced), num_values=N)
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
    parser.add_argument("--backend", default="torch", choices=["torch", "numba", "triton"])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digests, payloads = compute(arguments.device, arguments.backend), short_payloads(arguments.backend)
    if arguments.write:
        PAYLOADS.write_text(json.dumps(payloads, indent=1) + "\n", encoding="utf-8")
        GOLDEN.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    capability = torch.backends.cpu.get_cpu_capability()
    control = fused_control(arguments.device)
    print(json.dumps({"capability": capability, "control": control, "digests": digests, "payloads": payloads}))


if __name__ == "__main__":
    main()
