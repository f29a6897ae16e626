"""Lists of tasks by several conditions: whichever leads, the pages show what matches, and no page looks at more than a bounded part."""

from itertools import product
from pathlib import Path

from msgspec.structs import replace

from mcp_control.kernel.changes import Change, Entity, Query, Where
from mcp_control.storage.ports import Store
from mcp_control.tasks.listing import TaskFilter, page
from mcp_control.tasks.model import Lease, Links, Origin, Task, TaskSpec, TaskState
from mcp_control.tasks.narrowing import narrowed
from mcp_control.tasks.records import write
from mcp_control.tasks.submission import new_task
from tests.tasks.world import World, world_at

S = TaskState
TASKS = 7000
LOOKED_AT = 6000  # 5000, and what the last step looks at beyond
RARE = "rare"


def _tasks(world: World) -> list[Task]:
    """Most tasks are completed ones of one type, run and agent; the rare ones are 3, and nothing of theirs is common."""
    found = []
    for number in range(TASKS):
        rare = number % (TASKS // 3) == 5
        few = number % 50 == 0
        type_, run, agent = (RARE,) * 3 if rare else ("few",) * 3 if few else ("most",) * 3
        state = S.EXPIRED if rare else S.FAILED if number % 40 == 0 else S.COMPLETED
        made = new_task(
            TaskSpec(type=type_),
            task_id=world.ids.new("task"),
            tenant="default",
            origin=Origin(principal="tests"),
            now=world.clock.now(),
            order=number,
        )
        lease = Lease(agent_id=agent, instance_id="i", token="", since=0)
        found.append(replace(made, state=state, finished_at=1, last_lease=lease, links=Links(run_id=run)))
    return found


class Counted:
    """A store that counts what its queries give."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.rows = 0

    async def find(self, kind: str, query: Query) -> list[Entity]:
        """See `Store`."""
        found = await self._store.find(kind, query)
        self.rows += len(found)
        return found

    async def count(self, kind: str, where: list[Where], limit: int) -> int:
        """See `Store`."""
        return await self._store.count(kind, where, limit)


async def test_pages_by_several_conditions_show_every_task_once_and_look_at_a_part(tmp_path: Path) -> None:
    """All combinations of state, type, run and agent give what going through all tasks gives; each page is bounded."""
    async with world_at(tmp_path) as world:
        tasks = _tasks(world)
        assert set(await world.store.commit([Change([write(task)[1]]) for task in tasks])) == {None}
        names = (None, "most", RARE)
        for state, type_, run, agent in product((None, S.COMPLETED, S.FAILED, S.EXPIRED), names, names, names):
            wanted = TaskFilter(state=state, type=type_, run=run, agent=agent, oldest_first=agent == RARE)
            there = [
                task.id
                for task in tasks
                if state in (None, task.state)
                and type_ in (None, task.type)
                and run in (None, task.links.run_id)
                and (agent is None or (task.last_lease is not None and task.last_lease.agent_id == agent))
            ]
            seen: list[str] = []
            cursor = None
            while True:
                store = Counted(world.store)
                found = await page(store, "default", wanted, 0, cursor, 500)  # type: ignore[arg-type]  # two methods suffice
                assert store.rows <= LOOKED_AT
                seen += [one.id for one in found.items]
                cursor = found.next_cursor
                if cursor is None:
                    break
            assert seen == sorted(there, reverse=not wanted.oldest_first)


async def test_the_condition_of_the_fewest_leads(tmp_path: Path) -> None:
    """What is asked of the store is the rarest condition with those that share its index; alone it is asked as it is."""
    async with world_at(tmp_path) as world:
        await world.store.commit([Change([write(task)[1]]) for task in _tasks(world)])
        run, agent, type_ = Where("run", "eq", "most"), Where("agent", "eq", "few"), Where("type", "eq", "most")
        state, none = Where("state", "eq", "failed"), Where("state", "eq", "running")
        tenant = Where("tenant", "eq", "default")
        assert await narrowed(world.store, [tenant, run]) == ([tenant, run], [])
        assert await narrowed(world.store, [state, type_]) == ([state], [type_])
        assert await narrowed(world.store, [tenant, run, agent]) == ([tenant, agent], [run])
        assert await narrowed(world.store, [run, agent, none]) == ([none], [run, agent])
        assert await narrowed(world.store, [run, agent, none, type_]) == ([none], [run, agent, type_])
