"""Tasks as they are stored, as callers see them, and as agents hear and report them.

Payload and result are JSON bytes that the server does not look into (architecture, section 3, "Payloads are opaque").
"""

from datetime import datetime
from enum import StrEnum
from hmac import compare_digest
from typing import Final, Literal

import msgspec

from mcp_control.agents.model import Resources, Strategy
from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.ask_model import Answered, Asked
from mcp_control.tasks.budget_model import Budget, Ceiling, Usage
from mcp_control.tasks.limit_model import Debounce, Gate, Hold, Limit, Unique


class TaskState(StrEnum):
    """Where a task stands; the glossary of task states.

    scheduled: not before a time, or waiting to retry · blocked: waits for a condition or capacity · queued: waits for an agent ·
    assigned: given to an agent, not yet started · running · input_required: waits for a person, its slot is free · completed ·
    failed: attempts used up or a permanent error; the dead-letter set · cancelled · expired: its deadline passed · rejected: refused
    by policy, a person or matching. The last five are final, and final is final.
    """

    SCHEDULED = "scheduled"
    BLOCKED = "blocked"
    QUEUED = "queued"
    ASSIGNED = "assigned"
    RUNNING = "running"
    INPUT_REQUIRED = "input_required"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"


FINAL_STATES: Final = frozenset(
    {TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED, TaskState.REJECTED}
)
HELD_STATES: Final = frozenset({TaskState.ASSIGNED, TaskState.RUNNING})

ErrorClass = Literal["temporary", "permanent", "critical"]
Cause = Literal["app", "infra", "policy", "budget", "deadline", "timeout", "lost"]
# Given by a factory: a Raw as a plain default cannot be shown in a JSON Schema.
NULL: Final = msgspec.Raw(b"null")
DEFAULT_PRIORITY: Final = 50
PRIORITIES: Final = {"critical": 90, "high": 70, "medium": 50, "low": 30}


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """How often and when to try again. The n-th wait is random between 0 and min(first · factor^(n-1), longest) seconds (full jitter)."""

    max_attempts: int = 3
    first_seconds: float = 1.0
    factor: float = 2.0
    longest_seconds: float = 300.0


class Sticky(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A wish to be done where others with this key are done. `soft`: elsewhere while that agent has no room; `hard`: wait for it."""

    key: str
    mode: Literal["soft", "hard"] = "soft"


class Needs(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What an agent must have beside the task's type.

    Attributes:
        capabilities: capability name to version range (`*`, `2`, `>=1.2,<2`).
        labels: label to the value it must have.
        resources: cores, memory and GPUs it takes for itself while it runs; an agent never holds more than it declared.
        slots: how many slots it takes, 1 to 10,000.
        sticky: tasks of one key go to the same agent.
        balancing: how to choose among agents that fit; None is the server's `dispatch.strategy`.
        agent: name or id of the only agent that may take it.
    """

    capabilities: dict[str, str] = {}
    labels: dict[str, str] = {}
    resources: Resources = Resources()
    slots: int = 1
    sticky: Sticky | None = None
    balancing: Strategy | None = None
    agent: str | None = None


class Fairness(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """Whose share of the slots a task takes: inside a class of priority, shares that wait are served by their weights.

    Attributes:
        key: names the share inside the tenant; empty is the tenant's own.
        weight: its part in relation to those of the others, 0.1 to 100; that of the newest task counts, unless an operator gave one.
    """

    key: str = ""
    weight: float = 1.0


# One value for all that say nothing: a default is left out of what is stored only where it is the very same object.
NO_NEEDS: Final = Needs()
DEFAULT_RETRY: Final = RetryPolicy()


class Origin(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Through which door and request a task came, and for whom."""

    protocol: str = "rest"
    request_id: str = ""
    principal: str = ""
    on_behalf_of: str | None = None


class Links(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """How a task relates to others. `round` counts retries of a stage in a run; `item` numbers fan-out items, -1 the combine task."""

    run_id: str | None = None
    stage: str | None = None
    item: int | None = None
    round: int = 0
    parent_id: str | None = None
    root_id: str | None = None
    depth: int = 0
    retry_of: str | None = None
    context_id: str | None = None
    group_id: str | None = None
    references: list[str] = []


NO_LINKS: Final = Links()


class Lease(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The right to work on a task, held by an agent instance until a committed write ends it."""

    agent_id: str
    instance_id: str
    token: str
    since: int

    def opens(self, token: str) -> bool:
        """Say whether a token presented, which may be any text, is this lease's; takes the same time wherever they differ."""
        return token.isascii() and compare_digest(self.token, token)


class Failure(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Why an attempt or a task failed. `error_class` decides on retries, `cause` says where it came from.

    `retry_after`, seconds, of a temporary one: what it needs is not to be had until then, so the attempt costs none of the task's.
    """

    error_class: ErrorClass = "temporary"
    cause: Cause = "app"
    code: str = "error"
    message: str = ""
    traceback: str = ""
    data: dict[str, object] | None = None
    retry_after: float | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One assignment that ended. `outcome` is completed, failed, timeout, cancelled, lost, released, restored,
    expired, budget or asked."""

    number: int
    agent_id: str
    instance_id: str
    assigned_at: int
    started_at: int | None = None
    ended_at: int
    outcome: str
    failure: Failure | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Somebody asked for something (cancel, hold): when, who and why."""

    at: int
    by: str
    reason: str = ""


class Task(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The stored task. Times are wall milliseconds, durations milliseconds.

    Attributes:
        version: the version of this value in the store.
        type_version: version range of the capability `type`; `*` is any.
        lane: key of the lane it waits in (`lanes.py`).
        order: its place in line: when it came, or when it was to begin.
        rank: what sorts it in its lane, lower first (`ranking.py`).
        attempt: number of the newest attempt, 0 before the first.
        generation, epoch: the fence; the pair strictly grows with every change of holder. `generation` is the store's at the time of
            creation, and is raised when a backup is restored.
        failures: attempts that failed; these count against `retry.max_attempts`, lost and released ones do not.
        lost: leases lost in a row.
        last_lease: the lease under which the task became final, to recognise a repeated report.
        not_before: it stays `scheduled` until then.
        timeout_ms: one attempt may take this long; None is no limit.
        deadline_at: then it ends `expired`.
        reason, message: why it is in its state: a stable code and a sentence.
        hold: somebody holds it back: it is given to no agent until it is let go. What runs goes on.
        log_bytes: of the lines kept; log_dropped: lines that were logged beyond what is kept.
        moved_at: when the attempt last told of progress or logged something.
        retried_as: the newest task that was submitted in place of this one after its end.
        discarded: somebody took this failed task out of the dead-letter set.
        emptied_at: since then its payload and its result are not kept any more.
        digest: SHA-256 of the submission, to compare repetitions of an idempotency key.
        gates: limits it must pass before it is queued; `waits_at` names the one where it waits while it is `blocked`, and `passed` counts
            how often it was sent on to another.
        holds: what it holds of limits and keys (`limiting.py`).
        draws: whose budgets it draws from (ids of tasks and of its run), its own first.
        usage: what it has used; None while nothing was counted.
        asked: the question it waits for, or ended with; answers: those it got, by the keys of their questions (`asking.py`).
        ceiling: when the attempt under way has used up the time of its budgets; of no meaning without a lease.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    type: str
    type_version: str = "*"
    state: TaskState
    state_at: int
    created_at: int
    reason: str = ""
    message: str = ""
    priority: int = DEFAULT_PRIORITY
    fairness: Fairness | None = None
    lane: str
    order: int
    rank: int = 0
    needs: Needs = NO_NEEDS
    labels: dict[str, str] = {}
    retry: RetryPolicy = DEFAULT_RETRY
    timeout_ms: int | None = None
    not_before: int | None = None
    deadline_at: int | None = None
    attempt: int = 0
    generation: int = 1
    epoch: int = 0
    failures: int = 0
    lost: int = 0
    lease: Lease | None = None
    last_lease: Lease | None = None
    result_digest: str = ""
    started_at: int | None = None
    finished_at: int | None = None
    attempts: list[Attempt] = []
    progress: float = 0.0
    progress_message: str = ""
    failure: Failure | None = None
    cancel: Request | None = None
    hold: Request | None = None
    retried_as: str = ""
    discarded: Request | None = None
    emptied_at: int | None = None
    idempotency_key: str | None = None
    digest: str = ""
    origin: Origin = Origin()
    moved_at: int | None = None
    links: Links = NO_LINKS
    trust: Literal["trusted", "external", "tainted"] = "trusted"
    traceparent: str | None = None
    log_lines: int = 0
    log_bytes: int = 0
    log_dropped: int = 0
    gates: list[Gate] = []
    waits_at: str = ""
    passed: int = 0
    holds: list[Hold] = []
    draws: list[str] = []
    usage: Usage | None = None
    ceiling: Ceiling | None = None
    asked: Asked | None = None
    answers: dict[str, Answered] = {}
    schema: int = 1

    @property
    def fence(self) -> str:
        """`generation.epoch`, strictly growing per task: hand it to outside systems to refuse a stale holder."""
        return f"{self.generation}.{self.epoch}"

    @property
    def final(self) -> bool:
        """Whether the task has its final state."""
        return self.state in FINAL_STATES

    @property
    def waits(self) -> bool:
        """Whether it waits in its lane: queued, and nobody holds it back."""
        return self.state is TaskState.QUEUED and self.hold is None


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A submission. Only `type` is required.

    Attributes:
        payload: any JSON, at most 1 MiB, at most 32 levels deep.
        priority: 0 to 100, or critical, high, medium, low.
        fairness: whose share of the slots it takes; None is the tenant's own.
        run_at: not before this time (RFC 3339 with a zone).
        timeout: seconds one attempt may take.
        deadline: when it still waits or runs then, it ends `expired`.
        idempotency_key: repeating a submission with the same key returns the first task.
        on_unroutable: what to do when no registered agent could ever take it.
        limits: how many tasks with the same key may be under way at once, or start in a time.
        unique, debounce: a key that only one task has; a key whose submissions become one task.
        parent_id: the task it is done for: it draws from that task's budget, and is one level deeper.
        budget: what it, and all tasks that name it as their parent, may use.
    """

    type: str
    payload: msgspec.Raw = msgspec.field(default_factory=lambda: NULL)
    type_version: str = "*"
    priority: int | str = DEFAULT_PRIORITY
    fairness: Fairness | None = None
    needs: Needs = NO_NEEDS
    labels: dict[str, str] = {}
    retry: RetryPolicy = DEFAULT_RETRY
    run_at: datetime | None = None
    timeout: float | None = None
    deadline: datetime | None = None
    idempotency_key: str | None = None
    context_id: str | None = None
    parent_id: str | None = None
    trust: Literal["trusted", "external", "tainted"] = "trusted"
    on_unroutable: Literal["accept", "reject"] = "accept"
    limits: list[Limit] = []
    unique: Unique | None = None
    debounce: Debounce | None = None
    budget: Budget | None = None


class LogLine(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One line a task logged. `at` is wall milliseconds on the agent."""

    at: int
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str
    fields: dict[str, object] | None = None
    attempt: int = 0


class LogChunk(msgspec.Struct, frozen=True):
    """Lines of one task, as they came in one report; `first` is the number of the first line (from 0)."""

    task_id: str
    first: int
    lines: list[LogLine]


TASK_KIND: Final = Kind(
    name="task",
    fields=(
        Field("tenant"),
        Field("state"),
        Field("type"),
        Field("run"),
        Field("agent"),
        Field("holder"),
        Field("unique_key"),
        Field("due", "int"),
        Field("finished", "int"),
        Field("waiting"),
        Field("gate"),
        Field("group_id"),
    ),
    indexes=(
        Index("task_waiting", ("waiting", "id"), shared=True),
        Index("task_state", ("state", "id")),
        Index("task_type", ("type", "id")),
        Index("task_run", ("run", "id")),
        Index("task_agent", ("agent", "id")),
        Index("task_holder", ("holder", "id")),
        Index("task_key", ("unique_key",), unique=True),
        Index("task_due", ("due", "id")),
        Index("task_finished", ("finished", "id")),
        Index("task_gate", ("gate", "id")),
        Index("task_group", ("group_id", "id")),
        Index("task_group_state", ("group_id", "state", "id")),
    ),
    cold=("payload", "result"),
)
LOG_KIND: Final = Kind(
    name="log",
    fields=(Field("task"), Field("first", "int")),
    indexes=(Index("log_task", ("task", "first")),),
)
GENERATION_KIND: Final = Kind(name="generation")
