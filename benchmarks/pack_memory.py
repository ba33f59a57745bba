"""How much memory and time `workers.data.pack` needs: text of three kinds, packed by a process of its own.

    python benchmarks/pack_memory.py --megabytes 2000 --limit-mb 500

Half of the input is one .txt file, a quarter .jsonl, a quarter one .parquet file with a single row group
(the hardest to stream). Prints one JSON object; the exit code is 1 where the peak above start is over the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
_CHUNK_BYTES = 4_000_000
_ROW_BYTES = 2_000


def main() -> int:
    """Generate the input, pack it in a child process, print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the input")
    parser.add_argument("--limit-mb", type=float, default=500.0, help="largest allowed peak above start")
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or the path of a tokenizer.json")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to put input and pack (default: a temporary one)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("INPUT", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, tokenizer=options.tokenizer)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name, "input"), Path(name, "pack")
        generate(source, options.megabytes)
        child = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--measure", str(source), str(out)]
        measured = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
    result = {"input_mb": options.megabytes, "tokenizer": options.tokenizer, "limit_mb": options.limit_mb} | measured
    print(json.dumps(result))
    if options.keep:
        sys.path.insert(0, str(ROOT))
        from benchmarks.common import keep

        keep("pack_memory", result)
    return int(measured["peak_above_start_mb"] > options.limit_mb)


def measure(source: Path, out: Path, *, tokenizer: str) -> dict[str, float]:
    """Pack in this process; return MB above start at the peak, seconds, MB per second, tokens."""
    sys.path.insert(0, str(ROOT))
    from workers.data.pack import pack

    num_bytes = sum(file.stat().st_size for file in source.iterdir())
    start_mb = _status_mb("VmRSS")
    began_s = time.perf_counter()
    index = pack(
        [source], out, tokenizer=tokenizer, text_field="text", text_column="text", seq_len=128, val_fraction=0.05
    )
    seconds = time.perf_counter() - began_s
    # The peak since the start of the process: what the imports took before is below it or makes it an overestimate.
    peak_mb = _status_mb("VmHWM")
    return {
        "start_mb": round(start_mb, 1),
        "peak_above_start_mb": round(peak_mb - start_mb, 1),
        "seconds": round(seconds, 2),
        "mb_per_s": round(num_bytes / 1e6 / seconds, 1),
        "num_tokens": sum(split.num_tokens for split in index.splits.values()),
    }


def generate(folder: Path, megabytes: int) -> None:
    """Write about `megabytes` MB of random words: half .txt, a quarter .jsonl, a quarter .parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    num_chunks = max(4, megabytes * 1_000_000 // _CHUNK_BYTES)
    chunks = _words(np.random.default_rng(0), num_chunks)
    with (folder / "a.txt").open("wb") as text:
        for _ in range(num_chunks // 2):
            text.write(next(chunks))
    with (folder / "b.jsonl").open("w") as lines:
        for _ in range(num_chunks // 4):
            lines.writelines(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(_rows(next(chunks))))
    rows = pa.table({"id": [], "text": []}, schema=pa.schema({"id": pa.int64(), "text": pa.string()}))
    for chunk in chunks:
        texts = _rows(chunk)
        rows = pa.concat_tables([rows, pa.table({"id": list(range(len(texts))), "text": texts})])
    pq.write_table(rows, folder / "c.parquet", row_group_size=1 << 40)


def _words(rng: np.random.Generator, num_chunks: int) -> Iterator[bytes]:
    """Yield chunks of lower-case words and lines, all different."""
    letters = np.frombuffer(b"etaoinshrdlucmfwygpbvkxqjz    \n ", dtype=np.uint8)
    for _ in range(num_chunks):
        random = np.frombuffer(rng.bytes(_CHUNK_BYTES), dtype=np.uint8)
        yield letters[random & 31].tobytes()


def _rows(chunk: bytes) -> list[str]:
    text = chunk.decode("ascii")
    return [text[start : start + _ROW_BYTES] for start in range(0, len(text), _ROW_BYTES)]


def _status_mb(name: str) -> float:
    """Return a memory figure of this process in MB, from the kernel (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    sys.exit(main())
