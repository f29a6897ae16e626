"""Tasks to and from the store and the wire: encoding, index values, views, facts."""

from datetime import datetime
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.clock import to_datetime
from mcp_control.storage.ports import Queued, Store, waiting_value
from mcp_control.tasks.budgets import amounts, shown
from mcp_control.tasks.due import due_at
from mcp_control.tasks.model import FINAL_STATES, GENERATION_KIND, LogChunk, LogLine, Task, TaskState
from mcp_control.tasks.view_model import TaskView
from mcp_control.tasks.wire import Assignment

CURRENT: Final = "current"  # the one id of its kind
CANCEL_GRACE_MS: Final = 20_000
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Task).decode
_decode_lines: Final = msgspec.msgpack.Decoder(list[LogLine]).decode


def unique_key(task: Task) -> str | None:
    """Return what makes an idempotency key unique: it counts per tenant and caller, so that nobody can probe another's keys."""
    return key_of(task.tenant, task.origin.principal, task.idempotency_key)


def key_of(tenant: str, principal: str, key: str | None) -> str | None:
    """Return what the index of idempotency keys has for a key of this caller."""
    return None if key is None else f"{tenant}\x1f{principal}\x1f{key}"


def write(task: Task, payload: bytes | None = None, result: bytes | None = None) -> tuple[Task, Entity]:
    """Return the task as it is after this write, and the entity that writes it over the version it was read at."""
    read_at = task.version
    after = replace(task, version=read_at + 1)
    state, lease, links = after.state, after.lease, after.links
    known = lease or after.last_lease
    final = state in FINAL_STATES
    moves_on = after.hold is None
    # All fields in the order they are declared in, which a store may take as they are.
    index: dict[str, str | int | None] = {
        "tenant": after.tenant,
        "state": str(state),
        "type": after.type,
        "run": links.run_id,
        "agent": known.agent_id if known else None,
        "holder": lease.instance_id if lease else None,
        "unique_key": unique_key(after),
        "due": None if final else due_at(after, CANCEL_GRACE_MS),
        "finished": after.finished_at if final else None,
        "waiting": waiting_value(after.lane, after.rank) if state is TaskState.QUEUED and moves_on else None,
        "gate": waiting_value(after.waits_at, after.rank) if state is TaskState.BLOCKED and moves_on else None,
        "group_id": links.group_id,
    }
    cold: dict[str, bytes] = {}
    if payload is not None:
        cold["payload"] = payload
    if result is not None:
        cold["result"] = result
    return after, Entity("task", after.id, read_at, index, _encode(after), cold)


def read(entity: Entity) -> Task:
    """Return the task in a stored entity."""
    return _decode(entity.hot)


def readable(entity: Entity) -> Task | None:
    """Return the task in a stored entity, None where it cannot be decoded: one such row must not stop what goes over many."""
    try:
        return _decode(entity.hot)
    except msgspec.MsgspecError:
        return None


def task_fact(kind: str, task: Task, actor: str, now: int, **more: object) -> Fact:
    """Return the fact that `kind` happened to a task, with what most readers want to know of it."""
    data: dict[str, object] = {"type": task.type, "state": task.state}
    if task.attempt:
        data["attempt"] = task.attempt
    if task.lease is not None:
        data["agent_id"] = task.lease.agent_id
    if task.fairness is not None and task.fairness.key:
        data["share"] = task.fairness.key
    links = task.links
    run = links.run_id or ""
    if run:
        data["stage"] = links.stage
        if links.item is not None:
            data["item"] = links.item
    if links.group_id is not None:
        data["group_id"] = links.group_id
    if task.reason:
        data["reason"] = task.reason
    if task.failure is not None:
        data["code"] = task.failure.code
        data["error_class"] = task.failure.error_class
        data["message"] = task.failure.message[:500]
    if more:
        data.update(more)
    return fact(kind, task.id, actor, now, data, tenant=task.tenant, run=run)


def write_log(task: Task, lines: list[LogLine]) -> Entity:
    """Return the entity that keeps lines logged by a task; they follow the `task.log_lines` that are there already."""
    first = task.log_lines
    hot = _encode(lines)
    return Entity("log", f"{task.id}-{first}", 0, {"task": task.id, "first": first}, hot)


def read_log(entity: Entity) -> LogChunk:
    """Return the lines in a stored log entity."""
    first = entity.index["first"]
    task = entity.index["task"]
    return LogChunk(task_id=str(task), first=int(first or 0), lines=_decode_lines(entity.hot))


async def generation_of(store: Store) -> int:
    """Return the generation of a store: 1, or what the newest restore of a backup left."""
    (found,) = await store.get(GENERATION_KIND.name, [CURRENT])
    return 1 if found is None else int(found.hot)


def write_generation(generation: int) -> Entity:
    """Return the entity that keeps the generation of a store, at version 1."""
    return Entity(GENERATION_KIND.name, CURRENT, 1, {}, str(generation).encode())


def assignment(task: Task, payload: bytes) -> Assignment:
    """Return what an agent is told of a task it holds."""
    lease = task.lease
    if lease is None:
        raise ValueError("a task without a lease cannot be handed out")
    links = task.links
    return Assignment(
        task_id=task.id,
        type=task.type,
        attempt=task.attempt,
        fence=task.fence,
        lease_token=lease.token,
        payload=msgspec.Raw(payload),
        max_attempts=task.retry.max_attempts,
        timeout_ms=task.timeout_ms,
        deadline_at=task.deadline_at,
        run_id=links.run_id,
        stage=links.stage,
        item=links.item,
        labels=task.labels,
        budget=None if task.usage is None or not task.draws else shown(task.usage.left),
        traceparent=task.traceparent,
        slots=task.needs.slots,
        answers=task.answers,
    )


def _moment(millis: int | None) -> datetime | None:
    return None if millis is None else to_datetime(millis)


def _eta(task: Task, now: int) -> datetime | None:
    if task.state is not TaskState.RUNNING or task.started_at is None or task.progress <= 0:
        return None
    return to_datetime(task.started_at + round((now - task.started_at) / task.progress))


def view(
    task: Task, now: int, payload: bytes | None = None, result: bytes | None = None, warnings: list[str] | None = None
) -> TaskView:
    """Return the task as callers see it; lease tokens stay inside."""
    lease = task.lease or task.last_lease
    links = task.links
    if task.emptied_at is not None:
        payload = result = None
    return TaskView(
        id=task.id,
        type=task.type,
        state=task.state,
        state_since=to_datetime(task.state_at),
        created_at=to_datetime(task.created_at),
        reason=task.reason,
        message=task.message,
        priority=task.priority,
        progress=task.progress,
        progress_message=task.progress_message,
        type_version=task.type_version,
        labels=task.labels,
        needs=task.needs,
        limits=task.gates,
        retry=task.retry,
        attempt=task.attempt,
        attempts=task.attempts,
        attempts_left_out=task.attempt - (task.lease is not None) - len(task.attempts),
        agent_id=lease.agent_id if lease else None,
        fence=task.fence,
        failure=task.failure,
        run_at=_moment(task.not_before),
        deadline=_moment(task.deadline_at),
        timeout=None if task.timeout_ms is None else task.timeout_ms / 1000,
        started_at=_moment(task.started_at),
        finished_at=_moment(task.finished_at),
        eta=_eta(task, now),
        cancel_requested=task.cancel is not None,
        cancel_reason=task.cancel.reason if task.cancel else "",
        held=task.hold is not None,
        held_by=task.hold.by if task.hold else "",
        hold_reason=task.hold.reason if task.hold else "",
        idempotency_key=task.idempotency_key,
        run_id=links.run_id,
        stage=links.stage,
        item=links.item,
        parent_id=links.parent_id,
        retry_of=links.retry_of,
        context_id=links.context_id,
        group_id=links.group_id,
        log_lines=task.log_lines,
        log_dropped=task.log_dropped,
        usage=None if task.usage is None else amounts(task.usage.total),
        budgets=task.draws,
        warnings=warnings or [],
        etag=str(task.version),
        payload_removed_at=_moment(task.emptied_at),
        payload=msgspec.UNSET if payload is None else msgspec.Raw(payload),
        result=msgspec.UNSET if result is None else msgspec.Raw(result),
    )


def queued(task: Task) -> Queued:
    """Return a task as an entry of its lane."""
    return Queued(task.lane, task.id, task.rank)
