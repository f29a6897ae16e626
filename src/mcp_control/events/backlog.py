"""What waits for somebody who follows facts: bounded, in order, and merged where only the newest matters."""

from typing import Final

import msgspec

from mcp_control.kernel.changes import StoredFact

# Notices of which only the newest matters to somebody who is behind; the lines and figures themselves are read elsewhere.
_REPLACEABLE: Final = ("progressed", "logged")


class Batch(msgspec.Struct, frozen=True):
    """What a subscriber gets at once, in order.

    Attributes:
        facts: those that match; may be empty when `reread` is set.
        reread: facts before these were dropped because the subscriber was too slow: read the current state.
        after: the cursor that goes on after this batch, also past facts that did not match.
    """

    facts: list[StoredFact]
    reread: bool
    after: int


class Backlog:
    """Facts that wait. Progress and log notices of one thing replace each other; a change of state is never left out silently.

    Args:
        seen: facts up to this one were looked at.
        limit: entries that may wait; one more empties the backlog, and `reread` says so.
    """

    __slots__ = ("_limit", "_reread", "_waiting", "seen")

    def __init__(self, seen: int, limit: int) -> None:
        self.seen = seen
        self._limit = limit
        self._waiting: dict[object, StoredFact] = {}
        self._reread = False

    def __bool__(self) -> bool:
        return self._reread or bool(self._waiting)

    @property
    def half_full(self) -> bool:
        """Whether it should be emptied soon."""
        return len(self._waiting) * 2 > self._limit

    def offer(self, stored: StoredFact) -> bool:
        """Take a fact that matches; False for one that was seen before."""
        if stored.seq <= self.seen:
            return False
        self.seen = stored.seq
        fact = stored.fact
        key: object = stored.seq
        if fact.type.endswith(_REPLACEABLE):
            key = (fact.type, fact.subject)
            self._waiting.pop(key, None)  # goes to the end, so that the order stays that of the facts
        elif len(self._waiting) >= self._limit:
            self._waiting.clear()
            self._reread = True
        if len(self._waiting) < self._limit:
            self._waiting[key] = stored
        return True

    def add(self, batch: Batch) -> None:
        """Take what somebody else was to get."""
        self._reread = self._reread or batch.reread
        for stored in batch.facts:
            self.offer(stored)

    def look(self, newest: int) -> Batch:
        """Return all that waits, and leave it there; `newest` is the last fact that was offered to anybody."""
        # Once all that waited is out, everything up to the newest fact was looked at.
        return Batch([*self._waiting.values()], self._reread, max(self.seen, newest))

    def take(self, newest: int, most: int | None = None) -> Batch | None:
        """Take out all that waits, or the first `most` facts; None where nothing waits."""
        if not self:
            return None
        batch = self.look(newest)
        if most is not None and len(batch.facts) > most:
            self._waiting = dict([*self._waiting.items()][most:])
            batch = Batch(batch.facts[:most], batch.reread, batch.facts[most - 1].seq)
        else:
            self._waiting = {}
        self._reread = False
        return batch

    def clear(self) -> None:
        """Drop what waits: nobody follows any more."""
        self._waiting.clear()
        self._reread = False
