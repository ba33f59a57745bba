"""Where a dashboard's book is filled from: the files of a run here, its controller in `ray_source.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from orchestrator.dashboard.book import About, RunBook
from orchestrator.dashboard.deputy import Deputy
from orchestrator.dashboard.feed import MOST_BYTES, read_part
from orchestrator.errors import UserError
from orchestrator.pipeline.figures import FILE_NAME as PIPELINE
from orchestrator.rundir import RunDir, read_json
from orchestrator.segments import link_problem, read_run, segment_paths
from workers.records import Row, load_row


class Source(Protocol):
    """Fills `book`, a little with each call; calls come from one thread at a time."""

    book: RunBook

    def refresh(self) -> bool:
        """Take what is new; whether there is more already."""
        ...

    def able(self) -> tuple[str, ...]:
        """Actions that can be asked for."""
        ...

    def act(self, action: str, member: str, by: str) -> str:
        """Ask for an action; returns what came of it."""
        ...

    def close(self) -> None:
        """Nobody asks any more."""
        ...


class FileSource:
    """A run read from its directory, finished or going on; while it goes on, its controller is asked for actions."""

    def __init__(self, run_dir: Path, *, chaos: bool = False) -> None:
        """Nothing is read before `refresh`. `chaos`: members may be killed. Raises UserError where there is no run."""
        self.run_dir = RunDir(run_dir)
        self.deputy = Deputy(self.run_dir, chaos=chaos)
        if not self.run_dir.config.exists():
            raise UserError(
                f"{run_dir} is no run directory: it has no config.toml", place=str(run_dir), remedy="atoll runs"
            )
        self.book = RunBook()
        self._begin()

    def _begin(self) -> None:
        self.book = RunBook()
        self.book.about = About(run_id=self.run_dir.path.resolve().name)
        self._metrics_at = self._pipeline_at = 0
        self._segments: tuple[str, ...] = ()
        self._journal_at = 0
        self._last: Row | None = None
        try:
            from orchestrator.config import load_config

            self.book.about.config = load_config(self.run_dir.config).config.to_tables()
        except UserError as error:
            self.book.problem = f"the configuration cannot be read: {error.message}"

    def able(self) -> tuple[str, ...]:
        """What its controller can be asked for, while there is one."""
        about = self.book.about
        return self.deputy.able() if about.state == "running" else ()

    def act(self, action: str, member: str, by: str) -> str:
        """See `Source`."""
        return self.deputy.act(action, member, by)

    def close(self) -> None:
        """See `Source`."""
        self.deputy.close()

    def refresh(self) -> bool:
        """See `Source`. Raises JournalError where the journal contradicts itself."""
        metrics = self.run_dir.metrics
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < self._metrics_at:
            self._begin()  # another file took its place
        data = read_part(metrics, self._metrics_at)
        self._metrics_at += len(data)
        more = self._read_journal()  # first, so that the totals of a commit are there with its row
        if data:
            self.book.add_metrics(data)
        steps = read_part(self.run_dir.path / PIPELINE, self._pipeline_at)
        if steps:
            self._pipeline_at += len(steps)
            self.book.add_pipeline(steps)
        self._look()
        return more or max(len(data), len(steps)) > MOST_BYTES // 2

    def _look(self) -> None:
        about = self.book.about
        state = self.run_dir.state()
        if state != about.state:
            about.state, self.book.version = state, self.book.version + 1
        if about.summary is None and state not in ("running", "interrupted"):
            about.summary = dict(read_json(self.run_dir.summary)) or None

    # ------------------------------------------------------------ journal

    def _read_journal(self) -> bool:
        paths = segment_paths(self.run_dir.path)
        names = tuple(path.name for path in paths)
        if not paths:
            return False
        if self._last is not None and names != self._segments:
            self._read_again(names)  # a later controller, or a merge of the segments
            return False
        self._segments = names
        if len(paths) > 1 and self._last is None:
            self._read_again(names)
            return False
        return self._read_on(paths[-1])

    def _read_on(self, path: Path) -> bool:
        """The newest segment from where it was read to; space behind its end may be reserved and zero."""
        data = read_part(path, self._journal_at)
        hole = data.find(b"\0")
        if hole >= 0:
            data = data[: data.rfind(b"\n", 0, hole) + 1]
        rows: list[Row] = []
        for line in data.splitlines():
            row = load_row(line)
            if link_problem(self._last, row) is not None:
                self._read_again(self._segments)
                return False
            rows.append(row)
            self._last = row
        self._journal_at += len(data)
        if rows:
            self.book.add_records(rows)
        return len(data) > MOST_BYTES // 2

    def _read_again(self, names: tuple[str, ...]) -> None:
        """All segments as one history; what is known already is kept if it is a part of it."""
        history = read_run(self.run_dir.path)
        rows, num = history.rows, self.book.num_rows
        if num > len(rows) or (num and self._last is not None and rows[num - 1].hash != self._last.hash):
            self._begin()
            num = 0
        self.book.add_records(rows[num:])
        if rows:
            piece, self._last = history.pieces[-1], rows[-1]
            data = piece.path.read_bytes() if piece.path.exists() else b""
            lines = data.split(b"\n", len(rows) - piece.first_seq)
            self._journal_at = len(data) - len(lines[-1])
        self._segments = names
