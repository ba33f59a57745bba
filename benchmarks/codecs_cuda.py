"""How fast codecs are on a GPU: encode plus decode against a copy of the same fp32 values, in the same run.

    python -m benchmarks.codecs_cuda                    # 50 M values; keeps results/codecs_cuda.json

A ratio is the time of a device-to-device copy over the time of encoding the vector and decoding it again, medians of
interleaved repetitions, timed by events on the device's own clock. Goal: 0.6 with the Triton form. The whole vector
is one payload: chunks of an exchange are shorter, and pay a start of each kernel. Without a GPU it returns 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

from benchmarks.common import keep
from strategies.codecs.backends import TRITON_CODECS
from strategies.config import CodecConfig
from strategies.registry import build_codec, warm_up

GOAL = 0.6


def seconds(work: Callable[[], object]) -> float:
    """Time of some work on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, keep; 1 if the goal is missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=50_000_000)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    values_N = torch.randn(options.values, device=device)
    out_N = torch.empty_like(values_N)
    rows = []
    for name in TRITON_CODECS:
        for backend in ("triton", "torch"):
            codec = build_codec(CodecConfig(name=name, backend=backend))  # type: ignore[arg-type]
            warm_up(codec, device)

            def there_and_back(codec=codec) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
                codec.decode(codec.encode(values_N), num_values=options.values, out=out_N)

            there_and_back()
            ratios = [
                seconds(lambda: out_N.copy_(values_N)) / seconds(there_and_back) for _ in range(options.repetitions)
            ]
            rows.append({"codec": name, "backend": backend, "ratio": round(statistics.median(ratios), 4)})
            print(rows[-1], flush=True)
    met = all(row["ratio"] >= GOAL for row in rows if row["backend"] == "triton")
    keep("codecs_cuda", {"device": torch.cuda.get_device_name(), "values": options.values, "goal": GOAL, "rows": rows})
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
