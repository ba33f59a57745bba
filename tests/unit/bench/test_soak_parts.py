"""What a soak keeps while it goes on, and how it goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import soak
from benchmarks.soak import Part, Progress


def part(run: str, minutes: float, *verdicts: str) -> Part:
    return Part(run=run, minutes=minutes, rounds=int(10 * minutes), false_verdicts=verdicts, slow=())


def run_main(folder: Path, *words: str, ends_with: tuple[str, ...] = ()) -> tuple[int, list[float], dict[str, object]]:
    """The exit code, the minutes that were soaked, and the result that was kept."""
    asked: list[float] = []
    kept: dict[str, object] = {}

    def fake(minutes: float, run_dir: Path, said: object) -> Part:
        asked.append(minutes)
        run_dir.mkdir(parents=True)
        done = part(run_dir.name, minutes, *ends_with)
        said(done)  # type: ignore[operator]
        return done

    with (
        mock.patch.object(soak, "soak", fake),
        mock.patch.object(soak, "keep", lambda name, result: kept.update(result)),
        mock.patch.object(soak, "show", lambda name, result: kept.update(result)),
        mock.patch("sys.argv", ["soak", "--folder", str(folder), *words]),
    ):
        code = soak.main()
    return code, asked, kept


def test_an_interrupted_soak_goes_on_for_the_minutes_that_are_left(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.next_run().mkdir(parents=True)
    for minutes in (1.0, 2.0, 12.0):
        progress.add(part("part-1", minutes))
    with progress.file.open("a") as file:
        file.write('{"code": "cut o')  # killed while it wrote
    code, asked, kept = run_main(tmp_path)
    assert (code, asked) == (0, [18.0])
    assert (kept["minutes"], kept["longest_without_interruption"], kept["rounds"]) == (30.0, 18.0, 300)
    assert run_main(tmp_path)[:2] == (0, []), "it is done"
    assert run_main(tmp_path, "--again")[:2] == (0, [30.0])


def test_a_false_verdict_stays_until_the_code_is_another(tmp_path: Path) -> None:
    assert run_main(tmp_path, "--minutes", "5", ends_with=("3.0 s: island-1 suspect: silent",))[0] == 5
    code, asked, kept = run_main(tmp_path, "--minutes", "5")
    assert (code, asked) == (5, [])
    assert kept["false_verdicts"] == ["part-1: 3.0 s: island-1 suspect: silent"]
    with mock.patch.object(soak, "code_digest", lambda: "another"):
        assert run_main(tmp_path, "--minutes", "5")[:2] == (0, [5.0])


@pytest.mark.parametrize("minutes", [0.5, 2.0])
def test_lines_name_their_code(tmp_path: Path, minutes: float) -> None:
    progress = Progress(tmp_path)
    progress.add(part("part-1", minutes))
    (line,) = progress.file.read_text().splitlines()
    assert json.loads(line)["code"] == progress.code
    assert progress.read() == [part("part-1", minutes)]
