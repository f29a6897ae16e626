"""Ends groups when their last member has ended, and makes the tasks that wait for that.

The end of a member is committed without its group: whoever committed it looks at the group soon after, and the server that leads looks
at all groups from time to time, so that a crash in between costs a moment. What happens to a group is one change with the tasks made for
it, at the version of the group that was looked at: of two servers one is refused, and nobody adds members meanwhile. The ids of those
tasks are derived from group, event and round.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.kernel.changes import IndexValue, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.kernel.ids import derived_id
from mcp_control.storage.ports import Store
from mcp_control.tasks import grouping
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.group_model import FAILED_SHOWN, GROUP_KIND, GroupState, TaskGroup
from mcp_control.tasks.group_records import (
    CALLBACKS,
    callback_spec,
    group_fact,
    read_callbacks,
    read_group,
    write_group,
)
from mcp_control.tasks.handing import Created
from mcp_control.tasks.model import Links, TaskState
from mcp_control.tasks.operation_model import OPERATION_KIND
from mcp_control.tasks.operation_records import read_operation
from mcp_control.tasks.settling import Settler

_log = structlog.get_logger(__name__)
_KIND: Final = GROUP_KIND.name
_TRIES: Final = 20
_PACE_SECONDS: Final = 0.05
_PAUSE_SECONDS: Final = 0.004
_PAGE: Final = 200


class GroupKeeper:
    """Looks at groups when members have ended, one look at a time for each, and at all of them by and by (`once`)."""

    def __init__(self, store: Store, clock: Clock, settler: Settler) -> None:
        self._store = store
        self._clock = clock
        self._settler = settler
        self._looking: set[str] = set()
        self._again: set[str] = set()
        self._at: list[IndexValue] | None = None

    def look(self, group_id: str) -> None:
        """Look at a group soon. What ends in the meantime is seen by the same look or the one after it."""
        if group_id in self._looking:
            self._again.add(group_id)
        else:
            self._looking.add(group_id)
            self._settler.handing.background.begin(self._look(group_id))

    async def _look(self, group_id: str) -> None:
        try:
            while True:
                self._again.discard(group_id)
                await self.tend(group_id)
                # Many members that end one after the other must not cost a look each.
                await asyncio.sleep(_PACE_SECONDS)
                if group_id not in self._again:
                    return
        except Problem as problem:
            _log.warning("groups.look_failed", group=group_id, error=repr(problem))  # the next pass looks at it again
        finally:
            self._looking.discard(group_id)
            self._again.discard(group_id)

    async def once(self, _: int) -> int:
        """Look at some of the groups that have not ended; the next pass looks at the following ones. Returns how many."""
        where = [Where("active", "gt", 0)]
        rows = await self._store.find(_KIND, Query(where=where, order="active", after=self._at, limit=_PAGE))
        self._at = [rows[-1].index["active"], rows[-1].id] if len(rows) == _PAGE else None
        for row in rows:
            try:
                await self.tend(row.id)
            except (Conflict, msgspec.MsgspecError) as error:
                # One that cannot be read, or changes all the time, must not keep the others waiting.
                _log.warning("groups.look_failed", group=row.id, error=repr(error))
        return len(rows)

    async def tend(self, group_id: str) -> None:
        """Do what follows from how the members of a group are now. Raises StoreUnavailable and the like; nothing is lost then."""
        for tried in range(_TRIES):
            (row,) = await self._store.get(_KIND, [group_id])
            group = None if row is None else read_group(row)
            if group is None or group.final:
                return
            found = grouping.step(group, await self._seen(group), self._clock.now())
            if found is None:
                return
            try:
                await self._commit(group, found)
            except Conflict:
                await asyncio.sleep(_PAUSE_SECONDS * tried)
                continue
            return
        raise Conflict("too many changes at once")

    async def _seen(self, group: TaskGroup) -> grouping.Seen:
        """Look at the members. The order matters: what is under way with them, then they; the group was read before."""
        if group.operation:
            (row,) = await self._store.get(OPERATION_KIND.name, [group.operation])
            if row is not None and read_operation(row).state == "running":
                return grouping.Seen(unfinished=True, spoiled="", busy=True)
        spoiled = [] if group.first_failure else await spoiled_members(self._store, group.id, 1)
        unfinished = group.state is GroupState.OPEN or await has_unfinished(self._store, group.id)
        if not unfinished and not spoiled and not group.first_failure:
            # Whoever ended last may have ended badly after the first look.
            spoiled = await spoiled_members(self._store, group.id, 1)
        return grouping.Seen(unfinished=unfinished, spoiled="".join(spoiled))

    async def _commit(self, group: TaskGroup, found: grouping.Step) -> None:
        now = self._clock.now()
        after = found.after
        wanted = [event for event in found.events if event in group.events]
        counts: dict[TaskState, int] = {}
        if found.ends or wanted:
            counts = await count_members(self._store, after)
        if found.ends:
            after = replace(after, counts={state.value: count for state, count in counts.items()})
        created: list[Created] = []
        if wanted:
            failed = await spoiled_members(self._store, group.id, FAILED_SHOWN + 1)
            (row,) = await self._store.get(_KIND, [group.id], (CALLBACKS,))
            if row is None:
                return
            specs = dict(grouping.callbacks(read_callbacks(row)))
            called = dict(after.called)
            for event in wanted:
                called[event] = derived_id("task", group.id, "callback", event, group.round)
                new = NewTask(
                    id=called[event],
                    spec=callback_spec(after, event, specs[event], counts, failed),
                    links=Links(references=[group.id]),
                    origin=group.origin,
                )
                created.append(self._settler.handing.create(new, now, group.tenant))
            after = replace(after, called=called)
        facts = []
        if "first_failure" in found.events:
            facts.append(group_fact("group.member_failed", after, "system", now, task_id=after.first_failure))
        if found.ends:
            facts.append(group_fact(f"group.{after.state.value}", after, "system", now, counts=after.counts))
        await self._settler.handing.launch(created, [write_group(after)], facts)


async def has_unfinished(store: Store, group_id: str) -> bool:
    """Say whether some member of a group has not ended. Its cost does not depend on their number."""
    where = [Where("group_id", "eq", group_id), Where("state", "in", [state.value for state in grouping.UNFINISHED])]
    return await store.count("task", where, 1) > 0


async def spoiled_members(store: Store, group_id: str, limit: int) -> list[str]:
    """Return the ids of the first members, oldest first, that ended other than completed; as cheap as `has_unfinished`."""
    where = [Where("group_id", "eq", group_id), Where("state", "in", [state.value for state in grouping.SPOILED])]
    if not await store.count("task", where, 1):
        return []
    # State by state: the order of several would have the store go through all members.
    pages = [
        store.find(
            "task",
            Query(where=[Where("group_id", "eq", group_id), Where("state", "eq", state.value)], limit=limit),
        )
        for state in grouping.SPOILED
    ]
    return sorted(row.id for rows in await asyncio.gather(*pages) for row in rows)[:limit]


async def count_members(store: Store, group: TaskGroup) -> dict[TaskState, int]:
    """Return how many members are in which state; states of none are left out."""
    states: Sequence[TaskState] = tuple(TaskState)

    async def counted(state: TaskState) -> int:
        where = [Where("group_id", "eq", group.id), Where("state", "eq", state.value)]
        return await store.count("task", where, group.total + 1)

    found = await asyncio.gather(*map(counted, states))
    return {state: count for state, count in zip(states, found, strict=True) if count}
