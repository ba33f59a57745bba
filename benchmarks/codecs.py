"""How fast codecs are: encode plus decode against memcpy of the same fp32 bytes, in the same run.

    python -m benchmarks.codecs                         # 50 M values, 7 repetitions; keeps results/codecs.{json,md}
    python -m benchmarks.codecs --values 4000000 --dry  # a smoke run that keeps nothing

A ratio is the time of memcpy over the time of encoding and decoding every chunk into a vector as long as the input;
each repetition measures memcpy beside every codec, in an order that rotates, and the median of the ratios counts.
"cpu" counts only the time in which the thread ran, which other programs on the machine disturb less. With two threads,
chunks are dealt to both; the speed-up is the wall time of one thread over that of two. A codec that comes near memcpy
on one thread cannot gain much from a second: both wait for the same memory. So the same is measured with each chunk
decoded into one vector that stays in the cache ("in cache"), as the exchange does it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, ROOT, environment
from strategies.codecs.base import Codec
from strategies.config import CodecConfig
from strategies.registry import build_codec

TARGETS = {"int8": 0.30, "int4": 0.28, "fp4": 0.16, "e3m0": 0.15, "sign": 0.30}
SPEED_UP_TARGETS = {"int8": 1.3, "int4": 1.5, "fp4": 1.5, "e3m0": 1.5, "sign": 1.5}
Work = Callable[[Codec, Sequence[Tensor], Sequence[Tensor]], None]

NAMES = ("int8", "int4", "fp4", "e3m0", "sign", "topk", "int8-stochastic", "int4-stochastic")
# Bits per value: the codes and one scale of 32 bits a block; top-k: an index of 12 bits and 2 bits for 64 of 4,096.
FORMULA_BITS = {
    "int8": 8 + 32 / 4096,
    "int8-stochastic": 8 + 32 / 4096,
    "int4": 4 + 32 / 256,
    "int4-stochastic": 4 + 32 / 256,
    "fp4": 4 + 32 / 256,
    "e3m0": 4.125,
    "sign": 1 + 32 / 4096,
    "topk": 64 * 14 / 4096,
}


def there_and_back(codec: Codec, chunks: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Encode and decode every chunk."""
    for chunk, out in zip(chunks, outs, strict=True):
        codec.decode(codec.encode(chunk), num_values=chunk.numel(), out=out)


def in_cache(codec: Codec, chunks: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Encode and decode every chunk, all into one short vector."""
    out = torch.empty_like(outs[0])
    for chunk in chunks:
        codec.decode(codec.encode(chunk), num_values=chunk.numel(), out=out[: chunk.numel()])


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Wall and CPU seconds of this thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work(*arguments)
    return time.perf_counter() - wall, time.thread_time() - cpu


def on_threads(
    pool: ThreadPoolExecutor, work: Work, codec: Codec, chunks: Sequence[Tensor], outs: Sequence[Tensor]
) -> None:
    """The work with the chunks dealt to two threads."""
    for half in [pool.submit(work, codec, chunks[k::2], outs[k::2]) for k in range(2)]:
        half.result()


def copy_on_threads(pool: ThreadPoolExecutor, source: np.ndarray, target: np.ndarray) -> None:
    """Memcpy by two threads, half each: what the memory can do."""
    middle = len(source) // 2
    places = (slice(0, middle), slice(middle, None))
    for half in [pool.submit(np.copyto, target[place], source[place]) for place in places]:
        half.result()


def start_up(name: str, cache: str) -> float:
    """CPU seconds until a codec has encoded and decoded for the first time, in a new process beside torch."""
    program = (
        "import time, torch; from strategies.config import CodecConfig; t = time.process_time(); "
        "from strategies.registry import build_codec, warm_up; "
        f"warm_up(build_codec(CodecConfig(name={name!r}, backend='numba'))); print(time.process_time() - t)"
    )
    environ = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    return round(float(done.stdout), 2)


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
            copy_wall, copy_cpu = timed(np.copyto, target, source)
            found = {"memcpy_gb_per_s": 4e-9 * values_N.numel() / copy_wall}
            for suffix, work in (("", there_and_back), ("_in_cache", in_cache)):
                one_wall, one_cpu = timed(work, codec, chunks, outs)
                two_wall, _ = timed(on_threads, pool, work, codec, chunks, outs)
                found |= {f"wall{suffix}": copy_wall / one_wall, f"cpu{suffix}": copy_cpu / one_cpu}
                found |= {f"two_threads{suffix}": copy_wall / two_wall, f"speed_up{suffix}": one_wall / two_wall}
            found["memcpy_speed_up"] = copy_wall / timed(copy_on_threads, pool, source, target)[0]
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
        f"load {where['load_1min']:.1f}, {where['scheduling']}, torch {where['torch']}, numba {where['numba']}. "
        f"{result['num_values']:,} values, median of {result['repetitions']} interleaved repetitions; "
        "ratio = time of memcpy / time of encode plus decode. In cache: each chunk is decoded into one short vector, "
        "as the exchange does it, not into one as long as the input.",
        "",
        "| codec | backend | chunk | ratio | target | with 2 threads | speed-up | target | in cache: ratio | speed-up "
        "| bits/value |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        name, numba_row = r["codec"], r["backend"] == "numba"
        target = f"{TARGETS[name]:.2f}" if numba_row and name in TARGETS else ""
        faster = f"{SPEED_UP_TARGETS[name]:.1f}" if numba_row and name in SPEED_UP_TARGETS else ""
        lines.append(
            f"| {name} | {r['backend']} | {r['chunk_values']} | {r['wall']:.3f} | {target} | {r['two_threads']:.3f} "
            f"| {r['speed_up']:.2f} | {faster} | {r['wall_in_cache']:.3f} | {r['speed_up_in_cache']:.2f} "
            f"| {r['bits_per_value']:.4f} |"
        )
    copy = statistics.median(r["memcpy_speed_up"] for r in result["rows"])
    lines += ["", f"Two threads copy {copy:.2f} times as fast as one: the memory is the limit.", ""]
    lines += ["CPU seconds of the first encode and decode in a new process, import of numba included:", ""]
    lines += ["| codec | numba's cache empty | full |", "|---|---|---|"]
    lines += [f"| {name} | {times['cold']} | {times['warm']} |" for name, times in result["start_s"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, keep. The exit code is 1 if a target was missed with every chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=50_000_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--chunks", type=int, nargs="+", default=[262_144, 131_072])
    parser.add_argument("--codecs", nargs="+", default=list(NAMES))
    parser.add_argument("--backends", nargs="+", default=["numba", "torch"])
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    values_N = torch.from_numpy(np.random.default_rng(0).normal(scale=1e-3, size=options.values).astype(np.float32))
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(2) as pool:
        for backend in options.backends:
            names = [name for name in options.codecs if backend == "numba" or name in TARGETS]
            codecs = [build_codec(CodecConfig(name=name, backend=backend)) for name in names]
            for codec in codecs:  # compiled now
                codec.decode(codec.encode(values_N[:8192]), num_values=8192)
            # The torch form has no target: measured less often, it takes less of everybody's time.
            compiled = backend == "numba"
            for chunk_values in options.chunks if compiled else options.chunks[:1]:
                rows += measure(codecs, values_N, chunk_values, options.repetitions if compiled else 3, pool)
    policy = "normal scheduling"
    if os.sched_getscheduler(0) == os.SCHED_FIFO:  # started by `chrt -f 1`, on a machine that others use too
        policy = "real-time scheduling"
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    where = {**environment(), "numba": numba.__version__, "scheduling": policy}
    result = {"environment": where, "num_values": options.values, "repetitions": options.repetitions, "rows": rows}
    with tempfile.TemporaryDirectory() as cache:
        # The first one also fills what all share.
        result["start_s"] = {
            name: {"cold": start_up(name, cache), "warm": start_up(name, cache)}
            for name in ("int8", "int4", "topk")
            if name in options.codecs
        }
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
