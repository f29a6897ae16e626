"""From a fact to those it may concern, without a look at all the others."""

from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from mcp_control.events.filters import Filter
from mcp_control.kernel.changes import Fact, StoredFact

_TYPES_MAX: Final = 1000


class Listener(Protocol):
    """Somebody who is offered live facts."""

    @property
    def filter(self) -> Filter:
        """Which facts."""

    def offer(self, stored: StoredFact) -> None:
        """Take a live fact that matches. Never blocks, and neither adds nor removes listeners."""


class Routes:
    """Listeners by fact type and by what narrows them most.

    Attributes:
        all: every listener; not to be changed from outside.
    """

    def __init__(self) -> None:
        self.all: dict[Listener, None] = {}
        self._by_type: dict[str, _Route] = {}

    def add(self, each: Listener) -> None:
        """Begin to offer facts to somebody who is not there yet."""
        self.all[each] = None
        for name, route in self._by_type.items():
            if each.filter.wants_type(name):
                route.add(each)

    def remove(self, each: Listener) -> None:
        """Stop offering to somebody who is there."""
        del self.all[each]
        for name, route in self._by_type.items():
            if each.filter.wants_type(name):
                route.remove(each)

    def listeners(self, fact: Fact) -> Iterable[Listener]:
        """Return those who want this fact, each once."""
        route = self._by_type.get(fact.type)
        if route is None:
            route = self._route(fact.type)
        return route.listeners(fact) if route.size else ()

    def _route(self, type: str) -> "_Route":
        if len(self._by_type) > _TYPES_MAX:
            self._by_type = {}
        route = self._by_type[type] = _Route()
        for each in self.all:
            if each.filter.wants_type(type):
                route.add(each)
        return route


class _Route:
    """The listeners of one fact type."""

    __slots__ = ("_broad", "_by_run", "_by_subject", "size")

    def __init__(self) -> None:
        self._broad: dict[Listener, None] = {}
        self._by_subject: dict[str, dict[Listener, None]] = {}
        self._by_run: dict[str, dict[Listener, None]] = {}
        self.size = 0

    def add(self, each: Listener) -> None:
        self.size += 1
        if each.filter.subject is not None:
            self._by_subject.setdefault(each.filter.subject, {})[each] = None
        elif each.filter.run is not None:
            self._by_run.setdefault(each.filter.run, {})[each] = None
        else:
            self._broad[each] = None

    def remove(self, each: Listener) -> None:
        self.size -= 1
        if each.filter.subject is not None:
            _take_out(self._by_subject, each.filter.subject, each)
        elif each.filter.run is not None:
            _take_out(self._by_run, each.filter.run, each)
        else:
            del self._broad[each]

    def listeners(self, fact: Fact) -> Iterator[Listener]:
        for each in self._broad:
            if each.filter.wants(fact):
                yield each
        if self._by_subject:
            for each in self._by_subject.get(fact.subject, ()):
                if each.filter.wants(fact):
                    yield each
        if self._by_run:
            for name in {fact.run, fact.subject}:
                for each in self._by_run.get(name, ()):
                    if each.filter.wants(fact):
                        yield each


def _take_out(table: dict[str, dict[Listener, None]], key: str, each: Listener) -> None:
    row = table[key]
    del row[each]
    if not row:
        del table[key]
