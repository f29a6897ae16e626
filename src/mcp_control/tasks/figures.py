"""What the facts of tasks say about the work: outcomes, waiting and running times, and promises that were broken.

It hears every fact once, in order, and remembers the last of what is under way; what it has forgotten it says nothing about.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from mcp_control.kernel.changes import Fact, StoredFact
from mcp_control.kernel.clock import Clock
from mcp_control.monitoring.metrics import Metrics
from mcp_control.storage.ports import Depth
from mcp_control.tasks.model import Task
from mcp_control.tasks.ranking import ORDER_SHIFT

_FINAL: Final = {f"task.{word}": word for word in ("completed", "failed", "cancelled", "expired", "rejected")}
_OUTCOMES: Final = _FINAL | {"task.retrying": "retried", "task.lost": "lost", "task.released": ""}
_BUDGETS: Final = {"task.budget_warned": "warned", "task.budget_exhausted": "exhausted"}
_HEARD: Final = frozenset({"task.queued", "task.assigned", *_OUTCOMES, *_BUDGETS})
_JUDGED: Final = frozenset({"task.completed", "task.failed", "task.retrying"})
_REMEMBERED: Final = 50_000
_SHARES_MAX: Final = 10_000

Ran = Callable[[str, str, float, bool], None]
"""Told of an attempt that ended: tenant, type, seconds since an agent was given it, whether it completed."""


class _Data(msgspec.Struct, gc=False):
    type: str = ""
    limit: str = ""
    attempt: int = 0
    share: str = ""


_decode: Final = msgspec.json.Decoder(_Data).decode


class _Seen(msgspec.Struct, gc=False):
    at: int
    attempt: int = 0
    held: bool = False


class TaskFigures:
    """Turns facts into figures.

    Args:
        ran: told of attempts that completed or failed.

    Attributes:
        waiting: queued tasks when the lanes were last looked at.
    """

    def __init__(
        self, metrics: Metrics, clock: Clock, remembered: int = _REMEMBERED, ran: Ran = lambda *_: None
    ) -> None:
        self._ran = ran
        self._metrics = metrics
        self._clock = clock
        self._remembered = remembered
        self._live: OrderedDict[str, _Seen] = OrderedDict()
        # Two generations: forgetting the oldest one by one out of a large dict would cost a scan each time.
        self._ended: set[str] = set()
        self._ended_before: set[str] = set()
        self._lanes: list[tuple[str, int, float]] = []
        self._served: dict[tuple[str, str], int] = {}
        self._sharing: set[str] = set()
        self.waiting = 0

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Take in the facts of a commit."""
        outcomes: dict[tuple[str, str], int] = {}
        for stored in facts:
            fact = stored.fact
            kind = fact.type
            if kind not in _HEARD:
                continue
            seen = self._live.get(fact.subject)
            if kind == "task.queued":
                self._queued(fact.subject, seen, fact.at)
                continue
            data = _decode(fact.data)
            if kind == "task.assigned":
                self._assigned(fact.subject, seen, data, fact.at)
                if data.share or fact.tenant in self._sharing:
                    self._shared(fact.tenant, data.share)
            elif kind in _BUDGETS:
                self._metrics.budget(_BUDGETS[kind], data.limit)
            else:
                self._ended_attempt(fact, seen, data)
                if outcome := _OUTCOMES[kind]:
                    key = (data.type, outcome)
                    outcomes[key] = outcomes.get(key, 0) + 1
        for (task_type, outcome), count in outcomes.items():
            self._metrics.task_ended(task_type, outcome, count)

    def _queued(self, task_id: str, seen: _Seen | None, at: int) -> None:
        if seen is None:
            self._remember(task_id, _Seen(at))
        else:
            seen.at, seen.held = at, False

    def _assigned(self, task_id: str, seen: _Seen | None, data: _Data, at: int) -> None:
        if seen is None:
            seen = _Seen(at)
            self._remember(task_id, seen)
        else:
            self._metrics.task_waited(data.type, (at - seen.at) / 1000)
            if data.attempt <= seen.attempt:
                self._metrics.violation("fence_not_growing")
        seen.attempt, seen.at, seen.held = data.attempt, at, True

    def _shared(self, tenant: str, share: str) -> None:
        self._sharing.add(tenant)
        if (tenant, share) in self._served or len(self._served) < _SHARES_MAX:
            self._served[(tenant, share)] = self._served.get((tenant, share), 0) + 1
        self._metrics.share_served(share)

    def take_served(self) -> dict[tuple[str, str], int]:
        """Return how many tasks were given out since the last call, by tenant and share; of tenants that have shares alone."""
        served, self._served = self._served, {}
        return served

    def _ended_attempt(self, fact: Fact, seen: _Seen | None, data: _Data) -> None:
        task_id, kind, at = fact.subject, fact.type, fact.at
        if seen is not None:
            if seen.held:
                seconds = (at - seen.at) / 1000
                self._metrics.task_ran(data.type, seconds)
                if kind in _JUDGED:
                    self._ran(fact.tenant, data.type, seconds, kind == "task.completed")
            if kind == "task.completed" and seen.attempt and not (seen.held and data.attempt == seen.attempt):
                self._metrics.violation("stale_write_accepted")
            seen.at, seen.held = at, False
        if kind in _FINAL:
            self._live.pop(task_id, None)
            if task_id in self._ended or task_id in self._ended_before:
                self._metrics.violation("double_final")
            self._ended.add(task_id)
            if len(self._ended) >= self._remembered:
                self._ended, self._ended_before = set(), self._ended

    def _remember(self, task_id: str, seen: _Seen) -> None:
        self._live[task_id] = seen
        if len(self._live) > self._remembered:
            self._live.popitem(last=False)

    def look(self, depths: Sequence[Depth], firsts: Sequence[Task | None]) -> None:
        """Look at what waits: the lanes and the first task of each, None where it has gone meanwhile."""
        now = self._clock.now()
        lanes: list[tuple[str, int, float]] = []
        for depth, first in zip(depths, firsts, strict=True):
            age = 0.0 if first is None else max(0.0, (now - (first.order >> ORDER_SHIFT)) / 1000)
            lanes.append(("" if first is None else first.type, depth.waiting, age))
        self._lanes = lanes
        self.waiting = sum(waiting for _, waiting, _ in lanes)

    def lanes(self) -> list[tuple[str, int, float]]:
        """Return type, waiting tasks and age of the first in seconds of every lane that was not empty."""
        return self._lanes
