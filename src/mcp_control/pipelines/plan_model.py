"""Forecasts of runs and differences of versions, as callers see them."""

from datetime import datetime
from typing import Literal

import msgspec


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to plan: a definition as text (YAML or JSON), or a pipeline by name and version (the newest); and its parameters.

    Parameters that must be given for a run may be left out here; what depends on them is then not known.
    """

    definition: str | None = None
    pipeline: str | None = None
    version: int | None = None
    params: dict[str, msgspec.Raw] = {}


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a stage.

    Attributes:
        able: how many agents could take its tasks now; agents: names of some of them.
        unable: why others could not, or all of them.
        tasks: how many it would have; null where that depends on the output of a stage (it then counts as one).
        history: attempts of its type that completed, ever; p50, p90: seconds of one of its tasks, null without history.
        waits_for: what it waits for instead of agents: `people`, a `signal`, or the `run` of another pipeline. How long that takes is
            not known.
        begins, ends: seconds from now, if every task takes its p50; null when it could never begin. `ends` is null for a stage that waits.
        at_least: they are the least it can be, as something before it, or itself, waits or has no history.
        critical: it lies on the critical path.
    """

    stage: str
    uses: str
    needs: list[str] = []
    able: int
    agents: list[str] = []
    unable: list[str] = []
    tasks: int | None = 1
    history: int = 0
    p50: float | None = None
    p90: float | None = None
    waits_for: Literal["people", "signal", "run"] | None = None
    begins: float | None = None
    ends: float | None = None
    at_least: bool = False
    critical: bool = False


class OneMore(msgspec.Struct, frozen=True, kw_only=True):
    """What one more agent like this one would save, if every task takes its p50."""

    like: str
    saves_seconds: float


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a run that began now.

    Attributes:
        routable: for every stage there is an agent that could take it now.
        known: there is a history of every stage; else the forecast counts only those with one, and is the least it can be.
        p50, p90: seconds until its end if every task takes its p50, or its p90; null where a stage can never begin.
        expected_finish: the moment after p50 seconds; null unless `routable` and `known`.
        critical_path: the stages that decide when it ends, in order.
        waiting: tasks that wait already for agents it needs; they go first in the forecast.
        one_more_agent: null where one more would save nothing.
    """

    pipeline: str
    warnings: list[str]
    routable: bool
    known: bool
    p50: float | None
    p90: float | None
    expected_finish: datetime | None = None
    critical_path: list[str]
    waiting: int
    one_more_agent: OneMore | None
    stages: list[StagePlan]


class FieldChange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A value that is not the same. `pointer` is its place in the stage, or in the definition; what is not there on a side is left out."""

    pointer: str
    before: object = msgspec.UNSET
    after: object = msgspec.UNSET


class StageChange(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that is in both versions and not the same."""

    stage: str
    fields: list[FieldChange]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What changed from one version to another.

    Attributes:
        added, removed: ids of stages that are in one version only.
        changed: stages that are in both.
        fields: everything outside of stages.
        reordered: the stages in both versions stand in another order, which decides what starts first where there is a choice.
    """

    pipeline: str
    before: int
    after: int
    same: bool
    added: list[str]
    removed: list[str]
    changed: list[StageChange]
    fields: list[FieldChange]
    reordered: bool
