"""When to leave Redis alone: a circuit breaker that decides and does nothing else (Nygard, "Release It!", chapter 5)."""

from typing import Final, Literal

from mcp_control.kernel.clock import Clock

BreakerState = Literal["closed", "open", "half-open"]
_FAILURES: Final = 3
_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 5.0


class Breaker:
    """Opens after three failures in a row; then one probe after 1 s, and after each that fails a longer pause, up to 5 s.

    Calls are allowed while it is closed only: nobody's call is the probe, so nobody waits for a Redis that hangs.

    Attributes:
        state: `closed` (calls go through), `open` (they do not), `half-open` (a probe is under way).
        since: wall milliseconds at which it last left or came back to `closed`.
        failures: failed calls in a row.
        opened: how often it opened.
        refused: calls that were not allowed.
    """

    def __init__(
        self, clock: Clock, *, failures: int = _FAILURES, pause: float = _PAUSE, longest: float = _LONGEST_PAUSE
    ) -> None:
        self._clock = clock
        self._threshold = failures
        self._first_pause = pause
        self._longest = longest
        self._pause = pause
        self._probe_at = 0.0
        self.state: BreakerState = "closed"
        self.since = clock.now()
        self.failures = 0
        self.opened = 0
        self.refused = 0

    def allows(self) -> bool:
        """Say whether a call may be made; one that may not is counted."""
        if self.state == "closed":
            return True
        self.refused += 1
        return False

    def succeeded(self) -> None:
        """Hear of a call that succeeded. One that was made before it opened changes nothing."""
        if self.state == "closed":
            self.failures = 0

    def failed(self) -> bool:
        """Hear of a call that failed or took too long; return whether this opened it."""
        self.failures += 1
        if self.state != "closed" or self.failures < self._threshold:
            return False
        self.state = "open"
        self.since = self._clock.now()
        self.opened += 1
        self._pause = self._first_pause
        self._probe_at = self._clock.monotonic() + self._pause
        return True

    def wait(self) -> float:
        """Return the seconds until the next probe is due."""
        return max(0.0, self._probe_at - self._clock.monotonic())

    def probe(self) -> bool:
        """Begin the probe if it is open and the probe is due; False: do not."""
        if self.state != "open" or self.wait() > 0:
            return False
        self.state = "half-open"
        return True

    def probed(self, success: bool) -> None:
        """Hear how the probe went: it closes, or opens for longer."""
        if self.state != "half-open":
            return
        if success:
            self.state = "closed"
            self.since = self._clock.now()
            self.failures = 0
        else:
            self.state = "open"
            self._pause = min(self._pause * 2, self._longest)
            self._probe_at = self._clock.monotonic() + self._pause
