"""How long an inner step will take, found while Ray starts: by an earlier run, or else by a few steps made here."""

from __future__ import annotations

import logging
import threading
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.build import num_cores, num_islands
from orchestrator.calibration import StepTime, former_step

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

WAIT_S = 0.5  # for what is not known when the first line is due: the line is worth no more

log = logging.getLogger("atoll")


class StepGuess:
    """Looks on a thread of its own, which imports torch for it as well: the islands need the processors afterwards."""

    def __init__(self, config: RunConfig, pack: Path | None, runs: Path) -> None:
        """Nothing is looked for before `start`. `pack`: of the run; `runs`: where earlier ones are."""
        self._config, self._pack, self._runs = config, pack, runs
        self._found: StepTime | None = None
        self._thread = threading.Thread(target=self._look, name="step-guess", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def result(self, wait_s: float = WAIT_S) -> StepTime | None:
        """What is known by now, or in a moment; None: it is said once the run's own steps are timed."""
        self._thread.join(wait_s)
        return self._found

    def _look(self) -> None:
        import_module("strategies.registry")  # what the first line reckons with
        if self._config.pipeline.stages is not None:
            return
        former = former_step(self._config, self._runs)
        self._found = former if former is not None else time_here(self._config, self._pack)


def time_here(config: RunConfig, pack: Path | None) -> StepTime | None:
    """A step as this machine makes it now, if its islands are all alike, train here, and on its processors."""
    train = config.train
    own = config.model.factory is not None or train.loop is not None or pack is None
    if own or config.run.address is not None or train.per_island or train.fit_batch or train.pace_s:
        return None
    from workers.data.index import load_index
    from workers.device import resolve_device
    from workers.model.errors import ModelError
    from workers.step_timing import time_step

    assert pack is not None
    index = load_index(pack)
    try:
        if resolve_device(train.device).type != "cpu":
            return None
        step_s = time_step(config.model, train, vocab_size=index.vocab_size, seq_len=index.seq_len)
    except ModelError as error:  # an island says it with a place and a remedy
        log.debug("no step was timed: %s", error)
        return None
    if step_s is None:
        return None
    return StepTime(seconds=step_s * crowding(num_islands(config), train.threads, num_cores()), run=None)


def crowding(islands: int, threads: int, cores: int) -> float:
    """How much longer a step takes where more threads want to compute than there are processors."""
    return max(islands * threads / cores, 1.0)
