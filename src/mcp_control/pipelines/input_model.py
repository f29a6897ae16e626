"""What a run asks of people and of other programs, what it got, and what undoes a stage."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.model import RetryPolicy

SIGNALS_MAX: Final = 500
SIGNAL_BYTES_MAX: Final = 64 << 10
ANSWER_BYTES_MAX: Final = 64 << 10
COMPENSATION: Final = -2  # the item of the task that undoes a stage


class Param(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A parameter of a pipeline. One without `default` must be given unless `required` is false (then it is null).

    `artifact` is the id of an artifact as text, or an object that describes one.
    """

    type: Literal["string", "integer", "number", "boolean", "object", "array", "artifact"] = "string"
    required: bool = True
    default: object = msgspec.UNSET
    choices: list[object] = []
    description: str = ""


# --- definition ---------------------------------------------------------------------------------------------------


class Approval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stage that asks people and goes on with the answer. It holds no slot while it waits.

    Attributes:
        title, message: what is asked; `${{ expressions }}` in them are replaced.
        options: what may be answered.
        stop_on: options that fail the stage, and the run with it; None is `reject`, where that is an option.
        assignees, roles: ids or names of the accounts, and roles, that may answer; everybody who may answer approvals where both are empty.
        fields: what the answer has to give beside the option, by name, declared as parameters are.
        timeout_seconds: how long it waits; then `default`, an option, is taken, and without one the stage fails.
    """

    title: str
    message: str = ""
    options: list[str] = msgspec.field(default_factory=lambda: ["approve", "reject"])
    stop_on: list[str] | None = None
    assignees: list[str] = []
    roles: list[str] = []
    fields: dict[str, Param] = {}
    timeout_seconds: float | None = None
    default: str | None = None

    @property
    def stops(self) -> frozenset[str]:
        """The options that fail the stage."""
        return frozenset(["reject"] if self.stop_on is None else self.stop_on).intersection(self.options)


class WaitFor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stage that waits for a signal from outside. One that came earlier counts, if no other stage took it.

    Attributes:
        signal: its name.
        match: an expression over `output`, as it would be with this signal (`output.body.order == params.order`); others are left.
        timeout_seconds: how long it waits; then the output has `default` as body, and without one the stage fails.
    """

    signal: str
    match: str | None = None
    timeout_seconds: float | None = None
    default: object = msgspec.UNSET


class Compensate(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, rename={"with_": "with"}
):
    """The task that undoes a completed stage when the run fails or is cancelled; `output` is that of the stage."""

    uses: str
    with_: Mapping[str, object] = {}
    retry: RetryPolicy | None = None
    timeout: float | None = None


# --- parts of a run -----------------------------------------------------------------------------------------------


class Given(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a waiting stage got: the option chosen (empty for a signal), and the output it makes, as JSON."""

    output: bytes
    option: str = ""


class Signal(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A signal that was sent to a run; its body is kept as the run's cold part `signal/<id>`. `stage` is the one that took it."""

    id: str
    name: str
    at: int
    by: str
    key: str | None = None
    digest: str = ""
    stage: str | None = None


class CompensationState(StrEnum):
    """Where the undoing of a stage stands."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class Compensation(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The undoing of one stage of a run that failed or was cancelled."""

    stage: str
    state: CompensationState = CompensationState.PENDING
    started_at: int | None = None
    finished_at: int | None = None
    reason: str = ""
    message: str = ""


# --- the inbox ----------------------------------------------------------------------------------------------------


class ApprovalState(StrEnum):
    """Where a question stands. `withdrawn`: its task or run ended, or was repeated, before anybody answered."""

    PENDING = "pending"
    ANSWERED = "answered"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A question to people as it is stored. It is written twice: when it is asked, and when it is closed.

    `task_id`, `ask_key`: the task whose handler asks, and what the question is to it; else a stage of a run does.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    task_id: str = ""
    ask_key: str = ""
    run_id: str = ""
    pipeline: str = ""
    stage: str = ""
    round: int = 0
    asks: Approval
    title: str
    message: str
    asked_at: int
    due_at: int | None = None
    state: ApprovalState = ApprovalState.PENDING
    output: bytes = b""
    schema: int = 1


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An answer: one of the options, what the form asks for, and a word to those who look later."""

    option: str
    fields: dict[str, msgspec.Raw] = {}
    comment: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An answer as it was given; the output of the stage. `expired`: nobody answered in time, and this is the default."""

    option: str
    fields: dict[str, msgspec.Raw] = {}
    comment: str = ""
    by: str
    at: datetime
    expired: bool = False


class ApprovalView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A question to people as callers see it. `task_id`: the task that asks; else `stage` does. `mine`: the caller may answer it."""

    id: str
    state: ApprovalState
    title: str
    message: str = ""
    options: list[str]
    fields: dict[str, Param] = {}
    assignees: list[str] = []
    roles: list[str] = []
    default: str | None = None
    task_id: str = ""
    run_id: str = ""
    pipeline: str = ""
    stage: str = ""
    asked_at: datetime
    due_at: datetime | None = None
    answer: Answer | None = None
    mine: bool
    etag: str


class SignalRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A signal for a run: any JSON as body. Repeated with the same key it is the same signal."""

    body: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))
    idempotency_key: str | None = None


class RerunRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A new run over what an ended one set aside: `fixed` is the artifact with the corrected records, None to take them as they were."""

    fixed: str | None = None
    params: dict[str, msgspec.Raw] = {}
    idempotency_key: str | None = None


class Received(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a waiting stage puts out when its signal has come; `expired`: it has not, and this is the default."""

    name: str
    body: msgspec.Raw
    id: str = ""
    by: str
    at: datetime
    expired: bool = False


class SignalView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A signal of a run as callers see it; `stage` is the one that took it."""

    id: str
    name: str
    at: datetime
    by: str
    stage: str | None = None


APPROVAL_KIND: Final = Kind(
    name="approval",
    fields=(Field("tenant"), Field("state"), Field("asked", "int"), Field("run")),
    indexes=(
        Index("approval_state", ("state", "asked", "id")),
        Index("approval_tenant", ("tenant", "asked", "id")),
        Index("approval_run", ("run", "asked", "id")),
    ),
)
