"""What a person sees while a run goes on: one line for each evaluation and fault, one live line below."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from orchestrator.config import RunConfig


class Progress:
    """A view of the controller's status; silent with `quiet`."""

    def __init__(self, config: RunConfig, *, quiet: bool) -> None:
        """Nothing is printed before it is entered."""
        self.config, self.quiet = config, quiet
        self._evaluations = -1
        self._members: set[str] = set()
        self._gone: set[str] = set()
        self._first: tuple[float, float] | None = None
        self._live = sys.stdout.isatty() and not quiet
        self._width = 0

    def __enter__(self) -> Self:
        """Say what is about to happen."""
        strategy, islands = self.config.strategy, self.config.run.islands
        steps = "step" if strategy.inner_steps == 1 else f"{strategy.inner_steps} steps"
        self.say(
            f"{islands} {'island' if islands == 1 else 'islands'}, {self.config.train.tokens:,} tokens, "
            f"strategy {strategy.name}, synchronising every {steps} as {self.config.codec.name}"
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
        if self._live:
            line = self._line(status)
            print("\r" + line.ljust(self._width), end="", flush=True)
            self._width = len(line)

    def _line(self, status: dict[str, Any]) -> str:
        """The live line; seconds left are reckoned from the first commit seen here on."""
        seconds, progress, members = status["seconds"], status["progress"], len(status["members"])
        if not progress:
            return f"{seconds:7.1f} s  {members} of {self.config.run.islands} islands are there"
        self._first = self._first or (seconds, progress)
        passed, made = seconds - self._first[0], progress - self._first[1]
        left = f"  {(1 - progress) * passed / made:,.0f} s left" if made > 0 and progress < 1 else ""
        islands = "1 island" if members == 1 else f"{members} islands"
        return f"{seconds:7.1f} s  {100 * progress:5.1f} %  round {status['rounds']}  {islands}{left}"

    def _clear(self) -> None:
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="", flush=True)
            self._width = 0
