"""The trained model of a run: samples and exports, from its snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.build import pack_path
from orchestrator.config import RunConfig, load_config
from orchestrator.errors import UserError
from orchestrator.rundir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from workers.data.reader import PackReader
    from workers.pipeline.spec import PipelineSpec


LOAD_ANCHOR = "model.load_state_dict(atoll.load_anchor(RUN_DIR), strict=False) in Python"


def _load(run_dir: Path) -> RunConfig:
    return load_config(RunDir(run_dir).config).config


def _snapshot(run_dir: Path, name: str | None) -> Path:
    from workers.saved import complete_snapshots, newest

    folder, uri = RunDir(run_dir).snapshots, _load(run_dir).run.snapshots
    if uri is not None:
        found = _from_store(uri, run_dir.resolve().name, name, folder)
    else:
        found = folder / name if name is not None else newest(folder)
    if found is None or not found.exists():
        wait = "wait for the first one (run.snapshot_every_s), or for the end of the run"
        known = ", ".join(sorted((path.name for path in complete_snapshots(folder)), key=lambda n: (len(n), n)))
        raise UserError(
            f"{run_dir} has no snapshot{f' {name!r}' if name else ''} of the model" + ("" if known else " yet"),
            place=str(folder) if uri is None else uri,
            remedy=f"one of these: {known}" if known else wait,
        )
    return found


def _from_store(uri: str, run_id: str, name: str | None, folder: Path) -> Path | None:
    """A copy of a snapshot that is kept elsewhere."""
    from workers.snapshot import FETCHED
    from workers.snapshot_store import open_store

    store = open_store(uri, run_id)
    for found, manifest in store.complete():
        if name in (None, found):
            return store.fetch(found, manifest, folder / FETCHED)
    return None


def _reader(config: RunConfig, what: str) -> PackReader:
    """The run's pack, for its tokenizer."""
    from workers.data.reader import PackReader

    pack = pack_path(config)
    if pack is None:
        message = (
            f"a run on data of its own loop (data.samples = {config.data.samples}) has no tokenizer to {what} with"
        )
        raise UserError(message, place="data.samples", remedy=LOAD_ANCHOR)
    return PackReader(pack)


def is_layered(config: RunConfig) -> bool:
    """Whether a run's model is a list of layers of the user's."""
    return config.pipeline.stages is not None and config.model.factory is not None


def load_anchor(run_dir: Path, snapshot: str | None = None) -> dict[str, Tensor]:
    """The trained parameters of a run by name, from its newest or the named snapshot, checked against their digest."""
    config = _load(run_dir)
    if config.pipeline.stages is not None:
        return _of_stages(config, run_dir, snapshot)
    from workers import snapshot as snapshots

    return snapshots.load_anchor(_snapshot(run_dir, snapshot))


def _of_stages(config: RunConfig, run_dir: Path, name: str | None) -> dict[str, Tensor]:
    """The same of a pipeline: its snapshots have a file for each stage."""
    from orchestrator.pipeline.replay import saved_snapshots
    from workers.pipeline.whole import load_whole

    folder = RunDir(run_dir).snapshots
    found = [saved for saved in saved_snapshots(folder) if name in (None, saved.folder.name)]
    if not found:
        raise UserError(
            f"{run_dir} has no snapshot{f' {name!r}' if name else ''} of its stages yet",
            place=str(folder),
            remedy="wait for the first one (run.snapshot_every_s), or for the end of the run",
        )
    return load_whole(_spec(config, run_dir), max(found, key=lambda saved: saved.version).folder)


def _spec(config: RunConfig, run_dir: Path) -> PipelineSpec:
    from orchestrator.pipeline.plan import pipeline_spec

    pack = pack_path(config)
    assert pack is not None, "a pipeline has a pack"
    return pipeline_spec(config, run_id=run_dir.resolve().name, run_dir=run_dir, pack=pack)


def export(run_dir: Path, out: Path, snapshot: str | None = None) -> Path:
    """Write the newest anchor, or that of the named snapshot, to `out`: in Hugging Face format, or as `export_layers`.

    Raises UserError where something else lies there.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file())):
        raise UserError(
            f"--out {out}: there is something else", place="--out", remedy="a new folder, or an older export"
        )
    from workers.model.hf import export_hf, export_layers

    config = _load(run_dir)
    reader = _reader(config, "export")
    tensors = load_anchor(run_dir, snapshot)
    write = export_layers if is_layered(config) else export_hf
    write(out, config.model, tensors, reader.tokenizer, seq_len=reader.index.seq_len)
    return out


def sample(
    run_dir: Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    snapshot: str | None = None,
) -> str:
    """Text that the newest anchor (or the named snapshot) continues `prompt` with."""
    from workers.model.factory import build_model
    from workers.model.sample import generate

    config = _load(run_dir)
    reader = _reader(config, "sample")
    if is_layered(config):
        from workers.pipeline.whole import build_whole

        layered = build_whole(_spec(config, run_dir))
        layered.load_state_dict(load_anchor(run_dir, snapshot), strict=False)
        return generate(layered, reader.tokenizer, prompt, max_new_tokens, temperature, seed)
    bundle = build_model(
        config.model,
        vocab_size=reader.index.vocab_size,
        seq_len=reader.index.seq_len,
        seed=config.train.seed,
        load_init=False,
    )
    anchor = load_anchor(run_dir, snapshot)
    wanted = {name for name, parameter in bundle.model.named_parameters() if parameter.requires_grad}
    if wanted != set(anchor):
        message = "the model of this run was made by its own loop, [model] describes another one"
        raise UserError(message, place=str(run_dir), remedy=LOAD_ANCHOR)
    bundle.model.load_state_dict(anchor, strict=False)
    return generate(bundle.model, reader.tokenizer, prompt, max_new_tokens, temperature, seed)
