"""A bare torch training loop, without anything of Atoll but the model and the data: what Atoll is compared with.

python -m benchmarks.bare_loop diloco --seconds 25 --set train.batch_size=16
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from orchestrator.build import pack_path
from orchestrator.config import load_config
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.model.factory import build_model


def pss_bytes(pid: int | str = "self") -> int:
    """Proportional set size of a process: its share of every page it maps."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} shows no Pss")


def main() -> None:
    """Train for some seconds and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--warmup", type=float, default=0.0, help="seconds before the first step that counts")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    config = load_config(options.run, overrides=options.overrides).config
    train = config.train
    torch.set_num_threads(train.threads)
    reader = PackReader(pack_path(config))
    index = reader.index
    bundle = build_model(config.model, vocab_size=index.vocab_size, seq_len=index.seq_len, seed=train.seed)
    model, loss_fn = bundle.model, bundle.loss_fn
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )
    parameters = list(model.parameters())
    steps: list[float] = []
    counted_from = 0.0
    began = time.perf_counter()
    position = 0
    while time.perf_counter() - began < options.warmup + options.seconds:
        start = time.perf_counter()
        positions = np.arange(position, position + train.batch_size, dtype=np.int64)
        ids = sample_ids(positions, size=reader.num_samples("train"), seed=train.seed)
        batch = torch.from_numpy(reader.batch(ids))
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        optimizer.step()
        loss.item()
        position += train.batch_size
        if start - began >= options.warmup:
            counted_from = counted_from or start
            steps.append(time.perf_counter() - start)
    seconds = time.perf_counter() - counted_from
    print(
        json.dumps(
            {
                "steps": len(steps),
                "median_step_ms": 1e3 * statistics.median(steps[3:]),
                "tokens_per_s": len(steps) * train.batch_size * index.seq_len / seconds,
                "num_params": bundle.num_params,
                "pss_bytes": pss_bytes(),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
