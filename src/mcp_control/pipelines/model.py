"""What is stored of pipelines and runs: accepted versions, and how far each run is (architecture, section 5)."""

from enum import StrEnum
from typing import Final

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.input_model import Compensation, Given, Signal
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.model import Origin, Request


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
        has_output: its output is kept, as the run's cold part `output/<id>` unless it is here.
        output: its output as JSON where that is small, in a run of few stages: so it takes no row of its own.
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
    output: bytes = b""
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


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
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


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
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
