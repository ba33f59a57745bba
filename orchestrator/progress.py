"""What a person sees while a run goes on: one line for each evaluation and fault, one live line below."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from orchestrator.calibration import StepTime
    from orchestrator.config import RunConfig


BAR_WIDTH = 24


class Progress:
    """A view of the controller's status; silent with `quiet`."""

    def __init__(
        self, config: RunConfig, *, quiet: bool, places: int | None = None, step: StepTime | None = None
    ) -> None:
        """Nothing is printed before it is entered.

        `places`: of the cluster, all of which an elastic run takes. `step`: how long one takes, if that is known.
        """
        self.config, self.quiet, self._step = config, quiet, step
        elastic = config.run.elastic and places is not None
        self._expected = max(places or 0, 1) if elastic else config.run.islands
        self._evaluations = -1
        self._members: set[str] = set()
        self._gone: set[str] = set()
        self._first: tuple[float, float] | None = None
        self._live = sys.stdout.isatty() and not quiet
        self._width = 0
        self._paced = False
        self._told = ""

    def __enter__(self) -> Self:
        """Say what is about to happen."""
        if self.config.pipeline.stages is not None:
            self.say(self._pipeline())
            return self
        self.say(self._what_is_sent())
        islands = self._expected
        self.say(
            f"{islands} {'island' if islands == 1 else 'islands'}, {self.config.train.tokens:,} tokens, "
            f"strategy {self.config.strategy.name}"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal on a fresh line."""
        self._clear()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self._clear()
            print(text, flush=True)

    def show(self, status: dict[str, Any]) -> None:
        """The newest status."""
        members = set(status["members"])
        for gone in sorted(self._members - members):
            self._gone.add(gone.rpartition(".")[0])
            left = gone.partition(".")[0] in status.get("left", ())
            what = "has left" if left else "is gone"
            self.say(f"{status['seconds']:7.1f} s  {gone} {what}{'; the others train on' if members else ''}")
        for new in sorted(members - self._members):
            again = new.rpartition(".")[0] in self._gone
            self.say(f"{status['seconds']:7.1f} s  {new} {'takes its place' if again else 'joined'}")
        self._members = members
        if status["evaluations"] > max(self._evaluations, 0):
            self._evaluations = status["evaluations"]
            loss = status["val_loss"]
            self.say(
                f"{status['seconds']:7.1f} s  {100 * status['progress']:5.1f} %  round {status['rounds']:4d}  "
                f"{status['tokens']:>12,} tokens" + ("" if loss is None else f"  validation loss {loss:.4f}")
            )
        if told := status.get("metrics", ""):
            if told != self._told:
                self.say(told)
            self._told = told
        self._say_pace(status)
        if self._live:
            line = self._line(status)
            print("\r" + line.ljust(self._width), end="", flush=True)
            self._width = len(line)

    def _pipeline(self) -> str:
        """What a pipeline is made of."""
        pipeline = self.config.pipeline
        return (
            f"{pipeline.stages} stages, {pipeline.num_peers} peers, {pipeline.trainers} "
            f"{'trainer' if pipeline.trainers == 1 else 'trainers'}, {self.config.train.tokens:,} tokens, steps of "
            f"{pipeline.microbatches} microbatches of {pipeline.microbatch_size} samples, boundaries as "
            f"{pipeline.boundary}"
        )

    def _what_is_sent(self) -> str:
        """What one island sends, how often, and what link that needs, as far as it is known before anything runs."""
        if self.quiet:
            return ""
        from orchestrator.planning import round_bytes, sentence
        from orchestrator.quantities import show_bytes, show_seconds

        islands, strategy, codec = self._expected, self.config.strategy, self.config.codec.name
        num = round_bytes(self.config, num_islands=islands) if isinstance(islands, int) else None
        steps = "step" if strategy.inner_steps == 1 else f"{strategy.inner_steps} steps"
        if num is None:
            return f"synchronising every {steps} as {codec}"
        if self._step is None:
            later = "what link that needs is said once steps are timed"
            return f"synchronising {show_bytes(num)} every {steps} as {codec}; {later}"
        step_s, run = self._step.seconds, self._step.run
        seconds = strategy.inner_steps_at(1.0) * step_s
        if run is None:
            how = f"every {steps} of about {show_seconds(float(f'{step_s:.2g}'))}, by a few made here; {codec}"
            return f"{sentence(num, seconds, about=True)} ({how})"
        return f"{sentence(num, seconds)} (every {steps} of {show_seconds(step_s)}, as in {run.name}; {codec})"

    def _say_pace(self, status: dict[str, Any]) -> None:
        """As soon as every island has timed its steps: what link the run needs, as the planner reckons it."""
        from orchestrator.planning import round_bytes, sentence

        if self.config.pipeline.stages is not None or self._paced or self.quiet:
            return
        steps_s = [member["step_s"] for member in status["members"].values()]
        if len(steps_s) < 2 or min(steps_s) <= 0:
            return
        self._paced = True
        num = round_bytes(self.config, num_islands=len(steps_s), num_params=status.get("params"))
        if num is not None:
            seconds = self.config.strategy.inner_steps_at(1.0) * max(steps_s)
            self.say(f"{status['seconds']:7.1f} s  {sentence(num, seconds)}")

    def _line(self, status: dict[str, Any]) -> str:
        """The live line; seconds left are reckoned from the first commit seen here on."""
        seconds, progress, members = status["seconds"], status["progress"], len(status["members"])
        if not progress:
            what = "processes" if self.config.pipeline.stages is not None else "islands"
            return f"{seconds:7.1f} s  {members} of {self._expected} {what} are there"
        self._first = self._first or (seconds, progress)
        passed, made = seconds - self._first[0], progress - self._first[1]
        left = f"  {(1 - progress) * passed / made:,.0f} s left" if made > 0 and progress < 1 else ""
        if self.config.pipeline.stages is not None:
            loss = f"  loss {status['loss']:.4f}" if status["loss"] is not None else ""
            return (
                f"{seconds:7.1f} s  {_bar(progress)} {100 * progress:5.1f} %  step {status['rounds']}  "
                f"{members} processes{loss}{left}"
            )
        islands = "1 island" if members == 1 else f"{members} islands"
        return f"{seconds:7.1f} s  {_bar(progress)} {100 * progress:5.1f} %  round {status['rounds']}  {islands}{left}"

    def _clear(self) -> None:
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="", flush=True)
            self._width = 0


def _bar(share: float) -> str:
    """How much is done, in a terminal that may know no other characters than ASCII's."""
    full, empty = ("━", "╌") if "utf" in (sys.stdout.encoding or "").lower() else ("#", ".")
    done = round(BAR_WIDTH * min(max(share, 0.0), 1.0))
    return full * done + empty * (BAR_WIDTH - done)
