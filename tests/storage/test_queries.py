"""Every query of the product is led by an index, on both stores: seen on a real server, tried on as many rows as you like."""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pymongo
import pytest

import mcp_control.app
import mcp_control.backend
from mcp_control.kernel.loops import Loop, every
from mcp_control.kinds import KINDS
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import TASK_KIND
from mcp_control.testing.backends import backend, pytest_generate_tests
from mcp_control.testing.databases import MongoSet, RedisServer, free_ports
from mcp_control.testing.server import databases_for, running_server
from tests.integration.support import say
from tests.storage.asked import AskedStore, asking_places
from tests.storage.crowd import Cost, MongoCrowd, SqliteCrowd
from tests.storage.workload import Workload

__all__ = ["backend", "pytest_generate_tests"]

PAGE = 500  # the largest of a list
SPARE = 1000
MANY = 100_000
# Asked only of a store that servers share.
ONLY_SHARED = (
    "agents/instances.py:remote",
    "agents/registry.py:elsewhere",
    "storage/claims.py",
    "coordination/nodes.py",
)
# The query of the retention of schedules, but of one with thousands of fires; that of a repeated submission, but of two at once.
SAME = {"pipelines/timekeeping.py:_prune", "tasks/keyed.py:_repeated"}
SETTINGS: dict[str, object] = {
    "leases__drift_seconds": 0.001,
    "retention__tasks_days": 1e-9,
    "retention__runs_days": 1e-9,
    "retention__interval_seconds": 3600,
}


async def _exercised(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_redis: Callable[[], Awaitable[None]] | None,
    **settings: object,
) -> tuple[set[str], set[str]]:
    """Run a server through everything; returns from where its store was asked, and the parameters without an example."""
    loops: dict[str, Callable[[int], Awaitable[object]]] = {}

    def noted(interval: float, once: Callable[[int], Awaitable[object]], **options: Any) -> Loop:
        loops[options["name"]] = once
        return every(interval, once, **options)

    monkeypatch.setattr(mcp_control.app, "every", noted)
    monkeypatch.setattr(mcp_control.backend, "every", noted)
    asked: list[AskedStore] = []

    def around(store: Store) -> Store:
        asked.append(AskedStore(store))
        return asked[-1]

    async with (
        running_server(folder, around=around, port=free_ports(1)[0], **SETTINGS, **settings) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=30) as client,
    ):
        workload = Workload(server, client, folder, loops, without_redis)
        await workload.run()
    return asked[0].places, workload.unknown


def _bad(costs: Iterator[Cost]) -> list[Cost]:
    bad = []
    count = 0
    for cost in costs:
        count += 1
        bound = 3 * cost.returned + SPARE
        if "COLLSCAN" in cost.faults or cost.examined > bound or ("SORT" in cost.faults and cost.examined > PAGE):
            bad.append(cost)
    say(f"{count} queries")
    assert count > 100
    return bad


@pytest.mark.long_on_cluster
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "rows", [20_000, pytest.param(MANY, marks=[pytest.mark.long]), pytest.param(10 * MANY, marks=[pytest.mark.long])]
)
async def test_every_query_is_led_by_an_index(
    backend: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """However many tasks there are, nothing scans or sorts more than a page and a bit; without an index it does (control).

    The long runs also demand that every place in the source that asks was seen asking. On MongoDB theirs is a set of one member: what
    leads a query is the same, and all of the filling is done once.
    """
    began = time.monotonic()
    if backend == "embedded":
        with SqliteCrowd() as crowd:
            places, unknown = await _exercised(tmp_path, monkeypatch, None)
            _timed(began, "the server has done everything")
            crowd.fill(str(tmp_path / "data" / "store.db"), KINDS, rows)
            _timed(began, f"{rows} tasks are there")
            _check(crowd)
    else:
        redis: RedisServer = request.getfixturevalue("shared_redis")
        name = str(databases_for(tmp_path / "data")["redis.namespace"])

        async def without_redis() -> None:
            redis.kill()

        with ExitStack() as stack:
            mongo: MongoSet = request.getfixturevalue("mongo_set")
            if rows >= MANY:
                mongo = stack.enter_context(MongoSet(tmp_path / "alone", single=True))
            client = stack.enter_context(pymongo.MongoClient[dict[str, Any]](mongo.uri()))
            there = MongoCrowd(client[name])
            there.watch()
            settings: dict[str, object] = {"mongo__uri": mongo.uri(name), "mongo__allow_single_member": rows >= MANY}
            places, unknown = await _exercised(tmp_path, monkeypatch, without_redis, **settings)
            redis.heal()
            _timed(began, "the server has done everything")
            there.fill(KINDS, rows)
            _timed(began, f"{rows} tasks are there")
            _check(there)
    _timed(began, "every query was looked at, twice")
    unseen = asking_places() - places - SAME
    if backend == "embedded":
        unseen = {place for place in unseen if not place.startswith(ONLY_SHARED)}
    assert rows < MANY or not unknown, "give examples, so that their queries are seen"
    assert rows < MANY or not unseen, "the workload does not come by there: extend it, so that their queries are seen"


def _timed(began: float, what: str) -> None:
    say(f"{time.monotonic() - began:.0f} s: {what}")


def _check(crowd: MongoCrowd | SqliteCrowd) -> None:
    bad = _bad(crowd.costs())
    assert not bad, "\n".join(f"{cost.examined} for {cost.returned} {cost.faults}: {cost.what}" for cost in bad)
    [index] = [index for index in TASK_KIND.indexes if index.name == "task_finished"]
    crowd.without(TASK_KIND, index)
    assert _bad(crowd.costs()), "a query without an index was not noticed"
