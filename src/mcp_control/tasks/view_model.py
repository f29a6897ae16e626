"""Tasks as callers see them."""

from datetime import datetime

import msgspec

from mcp_control.tasks.budget_model import Amounts
from mcp_control.tasks.limit_model import Gate
from mcp_control.tasks.model import Attempt, Failure, Needs, RetryPolicy, TaskState


class TaskView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A task as callers see it. `payload` and `result` are there when one task is asked for, not in lists.

    `usage`: what it has used, as far as that was counted; `budgets`: whose budgets it draws from (tasks, its run), its own first.
    `log_dropped`: lines that it logged beyond what is kept of a log.
    `payload_removed_at`: since then payload and result of the finished task are not kept any more.
    """

    id: str
    type: str
    state: TaskState
    state_since: datetime
    created_at: datetime
    reason: str = ""
    message: str = ""
    priority: int
    progress: float
    progress_message: str = ""
    type_version: str = "*"
    labels: dict[str, str] = {}
    needs: Needs = Needs()
    limits: list[Gate] = []
    retry: RetryPolicy = RetryPolicy()
    attempt: int
    attempts: list[Attempt] = []
    attempts_left_out: int = 0
    agent_id: str | None = None
    fence: str
    failure: Failure | None = None
    run_at: datetime | None = None
    deadline: datetime | None = None
    timeout: float | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    eta: datetime | None = None
    cancel_requested: bool = False
    cancel_reason: str = ""
    held: bool = False
    held_by: str = ""
    hold_reason: str = ""
    idempotency_key: str | None = None
    run_id: str | None = None
    stage: str | None = None
    item: int | None = None
    parent_id: str | None = None
    retry_of: str | None = None
    context_id: str | None = None
    group_id: str | None = None
    log_lines: int = 0
    log_dropped: int = 0
    usage: Amounts | None = None
    budgets: list[str] = []
    warnings: list[str] = []
    etag: str
    payload_removed_at: datetime | None = None
    payload: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a task is not running: the first reason in the order the scheduler looks, who holds it and since when.

    Attributes:
        code: stable, e.g. `scheduled`, `no-capable-agent`, `agents-unavailable`, `agents-full`, `waiting-turn`, `running`, `finished`.
        held_by: ids of what it waits for.
        ahead: tasks before it in its lane; None where that does not apply.
    """

    task_id: str
    state: TaskState
    code: str
    message: str
    since: datetime
    held_by: list[str] = []
    ahead: int | None = None
    expected_start: datetime | None = None


class StatisticView(msgspec.Struct, frozen=True, kw_only=True):
    """A statistic as callers see it. Seconds from the moment an agent is given a task to its end; null while none has completed."""

    type: str
    completed: int
    failed: int
    p50: float | None
    p90: float | None
    p99: float | None
    updated_at: datetime


class ParkedTask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A stored task that cannot be decoded: what the index says of it, and how many bytes it has."""

    id: str
    type: str
    run_id: str | None = None
    bytes: int
