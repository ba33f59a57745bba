"""From a resolved configuration to what the coordinator and the islands are given (no torch, no Ray)."""

from __future__ import annotations

import os
from functools import partial
from itertools import count
from pathlib import Path

from orchestrator.config import RunConfig
from orchestrator.coordinator import RunPlan
from strategies.codecs.backends import resolve_backend
from workers.context import IslandSpec
from workers.data.index import check_shared, load_index
from workers.schedule import agreed_rate


def island_name(index: int) -> str:
    """`island-0`, `island-1`, ..."""
    return f"island-{index}"


def island_index(name: str) -> int:
    """The number in an island's name."""
    return int(name.rpartition("-")[2])


OWN_PACK_LABEL = "island"
"""Label of the machine that has the pack of one island, in a cluster: `atoll join STRING --label island=island-1`."""


def machine_labels(config: RunConfig, name: str) -> dict[str, str]:
    """Labels that the machine of an island must have: one with a pack of its own only starts where that is."""
    labels = dict(config.run.labels)
    if name in config.data.per_island and config.run.address is not None:
        labels[OWN_PACK_LABEL] = name
    return labels


def resolve(config: RunConfig, *, num_gpus: int = 0) -> RunConfig:
    """Replace what depends on this machine or on the corpus: number of islands, the corpus' digest, codec backend."""
    values: dict[str, object] = {}
    if config.pipeline.stages is not None:
        values["run.islands"] = config.pipeline.num_processes
    elif config.run.islands == "auto" and config.run.address is not None:
        values |= {"run.islands": 1, "run.elastic": True}
    elif config.run.islands == "auto":
        values["run.islands"] = num_gpus or max(num_cores() // config.train.threads, 1)
    if config.data.corpus is not None and config.data.digest is None:
        from workers.data.corpus import corpus_digest

        values["data.digest"] = corpus_digest(config.data.corpus)
    if config.data.path is not None and config.data.samples is None:
        from workers.data.fetch import is_uri, local_pack

        folder = local_pack(config.data.path, digest=config.data.digest)
        index = load_index(folder)
        check_shared(folder, index)
        values["data.seq_len"] = index.seq_len
        if is_uri(config.data.path):  # the other machines fetch it as well: it must be the same one
            values["data.digest"] = index.digest
    if config.codec.backend == "auto":
        values["codec.backend"], _ = resolve_backend("auto")
    return config.with_values(values) if values else config


def pack_path(config: RunConfig) -> Path | None:
    """The folder of the run's tokens, None where the loop brings its own data.

    Packs the embedded corpus into the cache if it is not there yet.
    """
    if config.data.samples is not None:
        return None
    if config.data.corpus is not None:
        from workers.data.corpus import resolve_corpus

        return resolve_corpus(config.data.corpus, seq_len=config.data.seq_len)
    assert config.data.path is not None, "checked when the configuration was read"
    from workers.data.fetch import local_pack

    return local_pack(config.data.path, digest=config.data.digest)


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_islands(config: RunConfig) -> int:
    """Islands of a resolved configuration; of a pipeline, its peers and trainers."""
    if config.pipeline.stages is not None:
        return config.pipeline.num_processes
    assert isinstance(config.run.islands, int), "resolve() first"
    return config.run.islands


def first_islands(config: RunConfig) -> tuple[str, ...]:
    """Who is waited for at the start. An elastic run begins with the first that can be anywhere; others come to it."""
    if not config.run.elastic:
        return tuple(island_name(i) for i in range(num_islands(config)))
    own = config.data.per_island
    return (next(name for name in map(island_name, count()) if name not in own),)


def run_plan(config: RunConfig, *, run_id: str, pack: Path | None) -> RunPlan:
    """What the coordinator decides by. A sample of data that the loop brings counts as one token."""
    seq_len = load_index(pack).seq_len if pack is not None else 1
    return RunPlan(
        run_id=run_id,
        islands=first_islands(config),
        total_samples=-(-config.train.tokens // seq_len),
        seq_len=seq_len,
        exchange=config.exchange,
        strategy=config.strategy,
        eval_every=config.eval.every,
        start_timeout_s=config.run.start_timeout_s,
        snapshot_every_s=config.run.snapshot_every_s,
        replace_dead=config.run.replace,
        max_restarts=config.run.max_restarts,
        max_refusals=config.run.max_refusals,
        max_early_deaths=config.run.max_early_deaths,
        restart_window_s=config.run.restart_window_s,
        rate=partial(agreed_rate, train=config.train) if config.strategy.qsr_alpha else None,
        warmup=config.train.warmup,
        load=config.run.load,
        keeps_copies=config.run.redundancy == "buddy",
        robust=config.robust,
        own_samples=tuple(config.data.own_samples(seq_len).items()),
        own_wait_s=config.data.own_wait_s,
    )


def island_spec(
    config: RunConfig, index: int, *, run_id: str, run_dir: Path, pack: Path | None, resume: bool
) -> IslandSpec:
    """Settings of one island; what `train.per_island` says of it takes the place of `[train]`."""
    name = island_name(index)
    train = config.train
    own = train.per_island.get(name)
    if own is not None:
        train = train.model_copy(update=own.model_dump(exclude_none=True))
    return IslandSpec(
        run_id=run_id,
        name=name,
        index=index,
        num_islands=num_islands(config),
        run_dir=run_dir.resolve(),
        pack=pack,
        train=train,
        data=config.data,
        model=config.model,
        strategy=config.strategy,
        codec=config.codec,
        eval=config.eval,
        chunk_values=config.exchange.chunk_values,
        timeout_s=config.exchange.timeout_s,
        wait_s=config.exchange.wait_s,
        heartbeat_s=config.exchange.heartbeat_s,
        bound_rounds=config.exchange.bound_rounds,
        connections=config.exchange.connections,
        pace_s=train.pace_s,
        link_share=config.exchange.link_share,
        link_bytes_per_s=config.exchange.link_bytes_per_s,
        resume=resume,
        keep_anchors=config.run.keep_anchors,
        snapshots=config.run.snapshots,
        keeps_copies=config.run.redundancy == "buddy",
        staleness_limit=config.exchange.staleness_limit,
    )
