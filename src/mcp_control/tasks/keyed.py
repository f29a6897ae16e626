"""Submissions that look at what is there: singletons, debounced tasks, and tasks over a rate that are dropped.

Who has a key is an entity whose id is made of the key (`limiting.hold_id`). A submission creates it, or takes it over, in the change that
creates the task, so of two submissions at once, on whatever servers, one is refused and looks again.
"""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import (
    Conflict,
    Duplicate,
    InvalidTransition,
    NotUnique,
    Overloaded,
    Problem,
    Throttled,
)
from mcp_control.security.model import Actor
from mcp_control.storage.ports import Store
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.followers import NewTask
from mcp_control.tasks.gating import postpone
from mcp_control.tasks.ledger import Decide, Group, Intent, Ledger, Move
from mcp_control.tasks.limit_model import HOLD_KIND, Debounce, Hold
from mcp_control.tasks.limiting import (
    free_number,
    gate_name,
    hold_id,
    key_hold,
    key_name,
    new_hold,
    next_free,
    own_gates,
    read_taken,
    room_of,
)
from mcp_control.tasks.limits import Limits
from mcp_control.tasks.model import HELD_STATES, Request, Task, TaskSpec, TaskState
from mcp_control.tasks.records import task_fact, unique_key
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.transitions import request_cancel

_TRIES: Final = 20


class Kept(msgspec.Struct, frozen=True):
    """What came of a submission: its task, and whether it was created now."""

    task: Task
    created: bool


def is_keyed(spec: TaskSpec) -> bool:
    """Say whether a submission has to look at what is there."""
    if spec.unique is not None or spec.debounce is not None:
        return True
    return bool(spec.limits) and any(limit.on_excess == "drop" for limit in spec.limits)


class KeyedSubmission:
    """Accepts such submissions, one at a time."""

    def __init__(
        self, store: Store, clock: Clock, ledger: Ledger, settler: Settler, dispatcher: Dispatcher, limits: Limits
    ) -> None:
        self._store = store
        self._clock = clock
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self.limits = limits

    async def submit(self, actor: Actor, new: NewTask) -> Kept:
        """Accept a submission, or answer with the task that is there.

        Raises:
            NotUnique: another task has the key. Throttled: over a rate that drops.
            Duplicate: the idempotency key was used before.
        """
        spec = new.spec
        for _ in range(_TRIES):
            name = "" if spec.unique is None and spec.debounce is None else key_name(actor.tenant, spec)
            replaced: Move | None = None
            hold: Hold | None = None
            if name:
                hold = key_hold(name, spec)
                (row,) = await self._store.get(HOLD_KIND.name, [hold_id(name, 0)])
                if row is not None:
                    (there,) = await self._ledger.load([read_taken(row).holder], fresh=True)
                    if there is None or not any(one.name == name for one in there.holds):
                        continue  # it has just let go
                    if spec.debounce is not None:
                        waiting = await self._postponed(actor, there, spec, spec.debounce)
                        if waiting is None:
                            continue
                        return Kept(waiting, False)
                    replaced = await self._taken(actor, new, there, name)
                    if replaced is None:
                        return Kept(there, False)
                    hold = replace(hold, version=row.version)
            outcome = await self._create(actor, new, hold, replaced)
            if isinstance(outcome, Task):
                return Kept(outcome, True)
            if isinstance(outcome, Duplicate) or not isinstance(outcome, Conflict):
                raise outcome
        raise Overloaded("too many submissions with this key at once")

    async def _create(self, actor: Actor, new: NewTask, hold: Hold | None, replaced: Move | None) -> Task | Problem:
        now = self._clock.now()
        spec = new.spec
        if spec.debounce is not None:
            spec = replace(spec, run_at=to_datetime(now + round(spec.debounce.seconds * 1000)))
            new = replace(new, spec=spec)
        task, payload, _, move = self._settler.handing.create(new, now, actor.tenant, actor.id, place=False)
        if spec.debounce is not None:
            task = replace(task, reason="debounced", message="waits for the last submission with its key")
        holds = [] if hold is None else [hold]
        dropping = [limit.key for limit in spec.limits if limit.on_excess == "drop"]
        if dropping and (known := await self._repeated(task)) is not None:
            return known
        holds += [await self._start(actor.tenant, spec, key, now) for key in dropping]
        task = replace(task, holds=holds)
        moves = [replace(move, after=task, taken=len(holds))]
        if replaced is not None:
            moves.insert(0, replaced)
        try:
            (outcome,) = await self._ledger.commit([Group(moves)])
        except BaseException:
            self._settler.handing.doubt([one.after.id for one in moves])
            raise
        if isinstance(outcome, Problem):
            return await self._repeated(task) or outcome
        if replaced is not None:
            await self._dispatcher.withdraw(replaced.after)
        task = outcome[-1]
        await self._settler.handing.begin([(task, payload, None)])
        return task

    async def _repeated(self, task: Task) -> Duplicate | None:
        """Return the task that the idempotency key stands for, where the submission was refused for what that task holds."""
        key = unique_key(task)
        if key is None:
            return None
        rows = await self._store.find("task", Query(where=[Where("unique_key", "eq", key)], limit=1))
        return Duplicate(index="task_key", existing=rows[0].id) if rows else None

    async def _start(self, tenant: str, spec: TaskSpec, key: str, now: int) -> Hold:
        """Return a start of a rate for a task that is not to wait for one. Raises Throttled."""
        gate = next(gate for gate in own_gates(spec.limits) if gate.key == key and gate.rate is not None)
        name = gate_name(tenant, gate)
        room = await self.limits.room(name)
        number = free_number(room.taken, room_of(gate), now)
        if number is None:
            at = next_free(room.taken, now)
            raise Throttled(
                f"over the rate of {key}", retry_after=None if at is None else max(1, -(-(at - now) // 1000)), key=key
            )
        return new_hold(name, gate, number, room.versions.get(number, 0))

    async def _taken(self, actor: Actor, new: NewTask, there: Task, name: str) -> Move | None:
        """Return the move that makes room for a singleton; None where the task that is there is the answer. Raises NotUnique."""
        unique = new.spec.unique
        assert unique is not None
        if unique.on_conflict == "return_existing":
            return None
        if new.spec.idempotency_key is not None and there.idempotency_key == new.spec.idempotency_key:
            raise Duplicate(index="task_key", existing=there.id)
        if unique.on_conflict == "reject" or there.state in HELD_STATES or there.links.run_id:
            raise NotUnique(f"a task with the key {unique.key} is there already", existing=there.id)
        now = self._clock.now()
        free = replace(there, holds=[hold for hold in there.holds if hold.name != name])
        after = request_cancel(free, Request(at=now, by=actor.id, reason=f"replaced by {new.id}"))
        return Move(after, [task_fact("task.cancelled", after, actor.id, now)])

    async def _postponed(self, actor: Actor, there: Task, spec: TaskSpec, debounce: Debounce) -> Task | None:
        (result,) = await self._settler.settle(
            [Intent(there.id, _debouncing(actor.id, bytes(spec.payload), debounce, self._clock.now()))]
        )
        return result if isinstance(result, Task) else None


def _debouncing(actor: str, payload: bytes, debounce: Debounce, now: int) -> Decide:
    """Give a debounced task the newest payload, and let it wait anew."""

    def decide(task: Task) -> Move | None:
        if task.state is not TaskState.SCHEDULED or not any(hold.ends == "due" for hold in task.holds):
            raise InvalidTransition("it waits no more", state=task.state.value, allowed=[])
        until = now + round(debounce.seconds * 1000)
        if debounce.max_seconds is not None:
            until = min(until, task.created_at + round(debounce.max_seconds * 1000))
        after = postpone(task, until, now)
        return Move(after, [task_fact("task.debounced", after, actor, now)], payload=payload)

    return decide
