"""Lanes: queued tasks of one share and class of priority that ask the same of an agent wait in the same lane (architecture, section 4)."""

from hashlib import blake2b

import msgspec
from msgspec.structs import replace

from mcp_control.agents.balancing import bucket_of
from mcp_control.agents.matching import Demand
from mcp_control.agents.reserving import load_of
from mcp_control.agents.sessions import Session
from mcp_control.tasks.fairness import MEDIUM, Line, grade_of
from mcp_control.tasks.model import DEFAULT_PRIORITY, NO_NEEDS, Needs, Task

_encode = msgspec.json.Encoder(order="sorted").encode


class Lane:
    """What is known of a lane: what it asks, who fits, and bounds of what waits in it.

    `waiting` may be too high and `rank`, that of the first, too low; both correct themselves when entries are taken. `home` is the
    agent that its tasks belong to, where they have a key.
    """

    __slots__ = ("demand", "home", "key", "line", "load", "pushed", "rank", "sessions", "tenant", "waiting")

    def __init__(self, key: str, line: Line, demand: Demand) -> None:
        self.key = key
        self.line = line
        self.tenant = line.share.tenant
        self.demand = demand
        self.load = load_of(demand.slots, demand.resources)
        self.home: str | None = None
        self.waiting = 0
        self.pushed = 0
        self.rank = 0
        self.sessions: set[Session] = set()

    def room(self, session: Session) -> int:
        """Return how many of its tasks a session can take now."""
        return session.room(self.load, self.demand.type)


def lane_key(
    tenant: str, task_type: str, type_version: str, needs: Needs, priority: int = DEFAULT_PRIORITY, share: str = ""
) -> str:
    """Return the key of the lane for tasks of this tenant with these requirements, of this share and class of priority.

    It is the readable type, so that people recognise a lane, then the class unless it is medium, then a digest of the rest; a task
    without special needs and share has no digest part.
    """
    if needs.sticky is not None:
        # Keys of one bucket share a lane: as many keys as there may be, there are never more lanes than buckets.
        needs = replace(needs, sticky=replace(needs.sticky, key=str(bucket_of(needs.sticky.key))))
    grade = grade_of(priority)
    key = f"{tenant}/{task_type}" if grade == MEDIUM else f"{tenant}/{task_type}!{grade}"
    if type_version == "*" and needs == NO_NEEDS and not share:
        return key
    digest = blake2b(_encode([type_version, needs, share] if share else [type_version, needs]), digest_size=10)
    return f"{key}/{digest.hexdigest()}"


def lane_of(task: Task) -> str:
    """Return the key of the lane that a task belongs in as it is."""
    share = "" if task.fairness is None else task.fairness.key
    return lane_key(task.tenant, task.type, task.type_version, task.needs, task.priority, share)


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
        bucket=None if needs.sticky is None else bucket_of(needs.sticky.key),
        waits=needs.sticky is not None and needs.sticky.mode == "hard",
        strategy=needs.balancing,
    )
