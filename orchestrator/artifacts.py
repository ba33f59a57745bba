"""The trained model of a run: samples and exports, from its snapshots."""

from __future__ import annotations

from pathlib import Path

from orchestrator.build import pack_path
from orchestrator.config import RunConfig, load_config
from orchestrator.errors import UserError
from orchestrator.rundir import RunDir


def _load(run_dir: Path) -> RunConfig:
    return load_config(RunDir(run_dir).config).config


def _snapshot(run_dir: Path, name: str | None) -> Path:
    from workers.snapshot import newest

    folder = RunDir(run_dir).snapshots
    found = folder / name if name is not None else newest(folder)
    if found is None or not found.exists():
        raise UserError(
            f"{run_dir} has no snapshot{f' {name!r}' if name else ''} of the model yet",
            place=str(folder),
            remedy="wait for the first one (run.snapshot_every_s), or for the end of the run",
        )
    return found


def export(run_dir: Path, out: Path) -> Path:
    """Write the newest anchor in Hugging Face format to `out`."""
    from workers.data.reader import PackReader
    from workers.model.hf import export_hf
    from workers.snapshot import load_anchor

    config = _load(run_dir)
    reader = PackReader(pack_path(config))
    tensors = load_anchor(_snapshot(run_dir, None))
    export_hf(out, config.model, tensors, reader.tokenizer, seq_len=reader.index.seq_len)
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
    from workers.data.reader import PackReader
    from workers.model.factory import build_model
    from workers.model.sample import generate
    from workers.snapshot import load_anchor

    config = _load(run_dir)
    reader = PackReader(pack_path(config))
    bundle = build_model(
        config.model,
        vocab_size=reader.index.vocab_size,
        seq_len=reader.index.seq_len,
        seed=config.train.seed,
        load_init=False,
    )
    anchor = load_anchor(_snapshot(run_dir, snapshot))
    bundle.model.load_state_dict(anchor, strict=False)
    return generate(bundle.model, reader.tokenizer, prompt, max_new_tokens, temperature, seed)
