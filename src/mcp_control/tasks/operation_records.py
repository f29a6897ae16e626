"""Operations to and from the store and the wire."""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.clock import to_datetime
from mcp_control.security.model import Actor
from mcp_control.tasks.operation_model import OPERATION_KIND, Operation, OperationRequest, OperationView

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Operation).decode


def new_operation(operation_id: str, actor: Actor, request: OperationRequest, now: int) -> Operation:
    """Return the operation that a checked request begins as."""
    return Operation(
        id=operation_id,
        version=0,
        tenant=actor.tenant,
        verb=request.verb,
        where=request.where,
        reason=request.reason,
        priority=request.priority if isinstance(request.priority, int) else None,
        agent=request.agent,
        limit=request.expected_at_most,
        created_at=now,
        created_by=actor.id,
    )


def write_operation(operation: Operation) -> Entity:
    """Return the entity that writes an operation over the version it was read at."""
    index: dict[str, str | int | None] = {
        "tenant": operation.tenant,
        "running": operation.created_at if operation.state == "running" else None,
        "finished": operation.finished_at,
    }
    return Entity(OPERATION_KIND.name, operation.id, operation.version, index, _encode(operation))


def read_operation(row: Entity) -> Operation:
    return replace(_decode(row.hot), version=row.version)


def operation_fact(kind: str, operation: Operation, actor: str, now: int) -> Fact:
    data = {
        "verb": operation.verb,
        "matched": operation.matched,
        "changed": operation.changed,
        "refused": operation.refused,
    }
    return fact(kind, operation.id, actor, now, data, tenant=operation.tenant)


def view_operation(operation: Operation) -> OperationView:
    """Return an operation as callers see it."""
    return OperationView(
        id=operation.id,
        verb=operation.verb,
        state=operation.state,
        where=operation.where,
        matched=operation.matched,
        changed=operation.changed,
        refused=operation.refused,
        first=operation.first,
        problems=operation.problems,
        reason=operation.reason,
        priority=operation.priority,
        agent=operation.agent,
        created_at=to_datetime(operation.created_at),
        created_by=operation.created_by,
        finished_at=None if operation.finished_at is None else to_datetime(operation.finished_at),
    )
