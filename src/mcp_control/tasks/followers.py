"""The hook through which a finished task moves something larger on, in the same change (decisions, "Server").

Completion and the run's advance are one Change: either both are durable or neither is. The pipeline engine fills this hook; tasks know
nothing of pipelines.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from mcp_control.kernel.changes import Entity, Fact
from mcp_control.tasks.model import Links, Origin, Task, TaskSpec


class NewTask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A task to create as part of an advance. Its id is derived, so that deciding twice creates it once.

    `draws`: whose budgets it draws from beside its own.
    """

    id: str
    spec: TaskSpec
    links: Links
    origin: Origin
    draws: list[str] = []


class Finished(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A task of a run in its final state. `result` is the JSON it returned, only when completed."""

    task: Task
    result: bytes | None = None


class Advance(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What follows: entities and facts to commit, tasks to create, ids of tasks to cancel."""

    writes: list[Entity] = []
    facts: list[Fact] = []
    submit: list[NewTask] = []
    cancel: list[str] = []


class Follower(Protocol):
    """Moves runs on. Called for one run at a time, never twice at once for the same run on one server."""

    async def follow(self, run_id: str, finished: Sequence[Finished], now: int) -> Advance:
        """Load the run and decide what follows from these tasks. Commits nothing."""
        ...

    def settled(self, run_id: str, advance: Advance, ok: bool) -> None:
        """Hear how the commit of an advance ended. After `ok=False` the stored run is newer than thought: forget it, be asked again."""
        ...
