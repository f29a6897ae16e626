"""Pipeline definitions, as people write them (architecture, section 5)."""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from mcp_control.pipelines.input_model import Approval, Compensate, Param, WaitFor
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.model import Needs, RetryPolicy

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
