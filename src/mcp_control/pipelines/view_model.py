"""Pipelines and runs as callers see them."""

from datetime import datetime

import msgspec

from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.input_model import CompensationState
from mcp_control.pipelines.model import RunState, StageState
from mcp_control.tasks.budget_model import Amounts, Budget
from mcp_control.tasks.view_model import Explanation


class WaitView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a stage waits for: the approval of this id, or a signal of this name; and until when."""

    approval: str | None = None
    signal: str | None = None
    due_at: datetime | None = None


class StageView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A stage of a run as callers see it. `progress` is 0 to 1 over its tasks; `eta` is there while it runs.

    `cached` is how many of its tasks took the result of an earlier run.
    `children` are the runs it consists of where it is a run of another pipeline, the first hundred.
    """

    name: str
    state: StageState
    uses: str
    needs: list[str] = []
    progress: float
    message: str = ""
    reason: str = ""
    total: int = 0
    done: int = 0
    failed: int = 0
    rows_in: int | None = None
    rows_out: int | None = None
    rejected: int | None = None
    rate: float | None = None
    counts: dict[str, int] = {}
    started_at: datetime | None = None
    finished_at: datetime | None = None
    eta: datetime | None = None
    waits_for: WaitView | None = None
    children: list[str] = []
    cached: int = 0


class CompensationView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The undoing of one stage of a run that failed or was cancelled."""

    stage: str
    state: CompensationState
    started_at: datetime | None = None
    finished_at: datetime | None = None
    reason: str = ""
    message: str = ""


class RetryView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A repetition of a run: the round it began, who asked for it and why; `params` names the parameters that were changed."""

    round: int
    at: datetime
    by: str
    reason: str = ""
    from_stage: str | None = None
    params: list[str] = []


class ParentView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The run and the stage that this run is part of, and the item where that is a fan-out."""

    run_id: str
    stage: str
    item: int | None = None


class RunView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A run as callers see it."""

    id: str
    pipeline: str
    pipeline_version: int
    state: RunState
    state_since: datetime
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    eta: datetime | None = None
    reason: str = ""
    message: str = ""
    progress: float
    round: int = 0
    retries: list[RetryView] = []
    stages: list[StageView]
    compensations: list[CompensationView] = []
    summary: dict[str, object] = {}
    labels: dict[str, str] = {}
    params: dict[str, msgspec.Raw] | None = None
    output: msgspec.Raw | None = None
    parent: ParentView | None = None
    cancel_requested: bool = False
    budget: Budget | None = None
    usage: Amounts | None = None
    etag: str


class StageExplanation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a stage is not further: the first reason, who holds it and since when.

    Attributes:
        code: stable: `needs-not-done`, `run-full`, `next`, `paused`, `ending`, `approval`, `signal`, `running`, `finished`; where none of
            its tasks is worked on, that of the task that waits first (`Explanation.code`).
        held_by: names of stages, ids of tasks, runs, agents or approvals, whoever paused it.
        task: the task of it that was looked at.
    """

    stage: str
    state: StageState
    code: str
    message: str
    since: datetime | None = None
    held_by: list[str] = []
    expected_start: datetime | None = None
    task: Explanation | None = None


class RunExplanation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a run is not further: what its first stage waits for that could go on, and the same for each stage that has not ended."""

    run_id: str
    state: RunState
    code: str
    message: str
    since: datetime
    held_by: list[str] = []
    expected_start: datetime | None = None
    stages: list[StageExplanation] = []


class PipelineView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A definition as callers see it; `spec` is left out of lists."""

    id: str
    name: str
    version: int
    description: str = ""
    labels: dict[str, str] = {}
    stages: list[str]
    created_at: datetime
    created_by: str = ""
    spec: PipelineSpec | None = None
