"""What can be found wrong is found before any process starts, by one message, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.cli.main import main
from orchestrator.config import load_config
from orchestrator.prepare import prepare
from tests.small_run import SEQ_LEN, make_pack, small_config
from workers.config import ModelConfig
from workers.data.tokenizers import ByteTokenizer
from workers.model.factory import build_model
from workers.model.hf import export_hf

SHAPE = {"layers": 2, "dim": 32, "heads": 4, "hidden": 64}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a pack in `pack` and a checkpoint that fits it in `start`."""
    monkeypatch.chdir(tmp_path)
    make_pack(tmp_path)
    config = ModelConfig(**SHAPE)  # type: ignore[arg-type]
    model = build_model(config, vocab_size=256, seq_len=SEQ_LEN, seed=1).model
    export_hf(tmp_path / "start", config, dict(model.named_parameters()), ByteTokenizer(), seq_len=SEQ_LEN)
    return tmp_path


def settings(*more: str) -> list[str]:
    own = [
        "data.path=pack",
        "model.init_from=start",
        *(f"model.{k}={v}" for k, v in SHAPE.items()),
    ]
    return [word for setting in (*own, *more) for word in ("--set", setting)]


def without_a_tensor(start: Path) -> None:
    tensors = load_file(start / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})


def other_shape(start: Path) -> None:
    tensors = load_file(start / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})


def other_vocabulary(start: Path) -> None:
    tensors = load_file(start / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.zeros(300, 32)
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    file = start / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 300}))


def garbage(start: Path) -> None:
    (start / "model.safetensors").write_bytes(b"not a checkpoint" * 100)


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Exit code 2, one message on stderr, nothing on stdout, nothing made."""
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert sorted(folder.iterdir()) == before
    return captured.err


def test_what_fits_is_accepted() -> None:
    config = load_config("debug", overrides=settings("run.islands=1")[1::2]).config
    prepared = prepare(config, ["kill:island-0@round=2"])
    assert prepared.pack == Path("pack").resolve() and prepared.config.run.islands == 1
    assert [str(fault) for fault in prepared.faults] == ["kill:island-0@round=2"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, "the tensor 'model.norm.weight' is missing"),
        (other_shape, "'model.norm.weight' has shape (7,), the model needs (32,)"),
        (other_vocabulary, "a vocabulary of 300 tokens, the data pack one of 256"),
        (garbage, "model.safetensors cannot be read as safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_initial_weights_are_looked_at(
    damage: Callable[[Path], None], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "start")
    assert message in refused(["train", "debug", *settings()], folder, capsys)


def test_a_shard_that_is_gone_or_cut_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "pack" / "train-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    message = refused(["train", "debug", *settings()], folder, capsys)
    assert f"shard has {len(data) - 10} bytes, the index says {len(data)}" in message
    shard.unlink()
    assert "train-00000.arrow: shard cannot be read" in refused(["train", "debug", *settings()], folder, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("setting", ["train.device=cuda", "train.per_island.island-1.device=cuda"])
def test_a_device_that_is_not_there(setting: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["train", "debug", *settings(setting, "run.islands=2")], folder, capsys)
    assert "train.device = 'cuda': this process sees 0 CUDA devices" in message


def test_bf16_on_a_processor_without_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    more = settings("train.precision=bf16", "train.device=cpu")
    assert "train.precision = 'bf16' on cpu" in refused(["train", "debug", *more], folder, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "run.islands=1"], "run.islands = 1 is not allowed: the demo kills island-1"),
        (["--set", "data.path=nowhere"], "there is no folder 'nowhere'"),
        (["--set", "train.per_island.island-7.batch_size=2"], "train.per_island.island-7: the run has no"),
    ],
)
def test_the_demo_checks_as_train_does(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["demo", *arguments], folder, capsys)


def test_a_resumed_run_is_checked_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "config.toml").write_text(load_config("debug", overrides=settings()[1::2]).config.to_toml())
    garbage(folder / "start")
    assert main(["train", "--resume", "mine"]) == 2
    assert "cannot be read as safetensors" in capsys.readouterr().err


def test_an_altered_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_dir = make_pack(tmp_path)
    assert main(["data", "verify", str(pack_dir)]) == 0
    assert "is whole" in capsys.readouterr().out
    shard = next(pack_dir.glob("train*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["data", "verify", str(pack_dir)]) == 2
    assert shard.name in capsys.readouterr().err
    with pytest.raises(ValueError, match="its tokens have digest"):
        prepare(small_config(pack_dir))


def test_the_length_of_a_sample_is_that_of_the_pack(tmp_path: Path) -> None:
    pack_dir = make_pack(tmp_path)
    prepared = prepare(small_config(pack_dir))
    assert (prepared.config.data.seq_len, prepared.notes) == (SEQ_LEN, ())
    prepared = prepare(small_config(pack_dir, "data.seq_len=100"))
    assert prepared.config.data.seq_len == SEQ_LEN
    assert len(prepared.notes) == 1 and prepared.notes[0].startswith("data.seq_len = 100 is not used")


def test_on_a_cluster_the_islands_follow_its_machines(tmp_path: Path) -> None:
    run = prepare(small_config(make_pack(tmp_path), "run.islands=auto", "run.address=10.0.0.1:6379")).config.run
    assert (run.islands, run.elastic) == (1, True)
    run = prepare(small_config(make_pack(tmp_path), "run.islands=3", "run.address=10.0.0.1:6379")).config.run
    assert (run.islands, run.elastic) == (3, False)


def test_a_plain_run_is_checked_without_importing_torch_or_ray(folder: Path) -> None:
    """Its driver would pay seconds for it at every start; islands import torch themselves."""
    script = (
        "import sys\n"
        "from orchestrator import prepare\n"
        "from orchestrator.config import load_config\n"
        "prepare._may_have_gpu = lambda: False\n"
        "config = load_config('demo', overrides=['data.path=pack', 'data.seq_len=16']).config\n"
        "prepared = prepare.prepare(config, ['kill:island-1@round=15'])\n"
        "assert prepared.pack is not None and prepared.faults\n"
        "sys.exit(' '.join(sorted({'torch', 'ray'} & sys.modules.keys())) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
