"""Groups to and from the store and the wire."""

from hashlib import sha256
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.clock import to_datetime
from mcp_control.security.model import Actor
from mcp_control.tasks.group_model import (
    FAILED_SHOWN,
    GROUP_KIND,
    CallbackPayload,
    Callbacks,
    Event,
    GroupRequest,
    GroupState,
    GroupSummary,
    GroupView,
    MoreTasks,
    TaskGroup,
)
from mcp_control.tasks.grouping import callbacks
from mcp_control.tasks.model import FINAL_STATES, Origin, TaskSpec, TaskState
from mcp_control.tasks.records import key_of

CALLBACKS: Final = "callbacks"
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(TaskGroup).decode
# As JSON: payloads are carried as they came.
_encode_callbacks: Final = msgspec.json.Encoder().encode
_decode_callbacks: Final = msgspec.json.Decoder(Callbacks).decode


def digest_of_group(request: GroupRequest | MoreTasks) -> str:
    """Return the SHA-256 of everything a request says but its key, to tell a repetition from another request."""
    return sha256(_encode_callbacks(replace(request, idempotency_key=None))).hexdigest()


def new_group(group_id: str, actor: Actor, request: GroupRequest, origin: Origin, now: int) -> TaskGroup:
    """Return the group that a checked request begins as."""
    return TaskGroup(
        id=group_id,
        version=0,
        tenant=actor.tenant,
        name=request.name,
        state=GroupState.OPEN if request.open else GroupState.SEALED,
        state_at=now,
        created_at=now,
        changed_at=now,
        origin=origin,
        total=len(request.tasks),
        events=[event for event, _ in callbacks(request.on)],
        idempotency_key=request.idempotency_key,
        digest="" if request.idempotency_key is None else digest_of_group(request),
    )


def write_group(group: TaskGroup, on: Callbacks | None = None) -> Entity:
    """Return the entity that writes a group over the version it was read at; `on` with a new one."""
    index: dict[str, str | int | None] = {
        "tenant": group.tenant,
        "state": group.state.value,
        "name": group.name or None,
        "unique_key": key_of(group.tenant, group.origin.principal, group.idempotency_key),
        "active": None if group.final else group.created_at,
        "idle": group.changed_at if group.state is GroupState.OPEN else None,
        "finished": group.finished_at,
    }
    cold = {} if on is None else {CALLBACKS: _encode_callbacks(on)}
    return Entity(GROUP_KIND.name, group.id, group.version, index, _encode(group), cold)


def read_group(row: Entity) -> TaskGroup:
    return replace(_decode(row.hot), version=row.version)


def read_callbacks(row: Entity) -> Callbacks:
    """Return the callbacks of a stored group that was read with them."""
    return _decode_callbacks(row.cold[CALLBACKS])


def group_fact(kind: str, group: TaskGroup, actor: str, now: int, **more: object) -> Fact:
    """Return the fact that `kind` happened to a group."""
    data: dict[str, object] = {"state": group.state.value, "total": group.total}
    if group.name:
        data["name"] = group.name
    if group.round:
        data["round"] = group.round
    return fact(kind, group.id, actor, now, data | more, tenant=group.tenant)


def callback_spec(
    group: TaskGroup, event: Event, spec: TaskSpec, counts: dict[TaskState, int], failed: list[str]
) -> TaskSpec:
    """Return the submission of a callback. `failed` may have one id more than is shown, to say that there are more."""
    told = GroupSummary(
        id=group.id,
        name=group.name,
        event=event,
        state=group.state,
        round=group.round,
        total=group.total,
        counts=counts,
        failed=failed[:FAILED_SHOWN],
        more_failed=len(failed) > FAILED_SHOWN,
    )
    payload = _encode_callbacks(CallbackPayload(group=told, payload=spec.payload))
    return replace(spec, payload=msgspec.Raw(payload))


def view_group(
    group: TaskGroup, counts: dict[TaskState, int] | None = None, warnings: list[str] | None = None
) -> GroupView:
    """Return a group as callers see it; `counts` where they were counted now."""
    if counts is None and group.final:
        counts = {TaskState(name): count for name, count in group.counts.items()}
    done = None if counts is None else sum(count for state, count in counts.items() if state in FINAL_STATES)
    return GroupView(
        id=group.id,
        name=group.name,
        state=group.state,
        state_since=to_datetime(group.state_at),
        created_at=to_datetime(group.created_at),
        created_by=group.origin.principal,
        total=group.total,
        counts=counts,
        done=done,
        progress=None if done is None else 1.0 if group.final else min(1.0, done / max(1, group.total)),
        callbacks={event: group.called.get(event, "") for event in group.events},
        first_failure=group.first_failure,
        round=group.round,
        operation=group.operation,
        cancel_reason=group.cancel.reason if group.cancel else "",
        finished_at=None if group.finished_at is None else to_datetime(group.finished_at),
        warnings=warnings or [],
    )
