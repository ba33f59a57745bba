"""The README's commands, run as they are written; `make` and `atoll train` have tests of their own on Ray."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from orchestrator.cli.main import main
from orchestrator.config import load_config
from orchestrator.finish import build_summary
from orchestrator.local import LocalRun
from orchestrator.prepare import prepare
from orchestrator.summary import save_summary
from tests.readme import blocks
from tests.small_run import WORDS, make_pack, small_config


def commands(heading: str, name: str) -> list[list[str]]:
    """The arguments of each `atoll NAME ...` in the blocks of commands below a heading."""
    lines = [shlex.split(line, comments=True) for block in blocks(heading, "") for line in block.splitlines()]
    return [words[1:] for words in lines if words[:2] == ["atoll", name]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(num_lines: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(num_lines)) + "\n"


@pytest.fixture
def sources(here: Path) -> None:
    """What the commands name, some megabytes each: a newcomer's texts, rows, table and tokenizer."""
    (here / "my_texts" / "more").mkdir(parents=True)
    for seed, place in enumerate(("a.txt", "b.md", "more/c.py")):
        (here / "my_texts" / place).write_text(text_of(30_000, seed))
    texts = [text_of(20, seed) for seed in range(2500)]
    (here / "rows.jsonl").write_text("".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(texts)))
    pq.write_table(pa.table({"text": texts, "stars": list(range(len(texts)))}), here / "table.parquet")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(here / "tokenizer.json"))


@pytest.mark.usefixtures("sources")
def test_your_own_data(capsys: pytest.CaptureFixture[str]) -> None:
    packs = commands("Your own data", "data")
    assert len(packs) == 3
    for words in packs:
        assert main(words) == 0, capsys.readouterr().err
        out = words[words.index("--out") + 1]
        assert Path(out).is_dir()
    for words in commands("Your own data", "train"):
        preset = words[1]
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        if preset.endswith(".toml"):
            continue
        prepared = prepare(load_config(preset, overrides=settings).config)
        assert prepared.pack is not None and prepared.pack.resolve() == Path("packs/mine").resolve()


def test_what_you_do_with_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = here / "runs" / "small-2026-01-01-0000"
    run_dir.parent.mkdir()
    run = LocalRun(small_config(make_pack(here), "train.tokens=2560"), run_dir)
    run.start()
    run.run(max_turns=1000)
    (run_dir / "config.toml").write_text(run.config.to_toml())
    save_summary(build_summary(run.host, run.config), run_dir)
    run.close()
    (here / "runs" / "latest").symlink_to(run_dir.name)

    said = {}
    for name in ("status", "ledger", "report", "sample", "export", "runs"):
        (words,) = commands("What you see", name)
        assert main(words) == 0, capsys.readouterr().err
        said[name] = capsys.readouterr().out
    assert "done" in said["status"] and run_dir.name in said["runs"]
    assert said["sample"].startswith("def ")
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert {"model.safetensors", "config.json"} <= {path.name for path in (here / "exported").iterdir()}
