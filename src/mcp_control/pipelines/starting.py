"""From a request to the run it begins as: checks and construction, pure."""

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.kernel.text import label_errors, range_errors
from mcp_control.pipelines.control import as_millis
from mcp_control.pipelines.model import Parent, Pipeline, Run, RunRequest, RunState, StageRun
from mcp_control.security.model import Actor
from mcp_control.tasks.budget_model import Account, Budget
from mcp_control.tasks.budgets import budget_errors, merged, written
from mcp_control.tasks.model import Origin


class Along(msgspec.Struct, frozen=True):
    """What is committed together with a new run or task: entities and facts."""

    writes: list[Entity] = []
    facts: list[Fact] = []


def check_request(request: RunRequest) -> None:
    """Raise Invalid with everything that is wrong with a request but its parameters."""
    found: list[FieldError] = label_errors("#/labels", request.labels)
    if request.priority is not None:
        found += range_errors("#/priority", request.priority, 0, 100)
    if request.budget is not None:
        found += budget_errors("#/budget", request.budget)
    if found:
        raise Invalid(found[0].detail, errors=found)


def budget_of(pipeline: Pipeline, request: RunRequest) -> Budget | None:
    """Return what all tasks of a run may use together, None where that is not limited."""
    return merged(pipeline.spec.spec.budget, request.budget)


def budget_writes(run: Run, budget: Budget | None) -> list[Entity]:
    """Return what is written beside a new run for its budget."""
    return [] if budget is None else [written(Account(id=run.id, tenant=run.tenant, budget=budget))]


def earlier(one: int | None, other: int | None) -> int | None:
    """Return the earlier of two moments, None where neither is given."""
    return one if other is None else other if one is None else min(one, other)


def new_run(
    actor: Actor,
    pipeline: Pipeline,
    request: RunRequest,
    origin: Origin,
    *,
    run_id: str,
    digest: str,
    now: int,
    parent: Parent | None = None,
    due: int | None = None,
) -> Run:
    """Return the run that a checked request begins as; `due` is the deadline of what it is part of."""
    body = pipeline.spec.spec
    own = None if body.deadline_seconds is None else now + as_millis(body.deadline_seconds)
    return Run(
        id=run_id,
        version=0,
        tenant=actor.tenant,
        pipeline_id=pipeline.id,
        pipeline=pipeline.name,
        pipeline_number=pipeline.number,
        state=RunState.PENDING,
        state_at=now,
        created_at=now,
        stages=[StageRun(id=stage.id) for stage in body.stages],
        labels=request.labels,
        draws=[*([] if budget_of(pipeline, request) is None else [run_id]), *([] if parent is None else parent.draws)],
        priority=body.priority if request.priority is None else request.priority,
        deadline_at=earlier(own, due),
        parent=parent,
        no_cache=request.no_cache,
        idempotency_key=request.idempotency_key,
        digest=digest,
        origin=replace(origin, principal=origin.principal or actor.id),
    )
