"""A run that is small enough for tests: a pack of a few kilobytes, a model of a few thousand parameters."""

from __future__ import annotations

import random
from pathlib import Path

from orchestrator.config import RunConfig, parse_config
from workers.data.pack import pack

SEQ_LEN = 16
WORDS = "reef lagoon atoll coral island tide wave sand palm shell drift swell current anchor".split()

TOML = """
[run]
name = "small"
islands = 1
snapshot_every_s = 1000.0

[train]
tokens = 7680
batch_size = 4
lr = 3e-3
threads = 1
device = "cpu"

[model]
layers = 1
dim = 16
heads = 2

[strategy]
name = "diloco"
inner_steps = 8
outer_lr = 0.9
outer_momentum = 0.5

[codec]
name = "fp32"

[exchange]
quorum = 1.0
heartbeat_s = 0.2
chunk_values = 1024

[eval]
every = 0.5
windows = 4
"""

# Three stages of two peers, summed after each step.
PIPELINE_TOML = """
[train]
lr = 1e-2
device = "cpu"
[model]
layers = 2
dim = 16
heads = 2
[strategy]
name = "ddp"
inner_steps = 1
[codec]
name = "fp32"
[exchange]
chunk_values = 1024
[eval]
every = 1.0
windows = 5
[pipeline]
stages = 3
peers = 2
microbatches = 6
microbatch_size = 2
in_flight = 4
boundary = "fp32"
rebalance_s = 0.0
"""


def make_pack(folder: Path) -> Path:
    """Pack words in random order (the same each time) into `folder/pack`."""
    rng = random.Random(0)
    text = folder / "words.txt"
    text.write_text("\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(2000)), encoding="utf-8")
    out = folder / "pack"
    pack([text], out, seq_len=SEQ_LEN, val_fraction=0.2)
    return out


def small_config(pack_dir: Path, *overrides: str) -> RunConfig:
    """The configuration of a small run on the pack in `pack_dir`; `overrides` as `--set` takes them."""
    return parse_config(TOML, overrides=[f"data.path={pack_dir}", *overrides]).config
