"""What the controller hands to a dashboard, and what a dashboard may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.records import Row, dump_row, load_row

MOST_BYTES = 1 << 20
MOST_ROWS = 400
ACTIONS = ("drain", "pause", "resume", "save", "stop", "kill")
OF_A_MEMBER = frozenset({"drain", "kill"})
NEEDED: Mapping[str, str] = {"drain": "leave"}
"""Methods of the controller that have other names than the actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedPart:
    """What came since the last question.

    `config`: with the first part only, else empty. `able`: actions that this controller knows. `ended`: why the run is
    over. `pipeline`: `metrics` are lines of `pipeline.jsonl`, steps of all stages.
    """

    run_id: str
    config: dict[str, Any]
    metrics: bytes
    rows: tuple[Row, ...]
    view: dict[str, Any] | None
    able: tuple[str, ...]
    ended: str
    pipeline: bool = False

    @property
    def is_full(self) -> bool:
        """Whether there is probably more."""
        return len(self.metrics) > MOST_BYTES // 2 or len(self.rows) == MOST_ROWS


def read_part(path: Path, start: int, most: int = MOST_BYTES) -> bytes:
    """Whole lines of a growing file from byte `start` on; nothing where it does not exist yet."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(most)
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def part_to_json(part: FeedPart) -> dict[str, Any]:
    """The same as JSON values, for the way through a door."""
    return {
        "run_id": part.run_id,
        "config": part.config,
        "metrics": part.metrics.decode("latin-1"),  # of any bytes, and back
        "rows": [dump_row(row).decode() for row in part.rows],
        "view": part.view,
        "able": list(part.able),
        "ended": part.ended,
        "pipeline": part.pipeline,
    }


def part_from_json(values: Mapping[str, Any]) -> FeedPart:
    """The other direction."""
    return FeedPart(
        run_id=values["run_id"],
        config=values["config"],
        metrics=values["metrics"].encode("latin-1"),
        rows=tuple(load_row(line.encode()) for line in values["rows"]),
        view=values["view"],
        able=tuple(values["able"]),
        ended=values["ended"],
        pipeline=values["pipeline"],
    )
