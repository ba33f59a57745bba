"""Members speak until their process ends: what comes when the files are closed ends nobody."""

from __future__ import annotations

from pathlib import Path

from orchestrator.local import LocalRun
from tests.small_run import make_pack, small_config
from workers.messages import Envelope


def test_what_is_said_after_the_end_is_not_heard(tmp_path: Path) -> None:
    run = LocalRun(small_config(make_pack(tmp_path)), tmp_path / "run")
    heard: list[Envelope] = []
    receive = run.host.receive
    run.host.receive = lambda envelope: (heard.append(envelope), receive(envelope))[1]  # type: ignore[method-assign]
    run.start()
    finish = run.run()
    assert finish is not None and finish.reason == "done"
    run.close()
    rows = len(run.host.journal.rows)
    for envelope in heard[-20:]:
        run.host.receive(envelope)
    assert len(run.host.journal.rows) == rows
