"""What is known of a model that is given as a list of layers, without building it again (no torch).

Made once (`describe_layers`), kept in the run's directory: the controller and every process cut the same list.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from strategies.swarm import LayerCost

FILE_NAME = "layers.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """One layer. `shapes`: of its parameters, by name in the layer; the figures are of one sample.

    `out_values`: what goes to the next layer; `saved_bytes`: what the backward needs of the forward; `seconds`: forward
    and backward, 0 where it was not measured.
    """

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    out_values: int
    saved_bytes: int
    seconds: float = 0.0

    @property
    def num_params(self) -> int:
        """Values of all parameters."""
        return sum(math.prod(shape) for _, shape in self.shapes)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """The layers in their order. `is_decoder`: of the built-in model, whose parameters have other names."""

    rows: tuple[LayerRow, ...]
    is_decoder: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter of the whole model -> shape."""
        return {f"{row.name}.{local}": shape for row in self.rows for local, shape in row.shapes}

    def costs(self) -> list[LayerCost]:
        """For `split_layers`."""
        return [LayerCost(name=row.name, num_params=row.num_params, seconds=row.seconds) for row in self.rows]

    @property
    def boundary_values(self) -> int:
        """Values of the widest tensor that may cross a boundary."""
        return max((row.out_values for row in self.rows[:-1]), default=0)

    def write(self, run_dir: Path) -> None:
        """Keep it in a run's directory."""
        (run_dir / FILE_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_table(run_dir: Path) -> LayerTable | None:
    """The table of a run; None where its model is the built-in one, cut by parameters."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(
        LayerRow(**{**row, "shapes": tuple((name, tuple(shape)) for name, shape in row["shapes"])})
        for row in found["rows"]
    )
    return LayerTable(rows=rows, is_decoder=found["is_decoder"])
