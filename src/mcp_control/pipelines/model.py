"""Pipeline definitions, runs, and the decisions that move a run (architecture, section 5)."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.pipelines.input_model import Approval, Compensate, Compensation, Given, Signal, WaitFor
from mcp_control.pipelines.input_model import Param as Param
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.model import Needs, Origin, Request, RetryPolicy

API_VERSION: Final = "mcp-control/v1"
NESTED: Final = "pipeline:"  # `uses` begins so where a stage is a run of another pipeline
NESTED_MAX: Final = 5
NO_NEEDS: Final = Needs()


Mode = Literal["sequential", "concurrent", "adaptive", "priority"]
"""How much is under way at once, of the stages of a run or the items of a fan-out: one (`sequential`), all that may (`concurrent`), as much
as free agents and few errors allow (`adaptive`), or first what has the highest priority (`priority`)."""

RunWhen = Literal["all_completed", "any_completed", "all_ended", "always"]
"""What must be true of the stages a stage needs. With `all_completed` it is skipped as soon as one of them is; with `any_completed` it
waits for all to end and is skipped unless one completed; with `all_ended` it does not matter how they ended. `always` is like
`all_ended`, and the stage also runs when the run has failed or was cancelled."""


class Combine(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, rename={"with_": "with"}
):
    """The one task that follows all items of a fan-out; it sees `items`, their results in order."""

    uses: str
    with_: Mapping[str, object] = {}
    retry: RetryPolicy | None = None
    timeout: float | None = None


class FanOut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One task per element of a list: `over` is an expression; the element is `item` and its place `index` in `with`.

    Attributes:
        width: how many items are under way at most; the next one starts when one ends. None is all at once.
        mode: see `Mode`; with `priority`, `rank` is an expression over `item` and `index` for the priority of the item's task, 0 to 100.
        at_least: how many items must complete, a number or a share such as "80%"; None is all. Others may fail; their results are null
            in `items` and in the output, and told in `failures` to the combining task.
    """

    over: str
    combine: Combine | None = None
    width: int | None = None
    mode: Mode = "concurrent"
    rank: str | None = None
    at_least: int | str | None = None


class Cache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A task whose input, type and code are those of one that completed at most so many seconds ago takes its result."""

    seconds: float


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What must hold of a stage's output before anything after it starts: `check` is an expression over `output` and `params`."""

    check: str
    reason: str = "gate-failed"
    message: str = ""


class Stage(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    gc=False,  # made by the thousand; a collection that walks over them is the longest pause there is
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename={"with_": "with"},
):
    """One step of a pipeline.

    Attributes:
        uses: the task type that does it; `version` a range of it. In its place, `approval` asks people, `wait_for` waits for a signal.
        compensate: undoes the stage when it has completed and the run fails or is cancelled.
        needs: ids of the stages that must be completed first.
        with_: the payload; strings of the form `${{ expression }}` are replaced, over `params`, `stages.<id>.output`, `run`.
        when: an expression that must be true for the stage to run; else it is skipped.
        run_when: what must be true of the stages it needs.
        deadline_seconds: a stage that has not ended this long after it started fails, and its tasks are cancelled.
        cache: take the results of earlier runs.
    """

    id: str
    uses: str = ""
    version: str = "*"
    needs: list[str] = []
    with_: Mapping[str, object] = {}
    when: str | None = None
    run_when: RunWhen = "all_completed"
    fan_out: FanOut | None = None
    gate: Gate | None = None
    approval: Approval | None = None
    wait_for: WaitFor | None = None
    compensate: Compensate | None = None
    deadline_seconds: float | None = None
    cache: Cache | None = None
    retry: RetryPolicy | None = None
    timeout: float | None = None
    requires: Needs = NO_NEEDS
    priority: int | None = None
    description: str = ""


class Metadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Name and description of a pipeline; the name is its identity, each accepted change a new version."""

    name: str
    description: str = ""
    labels: dict[str, str] = {}


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a pipeline consists of.

    Attributes:
        deadline_seconds: a run that has not ended this long after it was created (or retried) is ended `failed`.
        max_running: stages that may run at once, None all whose needs are met. Where there is a choice, higher `priority` of the
            stage first, then the order of the definition.
        budget: what all tasks of a run may use together.
        mode: see `Mode`; with `priority` a stage starts only when none of higher priority runs or could start.
        rerun: parameters of a run over what an earlier one set aside, over its `params`, `stages`, and `run` with `run.fixed`, the
            corrected records if there are any.
        outputs: what a run that completed gives, as `with` of a stage after all others would be.
    """

    stages: list[Stage]
    params: dict[str, Param] = {}
    priority: int = 50
    deadline_seconds: float | None = None
    max_running: int | None = None
    budget: Budget | None = None
    mode: Mode = "concurrent"
    outputs: Mapping[str, object] = {}
    rerun: Mapping[str, object] = {}


class PipelineSpec(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename={"api_version": "apiVersion"},
):
    """A definition as a person writes it, in YAML, JSON or Python."""

    metadata: Metadata
    spec: Body
    api_version: Literal["mcp-control/v1"] = "mcp-control/v1"
    kind: Literal["Pipeline"] = "Pipeline"


class Pipeline(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored definition: one entity per accepted version, never changed; `latest` in the index marks the newest.

    A deleted version is hidden, and kept until no run that began with it is left.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    name: str
    number: int
    spec: PipelineSpec
    digest: str
    created_at: int
    created_by: str = ""
    deleted_at: int | None = None


class RunState(StrEnum):
    """Where a run stands. Gates and failures end it `failed` with a reason; `input_required`: nothing goes on until somebody answers."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    INPUT_REQUIRED = "input_required"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StageState(StrEnum):
    """Where a stage of a run stands.

    `pending` waits for its needs, `ready` for the run (paused, or `max_running`); `running` has tasks, `input_required` waits for an
    answer or a signal.
    """

    PENDING = "pending"
    READY = "ready"
    RUNNING = "running"
    INPUT_REQUIRED = "input_required"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


RUN_FINAL: Final = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED})
STAGE_FINAL: Final = frozenset({StageState.COMPLETED, StageState.FAILED, StageState.SKIPPED, StageState.CANCELLED})
NOT_WANTED: Final = "condition-false"
NOT_REACHED: Final = "needs-not-met"


class Window(msgspec.Struct, frozen=True, gc=False):
    """How much may be under way in an adaptive run or fan-out: `width`, and `errors`, the recent share of attempts that failed."""

    width: float = 2.0
    errors: float = 0.0


class StageRun(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A stage inside a run: its state and counters; its tasks are rows of their own.

    Attributes:
        round: raised by every retry of the stage; part of its tasks' ids.
        total: tasks it consists of, the combine task included; done, failed, cancelled: how many ended so.
        combining: the combine task has been started; it is the last of the stage's tasks.
        ended, bad: bit sets over its tasks: those that ended, and among them those that did not complete, so that each counts once.
        begun: in a fan-out of bounded width, the place of the first item that has not been started.
        cached: how many of its tasks took the result of an earlier run.
        since: the first round whose results still count (a retry within a fan-out keeps those that are there).
        deadline_at: when it fails unless it has ended.
        given: what it waited for, until it has ended.
        has_output: its output is kept as the run's cold part `output/<id>`.
        counts: numbers its output told under `counts` (for data: rows_in, rows_out, rejected), summed over items until it ends.
    """

    id: str
    state: StageState = StageState.PENDING
    round: int = 0
    total: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    combining: bool = False
    ended: bytes = b""
    bad: bytes = b""
    begun: int = 0
    cached: int = 0
    window: Window | None = None
    since: int = 0
    given: Given | None = None
    has_output: bool = False
    counts: dict[str, int] = {}
    started_at: int | None = None
    deadline_at: int | None = None
    finished_at: int | None = None
    reason: str = ""
    message: str = ""


class Retry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Somebody had a run repeated: the round it began, from which stage, and the names of the parameters that were changed."""

    round: int
    at: int
    by: str
    reason: str = ""
    from_stage: str | None = None
    params: list[str] = []


class Parent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stage a run is part of: it is a run of another pipeline inside a run, or inside an item of its fan-out.

    `round` is that of the stage, `depth` how many runs there are around this one, `draws` whose budgets those draw from.
    """

    run_id: str
    stage: str
    item: int | None = None
    round: int = 0
    depth: int = 1
    draws: list[str] = []


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One execution of one version of a pipeline. Stage outputs and parameters are cold parts beside it.

    Attributes:
        round: raised by every retry of the run; retries: the latest of them.
        ending: the final state it is on its way to: nothing starts any more, it waits for the tasks it had cancelled.
        signals: what other programs sent it; compensations: what is being undone, or was, in the order of doing it.
        summary: what stage outputs told under `summary`, merged; shown to people (e.g. a quality score).
        stage_due: the next deadline of a running stage.
        no_cache: it computes everything anew.
        has_output: it completed, and what it gives is kept as the cold part `result`.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    pipeline_id: str
    pipeline: str
    pipeline_number: int
    state: RunState
    state_at: int
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    reason: str = ""
    message: str = ""
    round: int = 0
    retries: list[Retry] = []
    ending: RunState | None = None
    stages: list[StageRun]
    signals: list[Signal] = []
    compensations: list[Compensation] = []
    summary: dict[str, object] = {}
    labels: dict[str, str] = {}
    priority: int = 50
    pause: Request | None = None
    cancel: Request | None = None
    deadline_at: int | None = None
    stage_due: int | None = None
    window: Window | None = None
    parent: Parent | None = None
    no_cache: bool = False
    has_output: bool = False
    idempotency_key: str | None = None
    digest: str = ""
    draws: list[str] = []
    origin: Origin = Origin()
    schema: int = 1

    @property
    def final(self) -> bool:
        """Whether the run has ended."""
        return self.state in RUN_FINAL


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Start a pipeline: its parameters by name, the version (None: the newest), and the usual idempotency key.

    `budget`: overrules the definition's, limit by limit; `no_cache`: take no results of earlier runs.
    """

    params: dict[str, msgspec.Raw] = {}
    version: int | None = None
    labels: dict[str, str] = {}
    priority: int | None = None
    budget: Budget | None = None
    no_cache: bool = False
    idempotency_key: str | None = None


PIPELINE_KIND: Final = Kind(
    name="pipeline",
    fields=(
        Field("tenant"),
        Field("name"),
        Field("name_number"),
        Field("number", "int"),
        Field("latest"),
        Field("deleted", "int"),
    ),
    indexes=(
        Index("pipeline_version", ("name_number",), unique=True),
        Index("pipeline_latest", ("latest", "id")),
        Index("pipeline_number", ("name", "number", "id")),
        Index("pipeline_deleted", ("deleted", "id")),
    ),
)
RUN_KIND: Final = Kind(
    name="run",
    fields=(
        Field("tenant"),
        Field("state"),
        Field("pipeline"),
        Field("unique_key"),
        Field("due", "int"),
        Field("finished", "int"),
    ),
    indexes=(
        Index("run_state", ("state", "id")),
        Index("run_pipeline", ("pipeline", "id")),
        Index("run_pipeline_state", ("pipeline", "state", "id")),
        Index("run_key", ("unique_key",), unique=True),
        Index("run_due", ("due", "id")),
        Index("run_finished", ("finished", "id")),
    ),
    cold=("params", "output", "signal", "result", "kept"),
)
