"""Pacing: background transfers use a share of the link only, so that heartbeats and exchanges never wait behind them.

Pure but for `Pacer`'s lock: the clock is passed in. A fetch that is marked as background (a joiner's state, later a
buddy's copy) carries the most that its reader's line should be filled with; the server keeps to that and to the share
of its own line, whichever is less, in small batches. What a line carries is configured (`exchange.link_bytes_per_s`)
or measured: the quickest of the last foreground transfers that were large enough to say something.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

MIN_MEASURED_BYTES = 1 << 20
"""Transfers below this say more about the delay of a link than about its rate."""

KEPT_MEASUREMENTS = 8
BATCH_S = 0.02
MIN_BATCH_BYTES = 16 << 10


class TokenBucket:
    """Admits `bytes_per_s` on average, `burst_s` of it at once. The clock is the caller's."""

    def __init__(self, *, bytes_per_s: float, burst_s: float = BATCH_S) -> None:
        """Full at the start."""
        if bytes_per_s <= 0 or burst_s < 0:
            raise ValueError(f"bytes_per_s = {bytes_per_s} must be above 0, burst_s = {burst_s} not negative")
        self.bytes_per_s, self.burst_s = bytes_per_s, burst_s
        self._paid_until_s = float("-inf")

    def take(self, num_bytes: int, now: float) -> float:
        """Take `num_bytes` out; returns how many seconds from now on they may be sent."""
        start_s = max(self._paid_until_s, now - self.burst_s)
        self._paid_until_s = start_s + num_bytes / self.bytes_per_s
        return max(start_s - now, 0.0)


class Pacer:
    """One token bucket for many threads, whose rate may change between two calls."""

    def __init__(self, rate: Callable[[], float], clock: Callable[[], float]) -> None:
        """`rate`: bytes a second at this moment, 0 = no limit."""
        self._rate, self._clock = rate, clock
        self._lock = threading.Lock()
        self._bucket: TokenBucket | None = None

    def delay(self, num_bytes: int) -> float:
        """Seconds until `num_bytes` may be sent; they count as sent from now on."""
        with self._lock:
            rate = self._rate()
            if rate <= 0:
                self._bucket = None
                return 0.0
            if self._bucket is None:
                self._bucket = TokenBucket(bytes_per_s=rate)
            self._bucket.bytes_per_s = rate
            return self._bucket.take(num_bytes, self._clock())


class SpeedMeter:
    """What a line carries, bytes a second: the quickest of the last transfers; 0 before there was one."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=KEPT_MEASUREMENTS)

    def add(self, num_bytes: int, seconds: float) -> None:
        """A transfer was done; small ones are not looked at."""
        if num_bytes >= MIN_MEASURED_BYTES and seconds > 0:
            self._rates.append(num_bytes / seconds)

    def heard(self, bytes_per_s: float) -> None:
        """A peer says how quickly it was served."""
        if bytes_per_s > 0:
            self._rates.append(bytes_per_s)

    @property
    def bytes_per_s(self) -> float:
        """The quickest of the last transfers."""
        return max(self._rates, default=0.0)


def batch_bytes_at(bytes_per_s: float, most: int) -> int:
    """Size of one batch at a rate: it occupies the line for `BATCH_S`, so that what comes behind it waits no longer."""
    return most if bytes_per_s <= 0 else max(min(int(bytes_per_s * BATCH_S), most), min(MIN_BATCH_BYTES, most))


class LinkShare:
    """How much of one member's line background transfers may use."""

    def __init__(self, *, share: float, bytes_per_s: float | None = None) -> None:
        """`share` of `bytes_per_s`, or of what is measured where that is None."""
        if not 0 < share <= 1:
            raise ValueError(f"link_share = {share}: above 0, at most 1")
        self.share, self.configured = share, bytes_per_s
        self.meter = SpeedMeter()

    def limit(self) -> float:
        """Bytes a second; 0 = nothing is configured and nothing was measured yet: no limit."""
        return self.share * (self.meter.bytes_per_s if self.configured is None else self.configured)
