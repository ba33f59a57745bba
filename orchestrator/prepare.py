"""Before any process starts: settle what depends on this machine, and find everything wrong that can be found."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from faults.plan import PlannedFault
from orchestrator.build import island_name, num_islands, pack_path, resolve
from orchestrator.errors import UserError
from orchestrator.fault_plan import read_faults, read_link_changes
from orchestrator.preflight import check_files
from orchestrator.telemetry.trackers import check_installed

if TYPE_CHECKING:
    from faults.lab.schedule import LinkChange
    from orchestrator.config import RunConfig
    from workers.model.shape import DecoderShape
    from workers.pipeline.layer_table import LayerTable


VERIFIED_BYTES = 2_000_000_000  # a second or two


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that can start: its resolved configuration, the folder of its tokens, and the faults to cause.

    `links`: what to change of the links of the lab that it runs in. `notes`: what the user should know of it before.
    """

    config: RunConfig
    pack: Path | None
    faults: tuple[PlannedFault, ...]
    links: tuple[LinkChange, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(config: RunConfig, faults: Sequence[str] = ()) -> Prepared:
    """Resolve and check; imports torch, starts nothing, and writes nothing but the embedded corpus into the cache.

    Raises:
        ValueError: a setting, file, function or fault of the user's that cannot work; says which, and what would.
    """
    check_files(config)
    asked_for, explicit = config.data.seq_len, "seq_len" in config.data.model_fields_set
    config = resolve(config, num_gpus=_num_gpus(config))
    notes: tuple[str, ...] = ()
    if explicit and config.data.seq_len != asked_for:
        notes = (
            f"data.seq_len = {asked_for} is not used: {config.data.path} was packed with {config.data.seq_len} "
            f"(`atoll data pack --seq-len {asked_for}` makes another one)",
        )
    names = [island_name(i) for i in range(num_islands(config))]
    for name in config.train.per_island:
        if name not in names and not config.run.elastic:
            raise UserError(
                f"train.per_island names {name!r}, the run has {', '.join(names)}",
                place="train.per_island",
                remedy=f"[train.per_island.{names[-1]}], or a larger run.islands",
            )
    plan, links = read_faults(config, faults, names), read_link_changes(config)
    _import_from_here()
    config = _check_functions(config)
    _check_devices(config, names)
    check_installed(config.metrics)
    _check_snapshots(config)
    pack = pack_path(config)
    if pack is not None:
        notes += _verify(pack)
        notes += _check_own_packs(config, pack)
        _check_model(config, pack)
        _check_pipeline(config, pack)
    return Prepared(config=config, pack=pack, faults=plan, links=links, notes=notes)


def _verify(pack: Path) -> tuple[str, ...]:
    """Compare every token of a pack with its index; of a large one only say how to."""
    from workers.data.reader import PackReader

    reader = PackReader(pack)
    num_bytes = sum(shard.num_bytes for split in reader.index.splits.values() for shard in split.shards)
    if num_bytes > VERIFIED_BYTES:
        return (f"{pack} has {num_bytes / 1e9:.1f} GB and is not read whole now: `atoll data verify {pack}` does that",)
    reader.verify()
    return ()


def _check_own_packs(config: RunConfig, pack: Path) -> tuple[str, ...]:
    """Packs of single islands that are on this machine; of the others it is said that they could not be looked at."""
    from workers.data.index import INDEX_FILE, check_own, load_index

    notes = []
    for name, own in sorted(config.data.per_island.items()):
        path = Path(own.path).expanduser()
        if (path / INDEX_FILE).is_file():
            check_own(own.path, load_index(path), load_index(pack), f"data.per_island.{name}")
        else:
            notes.append(f"{own.path} is not on this machine: {name} looks at its own pack where it starts")
    return tuple(notes)


def _check_snapshots(config: RunConfig) -> None:
    """Whether anybody answers where snapshots shall be kept; raises SnapshotError."""
    if config.run.snapshots is not None:
        from workers.snapshot_store import open_store

        open_store(config.run.snapshots, config.run.name).complete()


def _check_pipeline(config: RunConfig, pack: Path) -> None:
    """Whether every stage fits somebody; raises SettingError with the numbers."""
    if config.pipeline.stages is None:
        return
    from orchestrator.pipeline.plan import check_fragments, check_memory, outer_states
    from workers.data.index import load_index
    from workers.model.shape import resolve_shape
    from workers.pipeline.memory import machine_bytes

    index = load_index(pack)
    shape = resolve_shape(config.model, vocab_size=index.vocab_size, seq_len=index.seq_len)
    stages = check_memory(
        shape,
        config.pipeline,
        machine_bytes=machine_bytes(),
        on_one_machine=config.run.address is None,
        table=layer_table(config, pack),
        outer_states=outer_states(config),
    )
    check_fragments(stages, config.strategy.num_fragments)


def layer_table(config: RunConfig, pack: Path) -> LayerTable | None:
    """What is known of a pipeline's layers, where that is more than the settings say; raises ModelError."""
    if config.model.factory is None and config.pipeline.split == "params":
        return None
    from workers.data.index import load_index
    from workers.model.shape import resolve_shape

    index = load_index(pack)
    shape = resolve_shape(config.model, vocab_size=index.vocab_size, seq_len=index.seq_len)
    model, by_time = config.model, config.pipeline.split == "time"
    return _table(model.factory, json.dumps(model.options), shape, config.train.seed, by_time, model.factory_digest)


@cache
def _table(
    factory: str | None, options: str, shape: DecoderShape, seed: int, by_time: bool, source_digest: str | None
) -> LayerTable | None:
    """Once in a process: what is measured is another time something else."""
    from workers.pipeline.user_layers import make_table

    return make_table(
        factory=factory,
        options=json.loads(options),
        shape=shape,
        seed=seed,
        by_time=by_time,
        source_digest=source_digest,
    )


def _import_from_here() -> None:
    """Let the user's modules be found in the current folder, as `python -m` does and an installed command does not."""
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)


def _num_gpus(config: RunConfig) -> int:
    if config.run.islands != "auto" or config.train.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_functions(config: RunConfig) -> RunConfig:
    """The user's functions can be called, and are those of the run; the configuration with what they are."""
    from workers.source import check_source, source_digest

    found: dict[str, object] = {}
    if config.model.factory is not None:
        from workers.model.factory import load_factory

        load_factory(config.model.factory)
        check_source(config.model.factory, config.model.factory_digest, key="model.factory")
        found["model.factory_digest"] = source_digest(config.model.factory)
    if config.train.loop is not None:
        from workers.loops import load_loop

        load_loop(config.train.loop)
        check_source(config.train.loop, config.train.loop_digest, key="train.loop")
        found["train.loop_digest"] = source_digest(config.train.loop)
    return config.with_values(found) if found else config


def _check_devices(config: RunConfig, names: Sequence[str]) -> None:
    """Devices and precisions of the islands; those of a cluster elsewhere are known there only."""
    if config.run.address is not None:
        return
    settings = [(index, config.train.for_island(name)) for index, name in enumerate(names)]
    if not _may_have_gpu() and all(t.device in ("auto", "cpu") and t.precision == "fp32" for _, t in settings):
        return  # every processor can do that: no need to import torch here, which takes a second or two
    from workers.device import check_precision, resolve_device

    for index, train in settings:
        check_precision(train.precision, resolve_device(train.device, index=index))


def _may_have_gpu() -> bool:
    """Whether the system has the device of a driver: NVIDIA's, AMD's, or Windows' under Linux."""
    device = Path("/dev")
    return any(device.glob("nvidia[0-9]*")) or (device / "kfd").exists() or (device / "dxg").exists()


def _check_model(config: RunConfig, pack: Path) -> None:
    """The shape of the built-in decoder for this vocabulary, and the weights that it starts from."""
    from workers.data.reader import PackReader
    from workers.model.shape import resolve_shape

    reader = PackReader(pack)
    _ = reader.tokenizer  # raises where it is not the one that made the tokens
    if config.model.factory is not None:
        return
    shape = resolve_shape(config.model, vocab_size=reader.index.vocab_size, seq_len=reader.index.seq_len)
    if config.model.init_from is not None:
        from workers.model.hf import check_hf_folder

        check_hf_folder(Path(config.model.init_from).expanduser(), shape)
