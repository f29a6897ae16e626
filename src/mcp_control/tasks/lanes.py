"""Lanes: queued tasks that ask the same of an agent wait in the same lane (architecture, section 4)."""

from hashlib import blake2b

import msgspec

from mcp_control.agents.matching import Demand
from mcp_control.tasks.model import Needs, Task

_encode = msgspec.json.Encoder(order="sorted").encode
_NO_NEEDS = Needs()


def lane_key(tenant: str, task_type: str, type_version: str, needs: Needs) -> str:
    """Return the key of the lane for tasks of this tenant with these requirements: readable type, then a digest of the rest.

    The type is shown so that people recognise a lane; a task without special needs has no digest part.
    """
    if type_version == "*" and needs == _NO_NEEDS:
        return f"{tenant}/{task_type}"
    digest = blake2b(_encode([type_version, needs]), digest_size=10).hexdigest()
    return f"{tenant}/{task_type}/{digest}"


def demand_of(task: Task) -> Demand:
    """Return what the task's lane asks of an agent."""
    needs = task.needs
    return Demand(
        type=task.type,
        type_version=task.type_version,
        capabilities=needs.capabilities,
        labels=needs.labels,
        resources=needs.resources,
        slots=needs.slots,
        agent=needs.agent,
    )
