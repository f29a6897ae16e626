"""The planner: what would become of a pipeline if it began now. It changes nothing."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

import msgspec
from msgspec.structs import replace

from mcp_control.agents.service import AgentManager
from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.expressions import Expression, Scope
from mcp_control.pipelines.forecast import SeenAgent, plan_run
from mcp_control.pipelines.params import resolve
from mcp_control.pipelines.plan import Plan, compile_plan, off_loop
from mcp_control.pipelines.plan_model import PlanRequest, RunPlan
from mcp_control.pipelines.validate import read
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.tasks.history import TaskHistory


class Planner:
    """Looks at agents, history and queues.

    Args:
        waiting: returns how many tasks wait, by lane: type, tasks, and how long the oldest has waited.
    """

    def __init__(
        self,
        clock: Clock,
        catalogue: Catalogue,
        manager: AgentManager,
        history: TaskHistory,
        waiting: Callable[[], Iterable[tuple[str, int, float]]],
    ) -> None:
        self._clock = clock
        self._catalogue = catalogue
        self._manager = manager
        self._history = history
        self._waiting = waiting

    async def plan(self, actor: Actor, request: PlanRequest) -> RunPlan:
        """Return what would become of a run.

        Raises:
            NotFound: no such pipeline or version.
            Invalid, InvalidPipeline: the definition or the parameters; everything that is wrong.
            PayloadTooLarge, MalformedJson, TooDeep, DuplicateKey: the text of the definition.
        """
        allow(actor, "pipelines.plan", request.pipeline)
        spec = await self._spec(actor, request)
        warnings = await self._catalogue.check(actor, spec)
        values, missing = _values(spec, request.params)
        warnings += [f"the parameter `{name}` must be given to a run" for name in missing]
        plan = await off_loop(spec, compile_plan, spec)
        history = await self._history.times(actor.tenant, _types(spec))
        await self._manager.look()
        agents = [
            SeenAgent(id=shown.id, spec=agent.spec, state=shown.state, slots=shown.free_slots + shown.running)
            for agent in self._manager.registry.registered(actor.tenant)
            for shown in (self._manager.view(agent),)
        ]
        waiting: dict[str, int] = {}
        for kind, tasks, _ in self._waiting():
            waiting[kind] = waiting.get(kind, 0) + tasks
        found = await off_loop(spec, plan_run, plan, agents, history, _sizes(plan, values, missing), waiting)
        sure = found.routable and found.known and found.p50 is not None
        finish = to_datetime(self._clock.now() + round((found.p50 or 0.0) * 1000)) if sure else None
        return replace(found, warnings=warnings, expected_finish=finish)

    async def _spec(self, actor: Actor, request: PlanRequest) -> PipelineSpec:
        if (request.definition is None) == (request.pipeline is None):
            detail = "either `definition` or `pipeline`"
            raise Invalid(detail, errors=[FieldError(pointer="#", code="missing-field", detail=detail)])
        if request.definition is not None:
            return await asyncio.to_thread(read, request.definition)
        return (await self._catalogue.get(actor, request.pipeline or "", request.version)).spec


def _values(spec: PipelineSpec, given: Mapping[str, msgspec.Raw]) -> tuple[dict[str, bytes], frozenset[str]]:
    """Return parameters, and the names of those that a run would need and that were not given."""
    declared = spec.spec.params
    missing = frozenset(
        name
        for name, param in declared.items()
        if param.required and param.default is msgspec.UNSET and name not in given
    )
    optional = {
        name: replace(param, required=name not in missing and param.required) for name, param in declared.items()
    }
    return resolve(optional, given), missing


def _types(spec: PipelineSpec) -> set[str]:
    found = {stage.uses for stage in spec.spec.stages}
    for stage in spec.spec.stages:
        if stage.fan_out is not None and stage.fan_out.combine is not None:
            found.add(stage.fan_out.combine.uses)
    return found


def _sizes(plan: Plan, values: Mapping[str, bytes], missing: frozenset[str]) -> dict[str, int | None]:
    """Return how many elements fan-outs would have; None where that is not known before the run."""
    scope = Scope({name: value for name, value in values.items() if name not in missing}, _unknown, {})
    return {each.stage.id: _size(each.over, scope) for each in plan.stages if each.over is not None}


def _size(over: Expression, scope: Scope) -> int | None:
    try:
        return len(msgspec.json.decode(over.raw(scope), type=list[msgspec.Raw]))
    except (ExpressionError, msgspec.DecodeError):
        return None


def _unknown(_: str) -> bytes:
    raise ExpressionError("known in the run only")
