"""How fast codecs are: encode plus decode against memcpy of the same fp32 bytes, in the same run.

    python -m benchmarks.codecs                           # 50 M values, 7 repetitions: benchmarks/results/codecs.{json,md}
    python -m benchmarks.codecs --values 4000000 --dry    # a smoke run that keeps nothing

A ratio is the time of memcpy over the time of encoding and decoding every chunk into a vector as long as the input;
each repetition measures memcpy beside every codec, in an order that rotates, and the median of the ratios counts.
"wall" is what a user waits; "cpu" counts only the time in which the thread ran, which other programs on the machine
disturb less. With two threads, chunks are dealt to both; "speed-up" is the wall time of one thread over that of two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, environment
from strategies.codecs.base import Codec
from strategies.config import CodecConfig
from strategies.registry import build_codec

TARGETS = {"int8": 0.30, "int4": 0.28, "fp4": 0.16, "e3m0": 0.15, "sign": 0.30}
SPEED_UP_TARGETS = {"int8": 1.3, "int4": 1.5, "fp4": 1.5, "e3m0": 1.5, "sign": 1.5}
NAMES = ("int8", "int4", "fp4", "e3m0", "sign", "topk", "int8-stochastic", "int4-stochastic", "bf16")
# The least the formulas of algorithms.md (section 9, 5.2) allow, in bits per value.
FORMULA_BITS = {
    "int8": 8 + 32 / 4096,
    "int8-stochastic": 8 + 32 / 4096,
    "int4": 4 + 32 / 256,
    "int4-stochastic": 4 + 32 / 256,
    "fp4": 4 + 32 / 256,
    "e3m0": 4.125,
    "sign": 1 + 32 / 4096,
    "topk": 64 * 14 / 4096,
    "bf16": 16,
}


def there_and_back(codec: Codec, chunks: Sequence[Tensor], outs: Sequence[Tensor]) -> int:
    """Encode and decode every chunk; returns the bytes of the payloads without their headers."""
    num_bytes = 0
    for chunk, out in zip(chunks, outs, strict=True):
        payload = codec.encode(chunk)
        codec.decode(payload, num_values=chunk.numel(), out=out)
        num_bytes += payload.numel() - 16
    return num_bytes


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of this thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def on_threads(pool: ThreadPoolExecutor, codec: Codec, chunks: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """`there_and_back` with the chunks dealt to two threads."""
    halves = [pool.submit(there_and_back, codec, chunks[k::2], outs[k::2]) for k in range(2)]
    for half in halves:
        half.result()


def measure(
    codecs: Sequence[Codec], values_N: Tensor, chunk_values: int, repetitions: int, pool: ThreadPoolExecutor
) -> list[dict[str, Any]]:
    """One row per codec: medians over the repetitions."""
    out_N = torch.zeros_like(values_N)
    source, target = values_N.numpy(), out_N.numpy()
    chunks, outs = values_N.split(chunk_values), out_N.split(chunk_values)
    samples: list[dict[str, list[float]]] = [{} for _ in codecs]
    for repetition in range(repetitions):
        for place in range(len(codecs)):
            which = (place + repetition) % len(codecs)
            codec = codecs[which]
            copy_wall, copy_cpu = timed(lambda: np.copyto(target, source))
            one_wall, one_cpu = timed(lambda codec=codec: there_and_back(codec, chunks, outs))  # type: ignore[misc]
            two_wall, _ = timed(lambda codec=codec: on_threads(pool, codec, chunks, outs))  # type: ignore[misc]
            found = {"wall": copy_wall / one_wall, "cpu": copy_cpu / one_cpu, "speed_up": one_wall / two_wall}
            found |= {"two_threads": copy_wall / two_wall, "memcpy_gb_per_s": 4e-9 * values_N.numel() / copy_wall}
            for key, value in found.items():
                samples[which].setdefault(key, []).append(value)
    return [row(codec, values_N, chunks, sample) for codec, sample in zip(codecs, samples, strict=True)]


def row(codec: Codec, values_N: Tensor, chunks: Sequence[Tensor], samples: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of one codec."""
    num_bytes = sum(codec.num_bytes(chunk.numel()) - 16 for chunk in chunks)
    bits = 8 * num_bytes / values_N.numel()
    return {
        "codec": codec.name,
        "block": codec.block,
        "backend": codec.backend,
        "chunk_values": chunks[0].numel(),
        **{key: round(statistics.median(values), 4) for key, values in samples.items()},
        "wall_all": [round(value, 4) for value in samples["wall"]],
        "speed_up_all": [round(value, 4) for value in samples["speed_up"]],
        "bits_per_value": round(bits, 5),
        "over_formula": round(bits / FORMULA_BITS[codec.name] - 1, 5),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = result["environment"]
    lines = [
        "# Codecs against memcpy",
        "",
        f"{where['date']}, commit {where['commit']}, {where['processor']}, {where['cores']} cores, "
        f"load {where['load_1min']:.1f}, torch {where['torch']}, numba {where['numba']}. "
        f"{result['num_values']:,} values, median of {result['repetitions']} interleaved repetitions; "
        "ratio = time of memcpy / time of encode plus decode on one thread.",
        "",
        "| codec | backend | chunk | ratio | target | of CPU time | speed-up with 2 threads | target | bits/value |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        name, numba_row = r["codec"], r["backend"] == "numba"
        target = f"{TARGETS[name]:.2f}" if numba_row and name in TARGETS else ""
        faster = f"{SPEED_UP_TARGETS[name]:.1f}" if numba_row and name in SPEED_UP_TARGETS else ""
        lines.append(
            f"| {name} | {r['backend']} | {r['chunk_values']} | {r['wall']:.3f} | {target} | {r['cpu']:.3f} "
            f"| {r['speed_up']:.2f} | {faster} | {r['bits_per_value']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, keep. The exit code is 1 if a target was missed with every chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=50_000_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--chunks", type=int, nargs="+", default=[131_072, 262_144])
    parser.add_argument("--codecs", nargs="+", default=list(NAMES))
    parser.add_argument("--backends", nargs="+", default=["numba", "torch"])
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    values_N = torch.from_numpy(np.random.default_rng(0).normal(scale=1e-3, size=options.values).astype(np.float32))
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(2) as pool:
        for backend in options.backends:
            codecs = [build_codec(CodecConfig(name=name, backend=backend)) for name in options.codecs]
            codecs = [codec for codec in codecs if codec.backend == backend]
            for codec in codecs:  # compiled now
                codec.decode(codec.encode(values_N[:8192]), num_values=8192)
            for chunk_values in options.chunks:
                rows += measure(codecs, values_N, chunk_values, options.repetitions, pool)
    where = {**environment(), "numba": numba.__version__}
    result = {"environment": where, "num_values": options.values, "repetitions": options.repetitions, "rows": rows}
    if not options.dry:
        (RESULTS / "codecs.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "codecs.md").write_text(table(result))
    print(table(result))
    return int(bool(missed(rows)))


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the codecs that reach their target with no chunk size."""
    compiled = [row for row in rows if row["backend"] == "numba" and row["codec"] in TARGETS]
    best: dict[str, tuple[float, float]] = {}
    for row in compiled:
        ratio, faster = best.get(row["codec"], (0.0, 0.0))
        best[row["codec"]] = max(ratio, row["wall"]), max(faster, row["speed_up"])
    found = [name for name, (ratio, faster) in best.items() if ratio < TARGETS[name] or faster < SPEED_UP_TARGETS[name]]
    if found:
        print(f"below their targets: {', '.join(found)}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
