"""Two servers on one database that both think they lead: schedules still fire each slot once."""

import asyncio
from datetime import timedelta

from mcp_control.app import KINDS
from mcp_control.kernel.changes import Query
from mcp_control.kernel.clock import to_datetime
from mcp_control.pipelines.schedule_model import BackfillRequest
from mcp_control.storage.mongo.store import MongoStore
from tests.pipelines.test_scheduler import RUN, TASK, Timed, made_pipeline
from tests.pipelines.world import ANNA, World


async def test_two_leaders_on_one_database_fire_each_slot_once(mongo_uri: str) -> None:
    """Both look at the same moment, slot after slot, with a backfill beside; tasks and runs alike."""
    stores = [MongoStore(mongo_uri, node=name) for name in ("one", "two")]
    stores[0].lead = True  # who gives events their order; both fire
    try:
        for store in stores:
            await store.open(KINDS, lambda facts: None)
        worlds = [World(store, []) for store in stores]
        worlds[1].clock = worlds[0].clock
        worlds[1].restart()  # with that clock
        one, two = (Timed(here) for here in worlds)
        await made_pipeline(one.here)
        await one.create(every=60, overlap="allow", task=TASK)
        await one.create(name="r", every=60, overlap="allow", run=RUN)
        begin = to_datetime(one.here.clock.now())
        past = BackfillRequest(since=begin - timedelta(minutes=10), to=begin - timedelta(seconds=1), width=50)
        await one.scheduler.backfill(ANNA, "s", past)
        for _ in range(10):
            one.here.clock.advance(60)
            await asyncio.gather(one.once(), two.once(), one.once(), two.once())
        for name, kind, count in (("s", "task", 20), ("r", "run", 10)):
            fires = (await two.scheduler.fires(ANNA, name, limit=100)).items
            assert len({fire.slot for fire in fires}) == len(fires) == count
            assert {fire.outcome for fire in fires} == {"started"}
            rows = await stores[1].find(kind, Query(limit=200))
            # The tasks of the runs' stages are there, too.
            ours = [row.id for row in rows if kind == "run" or not row.index["run"]]
            assert sorted(ours) == sorted(fire.target for fire in fires)
    finally:
        for here in worlds:
            await here.settler.handing.background.close()
        for store in stores:
            await store.close()
