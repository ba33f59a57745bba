"""What the command line shows of runs: progress, status, the list, the end of a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from orchestrator.calibration import StepTime, former_step
from orchestrator.cli.main import main
from orchestrator.cli.options import shown
from orchestrator.config import load_config
from orchestrator.errors import UserError
from orchestrator.journal import open_segment
from orchestrator.progress import BAR_WIDTH, Progress
from orchestrator.rundir import create_run_dir
from tests.unit.report.synthetic_run import SyntheticRun


@pytest.fixture
def finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in `runs/` of the current folder, done, with a journal of one row."""
    monkeypatch.chdir(tmp_path)
    path = create_run_dir("demo").path
    SyntheticRun(rounds=6, kill_round=3).write(path)
    open_segment(path, controller="c").close(merge=False)
    return path


def status_of(members: list[str], **values: Any) -> dict[str, Any]:
    numbers = {"seconds": 1.0, "progress": 0.0, "rounds": 0, "tokens": 0, "evaluations": 0, "val_loss": None}
    return {**numbers, "members": {name: {"step_s": 0.0} for name in members}, **values}


def test_progress_tells_of_deaths_and_who_takes_the_place(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("debug", overrides=["run.islands=2", "strategy.inner_steps=10"]).config
    with Progress(config, quiet=False) as progress:
        progress.show(status_of(["island-0.1", "island-1.1"]))
        progress.show(status_of(["island-0.1"], seconds=2.0, evaluations=1, val_loss=5.5))
        progress.show(status_of(["island-0.1", "island-1.2"], seconds=3.0, evaluations=1, val_loss=5.5))
        progress.show(status_of([], seconds=4.0, evaluations=1, val_loss=5.5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("synchronising 35.2 kB every 10 steps as int8; what link that needs is said once")
    assert lines.pop(1) == "2 islands, 40,960 tokens, strategy diloco"
    assert lines[1:3] == ["    1.0 s  island-0.1 joined", "    1.0 s  island-1.1 joined"]
    assert lines[3] == "    2.0 s  island-1.1 is gone; the others train on"
    assert lines[4].endswith("validation loss 5.5000")
    assert lines[5] == "    3.0 s  island-1.2 takes its place"
    assert lines[6:] == ["    4.0 s  island-0.1 is gone", "    4.0 s  island-1.2 is gone"]


def test_the_live_line_says_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Progress(load_config("debug").config, quiet=False) as progress:
        progress.show(status_of([]))
        progress.show(status_of(["island-0.1", "island-1.1"], seconds=10.0, progress=0.2, rounds=4))
        progress.show(status_of(["island-0.1"], seconds=20.0, progress=0.4, rounds=8))
    lines = [line.strip() for line in capsys.readouterr().out.replace("\r", "\n").splitlines()]
    assert "1.0 s  0 of 2 islands are there" in lines
    live = [line.split(maxsplit=3) for line in lines if "round" in line]
    assert [(seconds, rest) for seconds, _, _, rest in live] == [
        ("10.0", "20.0 %  round 4  2 islands"),
        ("20.0", "40.0 %  round 8  1 island  30 s left"),
    ]
    for bar, share in zip([bar for _, _, bar, _ in live], (0.2, 0.4), strict=True):
        assert len(bar) == BAR_WIDTH and bar.count(bar[0]) == round(share * BAR_WIDTH)


def test_progress_says_once_what_link_the_run_needs(capsys: pytest.CaptureFixture[str]) -> None:
    members = ["island-0.1", "island-1.1"]
    config = load_config("debug", overrides=["run.islands=2", "strategy.inner_steps=10"]).config
    with Progress(config, quiet=False) as progress:
        for step_s in ((0.0, 0.0), (0.1, 0.0), (0.1, 0.2), (0.3, 0.3)):  # timed by nobody, one, both
            known = {name: {"step_s": seconds} for name, seconds in zip(members, step_s, strict=True)}
            progress.show(status_of([], seconds=18.0) | {"members": known})
    told = [line for line in capsys.readouterr().out.splitlines() if "needs" in line][1:]
    assert told == ["   18.0 s  synchronising 35.2 kB every 2 s: needs 141 kbit/s at each island"]


def test_the_first_line_says_what_link_is_needed_where_an_earlier_run_has_timed_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["run.islands=2", "strategy.inner_steps=10"]
    config = load_config("debug", overrides=values).config
    others = {
        "smaller": ["train.batch_size=1"],
        "same": ["train.lr=0.5", "train.tokens=5_000"],
        "later": ["run.islands=3"],
    }
    for number, (name, changed) in enumerate(others.items()):
        run_dir = tmp_path / f"{name}-2026-01-0{number + 1}-0000"
        run_dir.mkdir()
        (run_dir / "config.toml").write_text(load_config("debug", overrides=[*values, *changed]).config.to_toml())
        rows = [
            (member, ms) for member, factor in (("island-0", 1), ("island-1", 2)) for ms in (100, 100 * factor, 900)
        ]
        steps = [json.dumps({"kind": "step", "member": m, "step_ms": ms}, separators=(",", ":")) for m, ms in rows]
        (run_dir / "metrics.jsonl").write_text("\n".join([*steps, '{"kind":"step","memb']))
    (tmp_path / "later-2026-01-04-0000").mkdir()
    (tmp_path / "later-2026-01-04-0000" / "config.toml").write_text(config.to_toml())  # it has measured nothing yet
    former = former_step(config, tmp_path)
    assert former is not None and former.run == tmp_path / "same-2026-01-02-0000"
    assert former.seconds == pytest.approx(0.2), "the median of the slower island"
    with Progress(config, quiet=False, step=former):
        first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("synchronising 35.2 kB every 2 s: needs 141 kbit/s at each island (every 10 steps of 0.2 s")
    assert "same-2026-01-02-0000" in first
    assert former_step(config.with_values({"train.threads": 7}), tmp_path) is None


def test_a_guess_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("debug", overrides=["run.islands=2", "strategy.inner_steps=10"]).config
    with Progress(config, quiet=False, step=StepTime(seconds=0.12345, run=None)):
        first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "synchronising 35.2 kB about every 1.2 s: needs about 230 kbit/s at each island "
        "(every 10 steps of about 0.12 s, by a few made here; int8)"
    )


def test_a_run_that_takes_every_place_counts_the_places(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("debug", overrides=["run.islands=1", "run.elastic=true", "strategy.inner_steps=10"]).config
    with Progress(config, quiet=False, places=2):
        said = capsys.readouterr().out
    assert said.startswith("synchronising 35.2 kB every 10 steps")
    assert "\n2 islands, 40,960 tokens, strategy diloco\n" in said


def test_progress_counts_one_as_one_and_is_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("ddp", overrides=["run.islands=1"]).config
    with Progress(config, quiet=False):
        said = capsys.readouterr().out.splitlines()
        assert said == ["synchronising every step as fp32", "1 island, 20,000,000 tokens, strategy ddp"]
    with Progress(config, quiet=True) as progress:
        progress.show(status_of(["island-0.1"]))
    assert capsys.readouterr().out == ""


def test_commands_take_the_newest_run_when_none_is_named(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report"]) == 0
    assert (finished_run / "report.html").is_file()
    main(["ledger"])
    assert "1 row" in capsys.readouterr().out
    artifacts = types.ModuleType("orchestrator.artifacts")
    vars(artifacts).update(export=lambda run, out, snapshot: None, sample=lambda run, *rest: f"of {run.name}")
    monkeypatch.setitem(sys.modules, artifacts.__name__, artifacts)
    assert main(["export", "--out", "x"]) == main(["sample", "--prompt", "a"]) == 0
    exported = f"exported runs/{finished_run.name} to x"
    assert capsys.readouterr().out.splitlines() == [exported, f"of {finished_run.name}"]


def test_status_of_a_run_that_is_over(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"runs/{finished_run.name}: done\n")
    assert "last row" not in out and " left" not in out
    (finished_run / "summary.json").unlink()
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"runs/{finished_run.name}: interrupted\n")
    assert f"go on: atoll train --resume runs/{finished_run.name}" in out


def test_the_list_says_what_each_run_came_to(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    line = capsys.readouterr().out.rstrip("\n")
    assert line.startswith(f"runs/{finished_run.name}  done") and " tokens, validation loss " in line
    assert main(["runs", "--base", "elsewhere"]) == 0
    assert capsys.readouterr().err.startswith("no runs in elsewhere; ")


@pytest.mark.parametrize(("code", "hint"), [(0, "report: "), (1, "why: "), (3, "go on: atoll train --resume")])
def test_a_run_ends_with_what_can_be_done_next(
    code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import orchestrator.launch

    def train(config: Any, path: Path, **options: Any) -> int:
        SyntheticRun(rounds=6, kill_round=3).write(path)
        return code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(orchestrator.launch, "train", train)
    assert main(["train", "debug"]) == code
    lines = capsys.readouterr().out.splitlines()
    name = next((tmp_path / "runs").glob("debug-*")).name
    assert lines[0].startswith(f"starting in runs/{name}; ")
    assert any(line.startswith("validation loss") for line in lines)
    assert lines[-2].startswith(hint) and f"runs/{name}" in lines[-2]
    assert lines[-1] == f"run directory: runs/{name}"


def test_a_run_that_never_began_leaves_nothing_behind(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orchestrator.launch

    def train(config: Any, path: Path, **options: Any) -> int:
        raise UserError("the model cannot be found", remedy="another one")

    monkeypatch.setattr(orchestrator.launch, "train", train)
    assert main(["train", "debug"]) == 2
    assert main(["train", "debug", "--run-dir", "mine"]) == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted([finished_run.name, "latest"])
    assert (tmp_path / "runs" / "latest").resolve() == finished_run.resolve()
    assert not (tmp_path / "mine").exists()


def test_a_damaged_journal_says_its_remedy_once(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = finished_run / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"controller":"c"', '"controller":"d"') + "{}\n{}\n")
    assert main(["status"]) == 2
    error = capsys.readouterr().err
    assert error.count("put back the file from a backup") == 1 and "\n  try:   put back" in error


def test_paths_are_shown_as_one_would_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "a") == Path("runs/a")
    assert shown(Path("/elsewhere/a")) == Path("/elsewhere/a")
    assert shown(Path("runs/a")) == Path("runs/a")
