"""Pipelines and runs to and from the store and the wire: encoding, index values, facts, views."""

from collections.abc import Mapping
from datetime import datetime
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact, IndexValue
from mcp_control.kernel.clock import to_datetime
from mcp_control.pipelines.approvals import approval_id
from mcp_control.pipelines.counting import child_id, items_in
from mcp_control.pipelines.definition_model import Stage
from mcp_control.pipelines.input_model import Compensation, CompensationState
from mcp_control.pipelines.model import (
    NOT_REACHED,
    NOT_WANTED,
    RUN_FINAL,
    STAGE_FINAL,
    Pipeline,
    Run,
    RunState,
    StageRun,
    StageState,
)
from mcp_control.pipelines.plan import Plan, PlannedStage
from mcp_control.pipelines.view_model import (
    CompensationView,
    ParentView,
    PipelineView,
    RetryView,
    RunView,
    StageView,
    WaitView,
)

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_run: Final = msgspec.msgpack.Decoder(Run).decode
_decode_pipeline: Final = msgspec.msgpack.Decoder(Pipeline).decode
_SEPARATOR: Final = "\x1f"
_CHILDREN_SHOWN: Final = 100


# Bound once: to look a member up in its class takes nine times as long.
_NEW: Final = RunState.PENDING
_PENDING: Final = StageState.PENDING
_RUNNING: Final = StageState.RUNNING
_INPUT_REQUIRED: Final = StageState.INPUT_REQUIRED
_COMPLETED: Final = StageState.COMPLETED
_RUN_STATES: Final = {state: state.value for state in RunState}
_STAGE_KINDS: Final = {
    StageState.RUNNING: "stage.started",
    StageState.INPUT_REQUIRED: "stage.waiting",
    **{state: f"stage.{state.value}" for state in STAGE_FINAL},
}


class _StageTold(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a fact tells of a stage."""

    stage: str
    state: StageState
    total: int
    done: int
    progress: float
    cached: int = 0
    counts: dict[str, int] = {}
    reason: str = ""
    message: str | msgspec.UnsetType = msgspec.UNSET


def scoped(tenant: str, *parts: str | int) -> str:
    """Return an index value that counts within a tenant."""
    return _SEPARATOR.join((tenant, *map(str, parts)))


def write_run(run: Run, cold: Mapping[str, bytes]) -> Entity:
    """Return the entity that writes a run over the version before its own."""
    final = run.state in RUN_FINAL
    key = run.idempotency_key
    index: dict[str, IndexValue] = {
        "tenant": run.tenant,
        "state": _RUN_STATES[run.state],
        "pipeline": run.pipeline,
        "unique_key": None if key is None else scoped(run.tenant, run.origin.principal, key),
        "due": None if final else _due(run),
        "finished": run.finished_at if final else None,
    }
    return Entity("run", run.id, run.version - 1, index, _encode(run), cold)


def _due(run: Run) -> int | None:
    if run.ending is not None or run.deadline_at is None:
        return run.stage_due
    return run.deadline_at if run.stage_due is None else min(run.deadline_at, run.stage_due)


def read_run(entity: Entity) -> Run:
    """Return the run in a stored entity."""
    return _decode_run(entity.hot)


def write_pipeline(pipeline: Pipeline, latest: bool) -> Entity:
    """Return the entity that writes a version of a definition; `latest` marks the newest."""
    key = scoped(pipeline.tenant, pipeline.name)
    index: dict[str, IndexValue] = {
        "tenant": pipeline.tenant,
        "name": key,
        "name_number": scoped(pipeline.tenant, pipeline.name, pipeline.number),
        "number": pipeline.number,
        "latest": key if latest else None,
        "deleted": pipeline.deleted_at,
    }
    return Entity("pipeline", pipeline.id, pipeline.version - 1, index, _encode(pipeline))


def read_pipeline(entity: Entity) -> Pipeline:
    """Return the definition in a stored entity."""
    return replace(_decode_pipeline(entity.hot), version=entity.version)


# --- facts --------------------------------------------------------------------------------------------------------


def run_fact(kind: str, run: Run, actor: str, now: int) -> Fact:
    """Return the fact that `kind` happened to a run."""
    data: dict[str, object] = {"pipeline": run.pipeline, "state": run.state.value}
    if run.reason:
        data["reason"] = run.reason
        data["message"] = run.message[:500]
    if kind == "run.retried" and run.retries:
        last = run.retries[-1]
        data.update(round=last.round, from_stage=last.from_stage, params=last.params, reason=last.reason)
    return fact(kind, run.id, actor, now, data, tenant=run.tenant, run=run.id)


def stage_fact(kind: str, run: Run, stage: StageRun, actor: str, now: int) -> Fact:
    """Return the fact that `kind` happened to a stage; its subject is the run."""
    data = _StageTold(
        stage.id,
        stage.state,
        stage.total,
        stage.done,
        stage_progress(stage),
        stage.cached,
        stage.counts,
        stage.reason,
        stage.message[:500] if stage.reason else msgspec.UNSET,
    )
    return fact(kind, run.id, actor, now, data, tenant=run.tenant, run=run.id)


def compensation_fact(run: Run, each: Compensation, actor: str, now: int) -> Fact:
    """Return the fact that the undoing of a stage began or ended; its subject is the run."""
    verb = "started" if each.state is CompensationState.RUNNING else each.state.value
    data: dict[str, object] = {"stage": each.stage, "state": each.state.value}
    if each.reason:
        data.update(reason=each.reason, message=each.message)
    return fact(f"compensation.{verb}", run.id, actor, now, data, tenant=run.tenant, run=run.id)


def changed(before: Mapping[str, Compensation], each: Compensation) -> bool:
    """Say whether something happened to a compensation that is to be told."""
    old = before.get(each.stage)
    return each.state is not CompensationState.PENDING and (old is None or old.state is not each.state)


# --- views --------------------------------------------------------------------------------------------------------


def stage_progress(stage: StageRun, inside: float = 0.0) -> float:
    """Return 0 to 1: tasks done, and `inside`, the sum of what running tasks have done, of all its tasks."""
    if stage.state is _COMPLETED:
        return 1.0
    if not stage.total or not (stage.done or inside):
        return 0.0
    return round(min(1.0, (stage.done + inside) / stage.total), 4)


def _moment(millis: int | None) -> datetime | None:
    return None if millis is None else to_datetime(millis)


def _eta(started_at: int | None, progress: float, now: int) -> datetime | None:
    if started_at is None or not 0 < progress < 1:
        return None
    return to_datetime(now + round((now - started_at) * (1 - progress) / progress))


def _children(run_id: str, stage: StageRun, planned: PlannedStage) -> list[str]:
    if stage.started_at is None:
        return []
    if planned.over is None:
        return [child_id(run_id, stage, None)]
    begun = stage.begun if planned.windowed and stage.state is StageState.RUNNING else items_in(planned, stage)
    return [child_id(run_id, stage, item) for item in range(min(begun, _CHILDREN_SHOWN))]


def _stage_view(run_id: str, stage: StageRun, plan: Plan, place: int, now: int, inside: float) -> StageView:
    planned = plan.stages[place]
    if stage.state is _PENDING and stage == planned.untouched:
        return planned.shown
    definition = planned.stage
    progress = stage_progress(stage, inside)
    counts = stage.counts
    rate = None
    if counts and stage.started_at is not None:
        seconds = ((stage.finished_at or now) - stage.started_at) / 1000
        rows = counts.get("rows_out", counts.get("rows_in"))
        rate = round(rows / seconds, 1) if rows is not None and seconds > 0 else None
    return StageView(
        name=stage.id,
        state=stage.state,
        uses=definition.uses,
        needs=definition.needs,
        progress=progress,
        message=stage.message,
        reason=stage.reason,
        total=stage.total,
        done=stage.done,
        failed=stage.failed,
        rows_in=counts.get("rows_in"),
        rows_out=counts.get("rows_out"),
        rejected=counts.get("rejected"),
        rate=rate,
        counts=counts,
        started_at=None if stage.started_at is None else to_datetime(stage.started_at),
        finished_at=None if stage.finished_at is None else to_datetime(stage.finished_at),
        eta=_eta(stage.started_at, progress, now) if stage.state is _RUNNING else None,
        waits_for=_waits(run_id, stage, definition) if stage.state is _INPUT_REQUIRED else None,
        cached=stage.cached,
        children=_children(run_id, stage, planned) if planned.nested else [],
    )


def _waits(run_id: str, stage: StageRun, definition: Stage) -> WaitView:
    wait = definition.wait_for
    return WaitView(
        approval=None if definition.approval is None else approval_id(run_id, stage.id, stage.round),
        signal=None if wait is None else wait.signal,
        due_at=_moment(stage.deadline_at),
    )


def run_view(
    run: Run,
    plan: Plan,
    now: int,
    *,
    params: Mapping[str, bytes] | None = None,
    inside: Mapping[str, float] | None = None,
    output: bytes | None = None,
) -> RunView:
    """Return a run as callers see it.

    Args:
        params, output: its parameters and what it gave, when one run is asked for.
        inside: per stage, the sum of the progress of its running tasks.
    """
    stages = [
        _stage_view(run.id, stage, plan, place, now, inside.get(stage.id, 0.0) if inside else 0.0)
        for place, stage in enumerate(run.stages)
    ]
    wanted = [stage.progress for stage in stages if stage.reason not in (NOT_WANTED, NOT_REACHED)]
    progress = 1.0 if run.state is RunState.COMPLETED else round(sum(wanted) / max(1, len(wanted)), 4)
    return RunView(
        id=run.id,
        pipeline=run.pipeline,
        pipeline_version=run.pipeline_number,
        state=run.state,
        state_since=to_datetime(run.state_at),
        created_at=to_datetime(run.created_at),
        started_at=_moment(run.started_at),
        finished_at=_moment(run.finished_at),
        eta=_eta(run.started_at, progress, now) if run.state is RunState.RUNNING else None,
        reason=run.reason,
        message=run.message,
        progress=progress,
        round=run.round,
        retries=[
            RetryView(
                round=each.round,
                at=to_datetime(each.at),
                by=each.by,
                reason=each.reason,
                from_stage=each.from_stage,
                params=each.params,
            )
            for each in run.retries
        ],
        stages=stages,
        compensations=[
            CompensationView(
                stage=each.stage,
                state=each.state,
                started_at=_moment(each.started_at),
                finished_at=_moment(each.finished_at),
                reason=each.reason,
                message=each.message,
            )
            for each in run.compensations
        ],
        summary=run.summary,
        labels=run.labels,
        params=None if params is None else {name: msgspec.Raw(text) for name, text in params.items()},
        output=None if output is None else msgspec.Raw(output),
        parent=None
        if run.parent is None
        else ParentView(run_id=run.parent.run_id, stage=run.parent.stage, item=run.parent.item),
        cancel_requested=run.cancel is not None,
        etag=str(run.version),
    )


def pipeline_view(pipeline: Pipeline, *, with_spec: bool) -> PipelineView:
    """Return a definition as callers see it."""
    metadata = pipeline.spec.metadata
    return PipelineView(
        id=pipeline.id,
        name=pipeline.name,
        version=pipeline.number,
        description=metadata.description,
        labels=metadata.labels,
        stages=[stage.id for stage in pipeline.spec.spec.stages],
        created_at=to_datetime(pipeline.created_at),
        created_by=pipeline.created_by,
        spec=pipeline.spec if with_spec else None,
    )


def decided(before: Run, after: Run, moved: list[StageRun], actor: str, now: int) -> list[Fact]:
    """Return the facts of a decision, but for progress: the run's start, stages that started or ended, the run's end."""
    facts: list[Fact] = []
    if before.state is _NEW and after.started_at is not None:
        facts.append(run_fact("run.started", replace(after, state=RunState.RUNNING), actor, now))
    facts += [
        stage_fact(_STAGE_KINDS[stage.state], after, stage, actor, now)
        for stage in moved
        if stage.state in _STAGE_KINDS
    ]
    if after.compensations is not before.compensations:
        known = {each.stage: each for each in before.compensations}
        facts += [compensation_fact(after, each, actor, now) for each in after.compensations if changed(known, each)]
    if after.state in RUN_FINAL and before.state not in RUN_FINAL:
        facts.append(run_fact(f"run.{after.state.value}", after, actor, now))
    return facts
