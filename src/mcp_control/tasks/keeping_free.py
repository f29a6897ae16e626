"""Keeps room free for tasks that take more than a slot: small ones must not overtake them for ever on a busy agent.

A task that takes several slots, or memory, cores or a GPU, waits until so much is free at once; what takes less always finds room before.
So once the first of a lane has found no room for a second, one session that could do it keeps free what it needs: what comes after it by
rank gets only what is left beyond that. What comes before it goes first, as everywhere, and all other sessions go on as they are. The
wait is bounded: by that second, by what has an earlier rank (which ageing bounds), and by the tasks that the session had in hand.

Lanes of one-slot tasks without resources never keep anything, and cost nothing.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from mcp_control.agents.reserving import Load, lacking, leaves
from mcp_control.agents.sessions import Session
from mcp_control.tasks.lanes import Lane

PATIENCE: Final = 1.0  # seconds

_SLOT: Final = Load(1, 0, 0, 0)


class Keeper:
    """What is kept free, and for whom. Times are monotonic seconds."""

    __slots__ = ("_for", "_since")

    def __init__(self) -> None:
        self._for: dict[Session, Lane] = {}
        self._since: dict[Lane, float] = {}

    def __bool__(self) -> bool:
        return bool(self._for)

    def passed(self, lane: Lane, now: float) -> None:
        """Hear that there was no room for the first of a lane that takes more than a slot."""
        if lane.load is None or now - self._since.setdefault(lane, now) < PATIENCE or lane in self._for.values():
            return
        able = [session for session in lane.sessions if session not in self._for and _may(session, lane.demand.type)]
        if able:
            self._for[nearest(lane.load, able)] = lane

    def served(self, lane: Lane) -> None:
        """Hear that tasks of a lane got their room; who is next waits anew."""
        self._since.pop(lane, None)
        for session in [session for session, its in self._for.items() if its is lane]:
            del self._for[session]

    def open(self, lane: Lane, session: Session) -> bool:
        """Say whether a task of a lane may go to a session that has room for it."""
        its = self._for.get(session)
        if its is None or its is lane or lane.rank < its.rank or not its.waiting or its.load is None:
            return True
        return leaves(its.load, lane.load or _SLOT, session.left())

    def forget(self, session: Session) -> None:
        """Drop what a session keeps that is gone or matches other lanes now."""
        self._for.pop(session, None)

    def tidy(self, lanes: Iterable[Lane]) -> None:
        """Drop what is known of lanes other than these."""
        there = set(lanes)
        for lane in [*self._since]:
            if lane not in there:
                self.served(lane)


def nearest(load: Load, sessions: Sequence[Session]) -> Session:
    """Return the session that lacks least of what a task takes, the first of several."""
    return min(sessions, key=lambda session: lacking(load, session.left()))


def _may(session: Session, task_type: str) -> bool:
    """Say whether a session takes tasks of this type at all, had it room."""
    limited = None if session.types is None else session.types.left(task_type, len(session.held))
    return session.accepting and limited != 0
