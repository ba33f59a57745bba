"""A machine that does not see the run directory keeps its files in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.island_actor import own_run_dir


def test_the_run_directory_where_it_is_seen_and_a_folder_of_the_machine_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "runs" / "here-1").mkdir(parents=True)
    assert own_run_dir(tmp_path / "runs" / "here-1") == tmp_path / "runs" / "here-1"
    assert own_run_dir(tmp_path / "runs" / "there-2") == tmp_path / "state" / "runs" / "there-2"
    assert not (tmp_path / "runs" / "there-2").exists()
