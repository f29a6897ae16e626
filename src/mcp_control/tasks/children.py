"""Children: what an agent submits with its own credential while it works on a task, for that task. Pure."""

from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.errors import FieldError, Invalid, LeaseSuperseded
from mcp_control.tasks.model import Origin, Task, TaskSpec

_TRUST: Final = ("trusted", "external", "tainted")


def child_of(parent: Task, agent_id: str, lease_token: str, spec: TaskSpec) -> TaskSpec:
    """Return the submission of a child of a task: it names its parent, and its payload is trusted no more than the parent's.

    Raises:
        LeaseSuperseded: the agent does not hold the parent, or presents another lease than the live one.
        Invalid: it names another parent, or has a key by which it could replace or show tasks of others.
    """
    if parent.lease is None or parent.lease.agent_id != agent_id or not parent.lease.opens(lease_token):
        raise LeaseSuperseded("the lease is not the live one")
    found: list[FieldError] = []
    if spec.parent_id not in (None, parent.id):
        found.append(
            FieldError(pointer="#/task/parent_id", code="invalid-value", detail="is the task it is submitted for")
        )
    for name, given in (("unique", spec.unique), ("debounce", spec.debounce)):
        if given is not None:
            detail = f"a child that an agent submits has no {name}"
            found.append(FieldError(pointer=f"#/task/{name}", code="invalid-value", detail=detail))
    if found:
        raise Invalid(found[0].detail, errors=found)
    return replace(spec, parent_id=parent.id, trust=max(spec.trust, parent.trust, key=_TRUST.index))


def origin_of(parent: Task, origin: Origin) -> Origin:
    """Return where a child comes from: from its parent, so that its idempotency key means the same whichever agent holds that."""
    return replace(origin, principal=parent.id, on_behalf_of=parent.origin.on_behalf_of or parent.origin.principal)
