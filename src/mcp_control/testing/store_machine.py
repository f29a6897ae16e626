"""Random histories of a `Store` against a model made of dictionaries: changes, conflicts, unique values, queries, restarts.

Used like `store_conformance.py`, with the same fixture `store_factory`; each history gets a kind of its own, so all of them can lie on
the same data.
"""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from mcp_control.kernel.changes import (
    Change,
    Entity,
    Fact,
    Field,
    Index,
    IndexValue,
    Key,
    Kind,
    Query,
    StoredFact,
    Where,
)
from mcp_control.kernel.errors import Conflict, Duplicate, Problem
from mcp_control.storage.ports import Store
from mcp_control.testing.store_conformance import StoreFactory, told

_numbers: Final = itertools.count()
_FIELDS: Final = ("state", "due", "name")
_IDS: Final = st.sampled_from([f"i{n}" for n in range(6)])
_INDEX: Final = st.fixed_dictionaries(
    {},
    optional={
        "state": st.sampled_from(["new", "old"]),
        "due": st.integers(-2, 2) | st.sampled_from([2**63 - 1, -(2**63)]),
        "name": st.sampled_from(["n1", "n2"]),
    },
)
_COLD: Final = st.dictionaries(st.sampled_from(["payload", "output/a", "output/b"]), st.binary(max_size=4), max_size=2)
_WRITE: Final = st.tuples(
    _IDS, st.integers(0, 4), _INDEX, st.binary(max_size=8), _COLD
)  # 0: the current version; others are offsets
_DELETE: Final = st.tuples(_IDS, st.booleans())
_CHANGE: Final = st.tuples(
    st.lists(_WRITE, max_size=3, unique_by=lambda write: write[0]),
    st.lists(_DELETE, max_size=2, unique_by=lambda delete: delete[0]),
    st.integers(0, 2),
)
_WHERE: Final = st.one_of(
    st.builds(Where, st.just("state"), st.just("eq"), st.sampled_from(["new", "old"])),
    st.builds(Where, st.just("name"), st.just("in"), st.lists(st.sampled_from(["n1", "n2"]), max_size=2)),
    st.builds(Where, st.just("due"), st.sampled_from(["lt", "le", "gt", "ge", "eq"]), st.integers(-2, 2)),
    st.builds(Where, st.just("id"), st.sampled_from(["eq", "gt"]), _IDS),
)


class _Model:
    """What the store should hold."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rows: dict[str, Entity] = {}
        self.facts: list[Fact] = []

    def apply(self, change: Change) -> type[Problem] | None:
        rows = dict(self.rows)
        for key in change.deletes:
            held = rows.get(key.id)
            if key.version is not None and (held is None or held.version != key.version):
                return Conflict
            rows.pop(key.id, None)
        if any((rows[write.id].version if write.id in rows else 0) != write.version for write in change.writes):
            return Conflict
        for write in change.writes:
            held = rows.get(write.id)
            index = {name: write.index.get(name) for name in _FIELDS}
            cold = {**(held.cold if held else {}), **write.cold}
            rows[write.id] = Entity(self.kind, write.id, write.version + 1, index, write.hot, cold)
        names = [row.index["name"] for row in rows.values() if row.index["name"] is not None]
        if len(set(names)) != len(names):
            return Duplicate
        self.rows = rows
        self.facts += change.facts
        return None

    def find(self, where: Sequence[Where], order: str | None, descending: bool) -> list[str]:
        found = [row for row in self.rows.values() if all(_matches(row, condition) for condition in where)]
        return [row.id for row in sorted(found, key=lambda row: _rank(row, order), reverse=descending)]


def _matches(row: Entity, where: Where) -> bool:
    value: Any = row.id if where.field == "id" else row.index[where.field]
    against: Any = where.value
    if value is None:
        return False
    match where.op:
        case "eq":
            return bool(value == against)
        case "in":
            return value in against
        case "lt":
            return bool(value < against)
        case "le":
            return bool(value <= against)
        case "gt":
            return bool(value > against)
        case "ge":
            return bool(value >= against)


def _rank(row: Entity, order: str | None) -> tuple[Any, ...]:
    if order is None:
        return (row.id,)
    value = row.index[order]
    return (value is not None, "" if value is None and order != "due" else value or 0, row.id)


class _Machine(RuleBasedStateMachine):
    factory: StoreFactory
    store: Store

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.kind = Kind(
            name=f"kind{next(_numbers)}",
            fields=(Field("state"), Field("due", "int"), Field("name")),
            indexes=(
                Index("state", ("state", "id")),
                Index("due", ("due", "id")),
                Index("name", ("name",), unique=True),
            ),
            cold=("payload", "output"),
        )
        self.model = _Model(self.kind.name)
        self.heard: list[StoredFact] = []
        self.open()
        self.first = self.loop.run_until_complete(self.store.trim_facts(0, 2**60, 1))[1]

    def open(self) -> None:
        self.store = self.factory()
        self.loop.run_until_complete(self.store.open([self.kind], self.heard.extend))

    @rule(drawn=st.lists(_CHANGE, min_size=1, max_size=4))
    def commit(self, drawn: list[tuple[list[Any], list[Any], int]]) -> None:
        versions = {name: row.version for name, row in self.model.rows.items()}
        changes = []
        for writes, deletes, facts in drawn:
            changed = [Entity(self.kind.name, name, (versions.get(name, 0) + off) % 5 if off else versions.get(name, 0), index, hot, cold)
                       for name, off, index, hot, cold in writes]  # fmt: skip
            written = {write.id for write in changed}
            keys = [
                Key(self.kind.name, name, versions.get(name) if guarded else None)
                for name, guarded in deletes
                if name not in written
            ]
            told = [Fact("thing.changed", f"{len(self.model.facts)}.{at}", "t", at, "system") for at in range(facts)]
            changes.append(Change(changed, keys, told))
        expected = [self.model.apply(change) for change in changes]
        outcomes = self.loop.run_until_complete(self.store.commit(changes))
        assert [outcome and type(outcome) for outcome in outcomes] == expected

    @rule(
        where=st.lists(_WHERE, max_size=2),
        order=st.sampled_from([None, "due", "state", "name"]),
        descending=st.booleans(),
        limit=st.integers(1, 4),
    )
    def page(self, where: list[Where], order: str | None, descending: bool, limit: int) -> None:
        expected = self.model.find(where, order, descending)
        seen: list[str] = []
        after: Sequence[IndexValue] | None = None
        while True:
            query = Query(where=where, order=order, descending=descending, limit=limit, after=after)
            found = self.loop.run_until_complete(self.store.find(self.kind.name, query))
            seen += [entity.id for entity in found]
            if len(found) < limit:
                break
            after = [found[-1].id] if order is None else [found[-1].index[order], found[-1].id]
        assert seen == expected
        assert self.loop.run_until_complete(self.store.count(self.kind.name, where, 100)) == len(expected)

    @rule(ids=st.lists(_IDS, max_size=4))
    def get(self, ids: list[str]) -> None:
        found = self.loop.run_until_complete(self.store.get(self.kind.name, ids, ["payload", "output"]))
        assert found == [self.model.rows.get(name) for name in ids]

    def settle(self) -> None:
        self.loop.run_until_complete(told(self.heard, len(self.model.facts)))

    @rule()
    def read_facts(self) -> None:
        self.settle()
        expected = [StoredFact(self.first + at, fact) for at, fact in enumerate(self.model.facts, 1)]
        assert self.heard == expected
        assert self.loop.run_until_complete(self.store.facts(self.first, 10_000)) == expected

    @rule()
    def reopen(self) -> None:
        self.settle()
        self.loop.run_until_complete(self.store.close())
        self.open()

    def finish(self) -> None:
        if hasattr(self, "store"):
            self.get([f"i{n}" for n in range(6)])
            self.settle()
            self.loop.run_until_complete(self.store.close())
            self.loop.close()


def test_random_histories_agree_with_a_plain_model(store_factory: StoreFactory) -> None:
    """Whatever the order of changes, conflicts, queries and restarts, the store holds and tells what a model of dictionaries does."""
    machine = type("Machine", (_Machine,), {"factory": staticmethod(store_factory), "teardown": _Machine.finish})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
