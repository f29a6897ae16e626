"""Runs in hand: an identity cache of active runs, and from a decision to the advance that is committed with the tasks that caused it."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.kernel.changes import Fact
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import NotFound, StoreUnavailable
from mcp_control.pipelines.approvals import approval_id, asked, closed, question_fact, read_question, write_question
from mcp_control.pipelines.control import broken
from mcp_control.pipelines.counting import task_id
from mcp_control.pipelines.decide import decide
from mcp_control.pipelines.decision import Decision, Material, Missing, Start
from mcp_control.pipelines.draft import Draft
from mcp_control.pipelines.input_model import COMPENSATION, ApprovalState, Question
from mcp_control.pipelines.lately import Lately
from mcp_control.pipelines.launching import payload_of
from mcp_control.pipelines.loading import Loader
from mcp_control.pipelines.model import RUN_FINAL, Pipeline, Run, StageState
from mcp_control.pipelines.plan import Plan, compile_plan, off_loop
from mcp_control.pipelines.records import decided, read_pipeline, read_run, stage_fact, write_run
from mcp_control.pipelines.results import StageResults
from mcp_control.pipelines.starting import earlier
from mcp_control.storage.ports import Store
from mcp_control.tasks.followers import Advance, Finished, NewTask
from mcp_control.tasks.model import Links, RetryPolicy, TaskSpec, TaskState

_log = structlog.get_logger(__name__)
_PROGRESS_EVERY_MS: Final = 250
_KEEP_OUTPUT: Final = 256 << 10
_KEEP_RESULTS: Final = 4 << 20
_LOADS_MAX: Final = 10_000
_DEFAULT_RETRY: Final = RetryPolicy()
Free = Callable[[str, Plan], Mapping[str, int]]
_params: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Active:
    """A run that is being worked on, with what belongs to it.

    Attributes:
        run: as stored.
        material: outputs and results known so far; None of it is lost when it is forgotten, since it can be loaded.
        told_at: per stage, when its progress was last announced.
        kept: bytes of item results in memory.
    """

    __slots__ = ("kept", "material", "plan", "run", "told_at")

    def __init__(self, run: Run, plan: Plan, material: Material) -> None:
        self.run = run
        self.plan = plan
        self.material = material
        self.told_at: dict[str, int] = {}
        self.kept = 0


class _Proposal(msgspec.Struct):
    advance: Advance
    active: Active
    run: Run
    decision: Decision
    done: list[str] = []


class Plans:
    """Compiled definitions by the id of their version, the least recently used forgotten first."""

    def __init__(self, store: Store, capacity: int = 256) -> None:
        self._store = store
        self._capacity = capacity
        self._kept: OrderedDict[str, Plan] = OrderedDict()

    async def load(self, pipeline_id: str) -> Plan:
        """Return the plan of a version. Raises NotFound."""
        plan = self._kept.get(pipeline_id)
        if plan is not None:
            self._kept.move_to_end(pipeline_id)
            return plan
        entity = (await self._store.get("pipeline", [pipeline_id]))[0]
        if entity is None:
            raise NotFound("no such pipeline version")
        return await self.of(read_pipeline(entity))

    async def of(self, pipeline: Pipeline) -> Plan:
        """Return the plan of a definition in hand; a large one is compiled beside the event loop."""
        plan = self._kept.get(pipeline.id)
        if plan is None:
            plan = self._kept[pipeline.id] = await off_loop(pipeline.spec, compile_plan, pipeline.spec)
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return plan


class Runs:
    """Loads runs, decides, proposes advances and hears how their commit ended.

    Args:
        shared: other servers move runs on too, so that a copy in memory may be stale.
        free: says how much room agents have for the adaptive stages of a plan, by stage; for the tenant given first.
    """

    def __init__(
        self,
        store: Store,
        plans: Plans,
        capacity: int = 2000,
        shared: bool = False,
        free: Free | None = None,
        kept: StageResults | None = None,
    ) -> None:
        self._kept = kept
        self._free = free
        self._shared = shared
        self._store = store
        self._loader = Loader(store, kept)
        self._plans = plans
        self._capacity = capacity
        self._active: OrderedDict[str, Active] = OrderedDict()
        self._lately = Lately()
        self._proposals: dict[int, _Proposal] = {}

    async def load(self, run_id: str, *, fresh: bool = False) -> Active | None:
        """Return a run, from memory while it is active. `fresh`: as the store has it, whoever moved it."""
        active = self._active.get(run_id)
        if active is not None and not (fresh and self._shared):
            self._active.move_to_end(run_id)
            return active
        entity = (await self._store.get("run", [run_id]))[0]
        if entity is None:
            return None
        run = read_run(entity)
        if active is not None and active.run.version >= run.version:
            return active
        active = Active(run, await self._plans.load(run.pipeline_id), Material())
        # Another call may have loaded or advanced it meanwhile.
        known = self._active.get(run_id)
        if known is not None and known.run.version >= run.version:
            return known
        self._keep(active)
        return active

    def known(self, run: Run) -> tuple[Mapping[str, bytes] | None, bytes | None]:
        """Return the parameters of a run and what it gave; None and None where they are not in memory."""
        active = self._active.get(run.id)
        return self._lately.of(run) if active is None else (active.material.params, None)

    def _keep(self, active: Active) -> None:
        if active.run.state in RUN_FINAL:
            self._active.pop(active.run.id, None)
            return
        self._active[active.run.id] = active
        self._active.move_to_end(active.run.id)
        if len(self._active) > self._capacity:
            self._active.popitem(last=False)

    # --- deciding -------------------------------------------------------------------------------------------------

    async def decide(
        self, active: Active, run: Run, finished: Sequence[Finished], now: int, *, insist: bool = False
    ) -> Decision:
        """Decide on a run, loading what is missing. Raises StoreUnavailable and the like when it cannot be loaded."""
        if active.plan.adaptive and self._free is not None:
            active.material.free = self._free(run.tenant, active.plan)
        if active.plan.cached and self._kept is not None:
            active.material.codes = self._kept.codes(run.tenant, active.plan)
        for _ in range(_LOADS_MAX):
            try:
                return decide(active.plan, run, finished, active.material, now, insist=insist)
            except Missing as missing:
                await self._loader.fetch(active.plan, active.material, run, missing)
        raise StoreUnavailable(f"run {run.id} keeps missing what it needs")

    async def payload(self, active: Active, place: int, item: int | None, now: int) -> bytes:
        """Return the payload of a stage that has started, or of an item of it. Raises ExpressionError."""
        for _ in range(_LOADS_MAX):
            try:
                return payload_of(Draft(active.plan, active.run, active.material, now), place, item)
            except Missing as missing:
                await self._loader.fetch(active.plan, active.material, active.run, missing)
        raise StoreUnavailable(f"run {active.run.id} keeps missing what it needs")

    def plan_of(self, run_id: str) -> Plan | None:
        """Return the plan of an active run that is in memory."""
        active = self._active.get(run_id)
        return None if active is None else active.plan

    async def closing(self, active: Active, before: Run, decision: Decision) -> list[Question]:
        """Return the questions that a decision closes, as they are stored."""
        after = decision.run
        ids = [
            approval_id(before.id, stage.id, stage.round)
            for place in (active.plan.waiting if after is not before else ())
            if active.plan.stages[place].stage.approval is not None
            and (stage := before.stages[place]).state is StageState.INPUT_REQUIRED
            and after.stages[place].state is not StageState.INPUT_REQUIRED
        ]
        rows = await self._store.get("approval", ids) if ids else []
        found = [read_question(row) for row in rows if row is not None]
        return [each for each in found if each.state is ApprovalState.PENDING]

    # --- proposing ------------------------------------------------------------------------------------------------

    def propose(
        self,
        active: Active,
        before: Run,
        decision: Decision,
        now: int,
        *,
        actor: str = "system",
        facts: Sequence[Fact] = (),
        cold: dict[str, bytes] | None = None,
        closing: Sequence[Question] = (),
    ) -> Advance:
        """Return the advance of a decision.

        Args:
            before: the run the decision was made on.
            facts: what caused it, before its own facts.
            cold: further cold parts of the run to write.
            closing: questions to people that are closed by it; see `closing`.
        """
        parts = dict(cold) if cold else {}
        stages, place_of = decision.run.stages, active.plan.place_of
        for name, output in decision.outputs.items():
            if not stages[place_of[name]].output:
                parts[f"output/{name}"] = bytes(output)
        for name, hits in decision.hits.items():
            parts[f"kept/{name}"] = msgspec.json.encode({item: msgspec.Raw(text) for item, text in hits.items()})
        if decision.result is not None:
            parts["result"] = bytes(decision.result)
        run = decision.run
        if run.version == before.version:  # changed by what was asked, and by nothing that follows
            run = replace(run, version=before.version + 1)
        entity = write_run(run, parts)
        told = [*facts, *decided(before, run, decision.moved, actor, now)]
        for stage in decision.progressed:
            if now - active.told_at.get(stage.id, 0) >= _PROGRESS_EVERY_MS:
                active.told_at[stage.id] = now
                told.append(stage_fact("stage.progressed", run, stage, actor, now))
        submit: list[NewTask] = []
        if decision.start:
            submit = [
                _new_task(run, start) for start in decision.start if start.stage.nested is None or start.item == -1
            ]
        writes = [entity]
        if closing or decision.asked:
            for question in self._questions(active, run, decision, closing, now):
                writes.append(write_question(question))
                told.append(question_fact(question, actor, now))
        advance = Advance(writes=writes, facts=told, submit=submit, cancel=decision.cancel)
        self._proposals[id(advance)] = _Proposal(advance, active, run, decision)
        return advance

    def _questions(
        self, active: Active, run: Run, decision: Decision, closing: Sequence[Question], now: int
    ) -> list[Question]:
        plan = active.plan
        found = [
            closed(each, run.stages[plan.place_of[each.stage]], decision.outputs.get(each.stage)) for each in closing
        ]
        for place, text in decision.asked.items():
            asks = plan.stages[place].stage.approval
            assert asks is not None
            found.append(asked(run, run.stages[place], asks, text, now))
        return found

    def settled(self, run_id: str, advance: Advance, ok: bool) -> Run | None:
        """Hear how the commit of an advance ended; returns the run as it is stored now, None where that is not known."""
        proposal = self._proposals.pop(id(advance), None)
        if not ok:
            self._active.pop(run_id, None)
            return None
        if proposal is None:
            return None
        active, run = proposal.active, proposal.run
        if active.run.version < run.version:
            active.run = run
        self._remember(active, proposal.decision)
        active.material.kept.clear()
        if self._kept is not None and (proposal.done or proposal.decision.used):
            self._kept.later(run.tenant, active.plan, run_id, proposal.done, proposal.decision.used)
        self._keep(active)
        if run.state in RUN_FINAL:
            self._lately.note(run, active.material.params, proposal.decision.result)
        return run

    def _remember(self, active: Active, decision: Decision) -> None:
        material, plan = active.material, active.plan
        for name, output in decision.outputs.items():
            material.lists.pop(name, None)
            if name in plan.read and len(memoryview(output)) <= _KEEP_OUTPUT:
                material.outputs[name] = output
            if (done := material.results.pop(name, None)) is not None:
                active.kept -= sum(len(memoryview(text)) for text in done.values())
        for name, results in decision.results.items():
            if name in decision.outputs or plan.stages[plan.place_of[name]].over is None:
                continue
            size = sum(len(memoryview(text)) for text in results.values())
            if active.kept + size <= _KEEP_RESULTS:
                active.kept += size
                material.results.setdefault(name, {}).update(results)

    # --- the hook -------------------------------------------------------------------------------------------------

    async def follow(self, run_id: str, finished: Sequence[Finished], now: int) -> Advance:
        """See `Follower.follow`. A run that cannot be decided on ends `failed`, so that it blocks no agent's report."""
        active = self._active.get(run_id) or await self.load(run_id)
        if active is None:
            return Advance()
        run = active.run
        try:
            decision = await self.decide(active, run, finished, now)
            if decision.run is run and self._shared and (newer := await self.load(run_id, fresh=True)) is not None:
                # Nothing follows from what may be a stale copy.
                active, run = newer, newer.run
                decision = await self.decide(active, run, finished, now)
        except (LookupError, ValueError, TypeError, AssertionError) as error:
            _log.error("pipelines.decision_failed", run=run_id, error=repr(error))
            decision = Decision(run=broken(run, f"{type(error).__name__}: {error}", now))
        if decision.run is run:
            return Advance(cancel=decision.cancel)
        closing = await self.closing(active, run, decision) if active.plan.waiting else ()
        advance = self.propose(active, run, decision, now, closing=closing)
        if active.plan.cached:
            self._proposals[id(advance)].done = _to_keep(active.plan, finished)
        return advance


def _to_keep(plan: Plan, finished: Sequence[Finished]) -> list[str]:
    """Return the ids of tasks whose results are worth keeping."""
    found: list[str] = []
    for each in finished:
        place = plan.place_of.get(each.task.links.stage or "")
        kept = place is not None and plan.stages[place].stage.cache is not None
        if kept and each.task.state is TaskState.COMPLETED and each.task.links.item != COMPENSATION:
            found.append(each.task.id)
    return found


def _new_task(run: Run, start: Start) -> NewTask:
    stage = start.stage.stage
    # What runs after a run has failed is not held to the deadline that it may have missed.
    undo = stage.compensate if start.item == COMPENSATION else None
    due = None if undo is not None or stage.run_when == "always" else run.deadline_at
    deadline = earlier(due, run.stages[start.stage.place].deadline_at)
    priority = stage.priority if start.priority is None else start.priority
    combine = stage.fan_out.combine if start.item == -1 and stage.fan_out is not None else None
    other = undo or combine
    timeout, retry = (stage.timeout, stage.retry) if other is None else (other.timeout, other.retry)
    spec = TaskSpec(
        type=stage.uses if other is None else other.uses,
        payload=msgspec.Raw(start.payload),
        type_version=stage.version if other is None else "*",
        priority=run.priority if priority is None else priority,
        needs=stage.requires,
        labels=run.labels,
        retry=_DEFAULT_RETRY if retry is None else retry,
        timeout=timeout,
        deadline=None if deadline is None else to_datetime(deadline),
    )
    links = Links(run_id=run.id, stage=stage.id, item=start.item, round=start.round, root_id=run.id)
    return NewTask(
        id=task_id(run.id, stage.id, start.item, start.round),
        spec=spec,
        links=links,
        origin=run.origin,
        draws=run.draws,
    )
