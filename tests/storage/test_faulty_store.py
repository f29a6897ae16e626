"""The faulty store does what it says, so that suites over it mean something."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest

from mcp_control.kernel.changes import Change, StoredFact
from mcp_control.kernel.errors import Conflict, OutcomeUnknown, Problem, StoreUnavailable
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.faulty_store import Fault, FaultyStore
from mcp_control.testing.store_conformance import *  # noqa: F403  without faults it is an ordinary store
from mcp_control.testing.store_conformance import THING, StoreFactory, fact, thing


def _unexpected(problem: Problem) -> None:
    raise AssertionError(problem)


def _inner(path: Path) -> SqliteStore:
    return SqliteStore(path / "data", fatal=_unexpected, ballast_bytes=0)


@pytest.fixture
def store_factory(tmp_path: Path) -> StoreFactory:
    return lambda: FaultyStore(_inner(tmp_path), {}, Random(1))


async def _opened(path: Path, rates: Mapping[Fault, float]) -> tuple[FaultyStore, SqliteStore, list[StoredFact]]:
    inner, heard = _inner(path), list[StoredFact]()
    store = FaultyStore(inner, rates, Random(1))
    await store.open([THING], heard.extend)
    return store, inner, heard


@pytest.mark.parametrize(
    ("fault", "error", "done"),
    [
        ("timeout", StoreUnavailable, False),
        ("unavailable", StoreUnavailable, False),
        ("lost", OutcomeUnknown, False),
        ("executed", OutcomeUnknown, True),
    ],
)
async def test_each_fault_of_a_commit_does_or_does_not_do_the_work(
    tmp_path: Path, fault: Fault, error: type[Problem], done: bool
) -> None:
    """The caller sees the fault's error, and the change and its facts are there exactly where the fault says so."""
    store, inner, heard = await _opened(tmp_path, {fault: 1.0})
    with pytest.raises(error):
        await store.commit([Change([thing("a")], (), [fact("a")])])
    assert [found is not None for found in await inner.get("thing", ["a"])] == [done]
    assert [item.fact.subject for item in heard] == ["a"] * done
    assert store.injected == {fault: 1}
    await store.close()


async def test_an_injected_conflict_hits_one_change_and_spares_the_rest(tmp_path: Path) -> None:
    """One change is answered with Conflict and not done; the others keep their places."""
    store, inner, _ = await _opened(tmp_path, {"conflict": 1.0})
    outcomes = await store.commit([Change([thing(f"i{n}")]) for n in range(5)])
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict"] + ["NoneType"] * 4
    found = await inner.get("thing", [f"i{n}" for n in range(5)])
    assert [entity is None for entity in found] == [isinstance(outcome, Conflict) for outcome in outcomes]
    await store.close()


async def test_reads_are_unavailable_at_the_same_rate(tmp_path: Path) -> None:
    """All reads can fail, and say that they did."""
    store, _, _ = await _opened(tmp_path, {"unavailable": 1.0})
    for read in (store.get("thing", ["a"]), store.count("thing", (), 1), store.facts(0, 1), store.trim_facts(0, 0, 1)):
        with pytest.raises(StoreUnavailable):
            await read
    assert store.injected == {"unavailable": 4}
    await store.close()


async def test_a_seed_repeats_a_run(tmp_path: Path) -> None:
    """The same seed injects the same faults, at about the rates asked for."""
    runs = []
    for name in ("one", "two"):
        store, _, _ = await _opened(tmp_path / name, {"timeout": 0.1, "conflict": 0.2})
        outcomes = [await _outcome(store, n) for n in range(300)]
        await store.close()
        runs.append(outcomes)
        assert 15 < store.injected["timeout"] < 50
        assert 30 < store.injected["conflict"] < 80
    assert runs[0] == runs[1]


async def _outcome(store: FaultyStore, number: int) -> str:
    try:
        (outcome,) = await store.commit([Change([thing(f"i{number}")])])
    except StoreUnavailable:
        return "unavailable"
    await asyncio.sleep(0)
    return type(outcome).__name__
