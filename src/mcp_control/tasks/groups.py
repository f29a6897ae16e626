"""Groups: the verbs that every door calls."""

import asyncio
import builtins
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from weakref import WeakValueDictionary

from msgspec.structs import replace

from mcp_control.kernel.changes import Change, Entity, Fact, Key, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import (
    Conflict,
    Duplicate,
    FieldError,
    IdempotencyMismatch,
    Invalid,
    NotFound,
    Problem,
)
from mcp_control.kernel.ids import IdSource, derived_id
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.kernel.text import text_errors
from mcp_control.security.model import SYSTEM, Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks import grouping
from mcp_control.tasks.bulk import narrowed
from mcp_control.tasks.control import REASON_MAX
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.group_keeping import GroupKeeper, count_members
from mcp_control.tasks.group_model import (
    GROUP_KIND,
    Added,
    GroupRequest,
    GroupState,
    GroupView,
    MoreTasks,
    TaskGroup,
)
from mcp_control.tasks.group_records import digest_of_group, group_fact, new_group, read_group, view_group, write_group
from mcp_control.tasks.handing import Created
from mcp_control.tasks.ledger import Ledger, Waiters
from mcp_control.tasks.model import Origin, Request, TaskSpec
from mcp_control.tasks.operation_model import Operation, OperationRequest
from mcp_control.tasks.operation_records import new_operation, operation_fact, write_operation
from mcp_control.tasks.selection import Selection
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.spending import Lineage
from mcp_control.tasks.submission import check, check_key

_KIND: Final = GROUP_KIND.name
_TRIES: Final = 20
_PAUSE_SECONDS: Final = 0.004
_BATCH: Final = 200
WAIT_MAX_SECONDS: Final = 60.0
_ENDED: Final = frozenset({"group.completed", "group.failed", "group.cancelled"})


class Groups:
    """Makes groups, adds to them, closes, shows and steers them. `keeper` ends them."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        ledger: Ledger,
        settler: Settler,
        tasks: TaskOrchestrator,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._ledger = ledger
        self._settler = settler
        self._tasks = tasks
        self._waiters = Waiters()
        # Those who add to one group here at the same time come one after the other; between servers the versions decide.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.keeper = GroupKeeper(store, clock, settler)
        ledger.joined = self.keeper.look

    # --- making -------------------------------------------------------------------------------------------------------

    async def create(self, actor: Actor, request: GroupRequest, origin: Origin) -> tuple[GroupView, bool]:
        """Make a group with its first members, all or none; durable on return. Returns it, and whether it was made now.

        Raises:
            Invalid: what is wrong with the request, place by place.
            IdempotencyMismatch: the key was used for another request.
            BudgetExhausted, Unroutable: of a member.
        """
        allow(actor, "groups.create")
        now = self._clock.now()
        check_key(request.idempotency_key)
        self._check_callbacks(request, now)
        vetted, warnings = await self._vetted(actor, request.tasks, origin, now)
        group = new_group(self._ids.new("group"), actor, request, origin, now)
        ids = [self._ids.new("task") for _ in request.tasks]
        created = self._members(group, request.tasks, vetted, ids, actor, origin, now)
        try:
            await self._settler.handing.launch(
                created, [write_group(group, request.on)], [group_fact("group.created", group, actor.id, now)]
            )
        except Duplicate as duplicate:
            known = await self._one(actor, str(duplicate.data["existing"]))
            if known.digest != group.digest:
                raise IdempotencyMismatch("this idempotency key was used for another group") from None
            return await self._view(known), False
        if not group.total and group.state is GroupState.SEALED:
            self.keeper.look(group.id)
        return view_group(group, warnings=warnings), True

    async def add(self, actor: Actor, group_id: str, request: MoreTasks, origin: Origin) -> tuple[Added, bool]:
        """Add members, all or none; durable on return. Returns their ids, and whether they were added now.

        Raises:
            NotFound: no such group.
            InvalidTransition: it takes no more: it is sealed and `by` is no member that has not ended, or it has ended.
            Invalid, IdempotencyMismatch, BudgetExhausted, Unroutable: as for `create`.
        """
        allow(actor, "groups.add", group_id)
        now = self._clock.now()
        check_key(request.idempotency_key)
        specs = request.tasks
        vetted, warnings = await self._vetted(actor, specs, origin, now)
        key = request.idempotency_key
        ids = [
            self._ids.new("task") if key is None else derived_id("task", group_id, "member", key, place)
            for place in range(len(specs))
        ]
        digest = "" if key is None else digest_of_group(request)
        async with self._locks.setdefault(group_id, asyncio.Lock()):
            for tried in range(_TRIES):
                group = await self._one(actor, group_id)
                if key is not None and await self._added_before(ids[0], digest):
                    return Added(ids=ids, total=group.total), False
                inside = request.by is not None and await self._under_way(group, request.by)
                after = grouping.grown(group, len(specs), now, inside=inside)
                created = self._members(after, specs, vetted, ids, actor, origin, now, digest)
                fact = group_fact("group.extended", after, actor.id, now, added=len(specs))
                try:
                    await self._settler.handing.launch(created, [write_group(after)], [fact])
                except Conflict:
                    await asyncio.sleep(_PAUSE_SECONDS * tried)
                    continue
                return Added(ids=ids, total=after.total, warnings=warnings), True
        raise Conflict("too many changes at once")

    def _check_callbacks(self, request: GroupRequest, now: int) -> None:
        errors = text_errors("#/name", request.name, 128) + grouping.callback_errors(request.on)
        for event, spec in grouping.callbacks(request.on):
            try:
                check(spec, now)
            except Invalid as problem:
                errors += _within(f"#/on/{event}", problem)
        if errors:
            raise Invalid(errors[0].detail, errors=errors[:50])

    async def _vetted(
        self, actor: Actor, specs: Sequence[TaskSpec], origin: Origin, now: int
    ) -> tuple[builtins.list[Lineage], builtins.list[str]]:
        """Return what each member inherits, and all warnings. Raises the problem of one where one is not accepted."""
        errors: builtins.list[FieldError] = []
        found: builtins.list[Lineage] = []
        warnings: dict[str, None] = {}
        for place, each in enumerate(await self._tasks.vet(actor, specs, origin, now)):
            if isinstance(each, Invalid):
                errors += _within(f"#/tasks/{place}", each)
            elif isinstance(each, Problem):
                raise each
            else:
                found.append(each[0])
                warnings.update(dict.fromkeys(each[1]))
                errors += grouping.member_errors(f"#/tasks/{place}", specs[place])
        if errors:
            raise Invalid(errors[0].detail, errors=errors[:50])
        return found, builtins.list(warnings)

    def _members(
        self,
        group: TaskGroup,
        specs: Sequence[TaskSpec],
        above: Sequence[Lineage],
        ids: Sequence[str],
        actor: Actor,
        origin: Origin,
        now: int,
        digest: str = "",
    ) -> builtins.list[Created]:
        created: builtins.list[Created] = []
        for task_id, spec, lineage in zip(ids, specs, above, strict=True):
            links = replace(lineage.links, group_id=group.id)
            new = NewTask(id=task_id, spec=spec, links=links, origin=origin, draws=lineage.draws)
            created.append(self._settler.handing.create(new, now, actor.tenant, actor.id))
        if digest:
            # The first one says what the request was, to tell a repetition from another request with its key.
            task, payload, session, move = created[0]
            task = replace(task, digest=digest)
            created[0] = (task, payload, session, replace(move, after=task))
        return created

    async def _added_before(self, first: str, digest: str) -> bool:
        (known,) = await self._ledger.load([first], fresh=True)
        if known is not None and known.digest != digest:
            raise IdempotencyMismatch("this idempotency key was used for other tasks")
        return known is not None

    async def _under_way(self, group: TaskGroup, member: str) -> bool:
        (task,) = await self._ledger.load([member], fresh=True)
        return task is not None and task.links.group_id == group.id and not task.final

    # --- seeing -------------------------------------------------------------------------------------------------------

    async def get(self, actor: Actor, group_id: str) -> GroupView:
        """Return a group with its members counted by state. Raises NotFound."""
        allow(actor, "groups.get", group_id)
        return await self._view(await self._one(actor, group_id))

    async def _view(self, group: TaskGroup) -> GroupView:
        return view_group(group, None if group.final else await count_members(self._store, group))

    async def _one(self, actor: Actor, group_id: str) -> TaskGroup:
        (row,) = await self._store.get(_KIND, [group_id])
        group = None if row is None else read_group(row)
        if group is None or group.tenant != actor.tenant:
            raise NotFound("no such group")
        return group

    async def list(
        self,
        actor: Actor,
        *,
        state: GroupState | None = None,
        name: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[GroupView]:
        """Return a page of groups, newest first; members are counted only in those that have ended."""
        allow(actor, "groups.list")
        where = [Where("tenant", "eq", actor.tenant)]
        if state is not None:
            where.append(Where("state", "eq", state.value))
        if name is not None:
            where.append(Where("name", "eq", name))
        after = None if cursor is None else decode_cursor("groups", cursor, 1)
        rows = await self._store.find(_KIND, Query(where=where, descending=True, after=after, limit=limit + 1))
        shown = rows[:limit]
        return Page(
            items=[view_group(read_group(row)) for row in shown],
            next_cursor=encode_cursor("groups", [shown[-1].id]) if len(rows) > limit else None,
        )

    async def wait(self, actor: Actor, group_id: str, seconds: float) -> GroupView:
        """Return a group when it has ended, or as it is after so many seconds, at most 60. Raises NotFound."""
        future = self._waiters.expect(group_id)
        try:
            allow(actor, "groups.get", group_id)
            if not (await self._one(actor, group_id)).final:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(seconds, WAIT_MAX_SECONDS)):
                        await future
            return await self.get(actor, group_id)
        finally:
            self._waiters.abandon(group_id, future)

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear that groups ended, by whatever server. Called with all facts, on the loop."""
        if self._waiters:
            for stored in facts:
                if stored.fact.type in _ENDED:
                    self._waiters.ended(stored.fact.subject)

    # --- steering -----------------------------------------------------------------------------------------------------

    async def seal(self, actor: Actor, group_id: str) -> GroupView:
        """Say that no more tasks come from outside; one that is not open stays as it is. Raises NotFound."""
        allow(actor, "groups.seal", group_id)
        for tried in range(_TRIES):
            group = await self._one(actor, group_id)
            if group.state is not GroupState.OPEN:
                return await self._view(group)
            now = self._clock.now()
            after = grouping.sealed(group, now)
            if await self._write(after, [group_fact("group.sealed", after, actor.id, now)]):
                self.keeper.look(group_id)
                return await self.get(actor, group_id)
            await asyncio.sleep(_PAUSE_SECONDS * tried)
        raise Conflict("too many changes at once")

    async def cancel(self, actor: Actor, group_id: str, reason: str = "") -> GroupView:
        """Cancel all members, with an operation that is carried on until it is done; the group ends `cancelled` after the last of them.

        Raises:
            NotFound: no such group.
            InvalidTransition: it has ended.
        """
        allow(actor, "groups.cancel", group_id)
        if errors := text_errors("#/reason", reason, REASON_MAX):
            raise Invalid(errors[0].detail, errors=errors)
        for tried in range(_TRIES):
            group = await self._one(actor, group_id)
            if group.state is GroupState.CANCELLING:
                return await self._view(group)
            request = OperationRequest(verb="cancel", where=Selection(group=group_id), reason=reason)
            operation = self._operation(actor, group, request)
            now = operation.created_at
            asked = Request(at=now, by=actor.id, reason=reason)
            after = grouping.cancelling(group, asked, operation.id)
            facts = [group_fact("group.cancel_requested", after, actor.id, now, reason=reason)]
            if await self._write(after, facts, operation, actor):
                return await self.get(actor, group_id)
            await asyncio.sleep(_PAUSE_SECONDS * tried)
        raise Conflict("too many changes at once")

    async def retry(self, actor: Actor, group_id: str) -> GroupView:
        """Have the members tried again that did not complete: new tasks take their places, and the group ends anew when they have.

        Raises:
            NotFound: no such group.
            InvalidTransition: it has not ended, or all members completed.
        """
        allow(actor, "groups.retry", group_id)
        for tried in range(_TRIES):
            group = await self._one(actor, group_id)
            wanted = Selection(group=group_id, state=[*grouping.SPOILED])
            operation = self._operation(actor, group, OperationRequest(verb="retry", where=wanted), rejoin=True)
            now = operation.created_at
            after = grouping.retried(group, now, operation.id)
            if await self._write(after, [group_fact("group.retried", after, actor.id, now)], operation, actor):
                return await self.get(actor, group_id)
            await asyncio.sleep(_PAUSE_SECONDS * tried)
        raise Conflict("too many changes at once")

    def _operation(self, actor: Actor, group: TaskGroup, request: OperationRequest, rejoin: bool = False) -> Operation:
        # Never before the newest member, whatever the clock of the server that added it.
        now = max(self._clock.now(), group.changed_at)
        narrow = replace(request, where=narrowed(request.verb, request.where))
        return replace(new_operation(self._ids.new("op"), actor, narrow, now), rejoin=rejoin)

    async def _write(
        self,
        group: TaskGroup,
        facts: builtins.list[Fact],
        operation: Operation | None = None,
        actor: Actor = SYSTEM,
    ) -> bool:
        """Write a group, and the operation that is begun with it; returns whether it was as it was read."""
        writes: builtins.list[Entity] = [write_group(group)]
        if operation is not None:
            writes.append(write_operation(operation))
            facts.append(operation_fact("operation.started", operation, actor.id, operation.created_at))
        (problem,) = await self._store.commit([Change(writes, facts=facts)])
        if problem is not None and not isinstance(problem, Conflict):
            raise problem
        return problem is None

    # --- what time brings ---------------------------------------------------------------------------------------------

    async def forget(self, before: int) -> int:
        """Remove groups that ended before a moment, and seal those that are open with nothing added since; returns how many."""
        rows = await self._store.find(
            _KIND, Query(where=[Where("finished", "lt", before)], order="finished", limit=_BATCH)
        )
        if rows:
            await self._store.commit([Change((), [Key(row.kind, row.id, row.version)]) for row in rows])
        idle = await self._store.find(_KIND, Query(where=[Where("idle", "lt", before)], order="idle", limit=_BATCH))
        now = self._clock.now()
        for row in idle:
            after = grouping.sealed(read_group(row), now)
            await self._write(after, [group_fact("group.sealed", after, SYSTEM.id, now, reason="idle")])
        return len(rows) + len(idle)


def _within(pointer: str, problem: Invalid) -> builtins.list[FieldError]:
    return [replace(error, pointer=pointer + error.pointer.removeprefix("#")) for error in problem.errors]
