"""Runs inside runs: a stage, or each item of its fan-out, that is a run of another pipeline.

The outer run's document says which inner runs there are to be; `Nesting` makes it so, as often as it is asked: it begins, retries, pauses,
resumes and cancels them, and tells the outer run how they ended. Nothing else is kept, so that it may be interrupted anywhere; the healer
asks again.
"""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.background import Background
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.pipelines import control
from mcp_control.pipelines.counting import child_id, outstanding, spoiled
from mcp_control.pipelines.definition_model import NESTED_MAX
from mcp_control.pipelines.model import Parent, Run, RunRequest, RunState, StageState
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.runs import Active
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.pipelines.starting import earlier
from mcp_control.security.model import SYSTEM, Actor
from mcp_control.storage.ports import Store
from mcp_control.tasks.followers import Finished
from mcp_control.tasks.model import Links, Request, Task, TaskState

_AT_ONCE: Final = 500
_TOLD: Final = "the run it is part of"
_ENDS: Final = {
    RunState.COMPLETED: TaskState.COMPLETED,
    RunState.FAILED: TaskState.FAILED,
    RunState.CANCELLED: TaskState.CANCELLED,
}
_params: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Nesting:
    """Keeps inner runs as the outer ones want them.

    Attributes:
        background: where it does that; its owner closes it. What fails there, the healer tends to again.
    """

    def __init__(self, store: Store, clock: Clock, engine: PipelineEngine) -> None:
        self._store = store
        self._clock = clock
        self._engine = engine
        self._pending: set[str] = set()
        self.background = Background("nested-runs")
        engine.moved = self.moved

    def moved(self, run: Run, plan: Plan | None) -> None:
        """Hear that a run was changed; `plan` None where it has ended."""
        if run.final:
            if run.parent is not None:
                self.background.begin(self._report(run))
        elif plan is not None and plan.nested and run.id not in self._pending:
            self._pending.add(run.id)
            self.background.begin(self.tend(run.tenant, run.id))

    async def tend(self, tenant: str, run_id: str) -> None:
        """Make the runs inside a run what it wants them to be. Raises StoreUnavailable and the like; nothing is lost then."""
        self._pending.discard(run_id)
        actor = replace(SYSTEM, tenant=tenant)
        outer = await self._engine.in_hand.load(run_id, fresh=True)
        if outer is None or outer.run.final:
            return
        ended: list[Finished] = []
        for place in outer.plan.nested:
            stage = outer.run.stages[place]
            if stage.state is not StageState.RUNNING:
                continue
            items = [item for item in outstanding(outer.plan.stages[place], stage)[:_AT_ONCE] if item != -1]
            found = [await self._tend_one(actor, outer, place, item) for item in items]
            ended += [each for each in found if each is not None]
        if ended:
            await self._tell(actor, run_id, ended)

    async def _tend_one(self, actor: Actor, outer: Active, place: int, item: int | None) -> Finished | None:
        """Do what is to be done about one inner run; returns its end where it has one."""
        run, stage = outer.run, outer.run.stages[place]
        planned = outer.plan.stages[place]
        unwanted = spoiled(planned, stage) or (run.ending is not None and place not in outer.plan.cleaning)
        identity = child_id(run.id, stage, item)
        found = await self._engine.in_hand.load(identity, fresh=True)
        inner = None if found is None else found.run
        if inner is None:
            if unwanted:
                return _end(run, place, item, identity, TaskState.CANCELLED)
            return None if run.state is RunState.PAUSED else await self._begin(actor, outer, place, item, identity)
        assert inner.parent is not None
        if inner.final:
            if inner.parent.round == stage.round or inner.state is RunState.COMPLETED:
                return await self._end_of(inner, stage.round)
            if unwanted:
                return _end(run, place, item, identity, TaskState.CANCELLED)
            if run.state is not RunState.PAUSED:
                await self._retry(actor, inner, stage.round, _due(outer, place))
        elif unwanted:
            await self._engine.cancel(actor, identity, _TOLD)
        elif run.state is RunState.PAUSED:
            await self._engine.pause(actor, identity, _TOLD)
        elif inner.state is RunState.PAUSED and inner.pause is not None and inner.pause.reason == _TOLD:
            await self._engine.resume(actor, identity)
        return None

    async def _begin(self, actor: Actor, outer: Active, place: int, item: int | None, identity: str) -> Finished | None:
        run, stage, planned = outer.run, outer.run.stages[place], outer.plan.stages[place]
        definition = planned.stage
        depth = 1 if run.parent is None else run.parent.depth + 1
        parent = Parent(run_id=run.id, stage=stage.id, item=item, round=stage.round, depth=depth, draws=run.draws)
        try:
            if depth > NESTED_MAX:
                return _failed(
                    run, place, item, identity, "nested-too-deep", f"more than {NESTED_MAX} runs inside runs"
                )
            payload = await self._engine.in_hand.payload(outer, place, item, self._clock.now())
            request = RunRequest(
                params=_params(payload),
                labels=run.labels,
                no_cache=run.no_cache,
                priority=run.priority if definition.priority is None else definition.priority,
            )
            version = None if definition.version == "*" else int(definition.version)
            pipeline = await self._engine.get(actor, planned.nested or "", version)
            await self._engine.begin(
                actor, pipeline, request, run.origin, identity, parent=parent, due=_due(outer, place)
            )
        except Conflict:
            return None  # somebody else has begun it
        except ExpressionError as error:
            return _failed(run, place, item, identity, "expression-error", str(error))
        except Problem as problem:
            if problem.status >= 500:
                raise
            return _failed(run, place, item, identity, problem.code, problem.detail)
        return None

    async def _retry(self, actor: Actor, inner: Run, number: int, due: int | None) -> None:
        def again(plan: Plan, run: Run, now: int) -> Run:
            if run.parent is None or run.parent.round >= number:
                return run
            after = control.retry(plan, run, Request(at=now, by=actor.id, reason=_TOLD))
            parent = replace(run.parent, round=number)
            return replace(after, parent=parent, deadline_at=earlier(after.deadline_at, due))

        params = await self._part(inner, "params")
        await self._engine.ask(actor, inner.id, again, "run.retried", anew=_params(params or b"{}"))

    async def _part(self, run: Run, name: str) -> bytes | None:
        entity = (await self._store.get("run", [run.id], (name,)))[0]
        return None if entity is None else entity.cold.get(name)

    async def _report(self, inner: Run) -> None:
        assert inner.parent is not None
        actor = replace(SYSTEM, tenant=inner.tenant)
        await self._tell(actor, inner.parent.run_id, [await self._end_of(inner, inner.parent.round)])

    async def _tell(self, actor: Actor, run_id: str, ended: list[Finished]) -> None:
        await self._engine.ask(actor, run_id, lambda _plan, run, _now: run, "", finished=ended)

    async def _end_of(self, inner: Run, number: int) -> Finished:
        assert inner.parent is not None
        output = await self._part(inner, "result") if inner.has_output else None
        links = Links(run_id=inner.parent.run_id, stage=inner.parent.stage, item=inner.parent.item, round=number)
        return _standing_in(inner.id, links, _ENDS[inner.state], inner.reason, inner.message, output)


def _due(outer: Active, place: int) -> int | None:
    whole = None if place in outer.plan.cleaning else outer.run.deadline_at
    return earlier(whole, outer.run.stages[place].deadline_at)


def _end(
    run: Run, place: int, item: int | None, identity: str, state: TaskState, reason: str = "", message: str = ""
) -> Finished:
    stage = run.stages[place]
    links = Links(run_id=run.id, stage=stage.id, item=item, round=stage.round)
    return _standing_in(identity, links, state, reason, message, None)


def _failed(run: Run, place: int, item: int | None, identity: str, reason: str, message: str) -> Finished:
    return _end(run, place, item, identity, TaskState.FAILED, reason, message)


def _standing_in(
    identity: str, links: Links, state: TaskState, reason: str, message: str, output: bytes | None
) -> Finished:
    """Return the end of an inner run as that of the task it stands for."""
    task = Task(
        id=identity,
        version=0,
        type="",
        state=state,
        state_at=0,
        created_at=0,
        lane="",
        order=0,
        links=links,
        reason=reason,
        message=message,
    )
    return Finished(task=task, result=output)
