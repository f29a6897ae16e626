"""Commit calls that wait for their transaction: in the order of their coming, each with the one time at which it must be answered."""

import asyncio
from collections import deque
from typing import Final

from mcp_control.kernel.errors import Problem
from mcp_control.storage.mongo.batch import Prepared

_BATCH_BYTES: Final = 8 << 20

Outcomes = list[Problem | None]


class Call:
    """One waiting `commit` call, to be answered until `deadline`, in the loop's seconds."""

    __slots__ = ("deadline", "future", "items", "size", "writes")

    def __init__(self, items: list[Prepared], future: "asyncio.Future[Outcomes]", deadline: float) -> None:
        self.items = items
        self.future = future
        self.deadline = deadline
        self.writes = sum(len(item.change.writes) + len(item.change.deletes) or 1 for item in items)
        self.size = sum(item.size for item in items)

    def fail(self, error: Exception) -> None:
        """Answer with an error; a no-op where nobody waits any more."""
        if not self.future.done():
            self.future.set_exception(error)


class CallQueue:
    """Calls in order. `batch_writes`: entity writes after which a batch takes no further calls; a call is never split.

    Attributes:
        changes: how many changes wait.
    """

    def __init__(self, batch_writes: int) -> None:
        self._batch_writes = batch_writes
        self._calls: deque[Call] = deque()
        self.changes = 0

    def __bool__(self) -> bool:
        return bool(self._calls)

    def put(self, call: Call) -> None:
        """Queue a call behind all others."""
        self._calls.append(call)
        self.changes += len(call.items)

    def take(self) -> list[Call]:
        """Take the calls of the next batch."""
        calls: list[Call] = []
        writes = size = 0
        while self._calls and writes < self._batch_writes and size < _BATCH_BYTES:
            call = self._next()
            calls.append(call)
            writes += call.writes
            size += call.size
        return calls

    def take_due(self, until: float) -> list[Call]:
        """Take the calls that must be answered by then."""
        calls: list[Call] = []
        while self._calls and self._calls[0].deadline <= until:
            calls.append(self._next())
        return calls

    def take_all(self) -> list[Call]:
        """Take all."""
        calls = [*self._calls]
        self._calls.clear()
        self.changes = 0
        return calls

    def _next(self) -> Call:
        call = self._calls.popleft()
        self.changes -= len(call.items)
        return call
