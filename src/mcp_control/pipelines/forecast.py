"""What would become of a pipeline now: which agents could take each stage, and when it would end going by history. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from mcp_control.agents.matching import Demand, misfit
from mcp_control.agents.model import AgentSpec, AgentState
from mcp_control.pipelines.definition_model import NESTED, Stage
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.plan_model import OneMore, RunPlan, StagePlan
from mcp_control.pipelines.simulation import Part, Pools, Span, simulate
from mcp_control.pipelines.validate import ITEMS_MAX
from mcp_control.tasks.statistics import Times

AGENTS_SHOWN: Final = 5
_REASONS_SHOWN: Final = 3
_CANDIDATES: Final = 5
_THERE: Final = frozenset({AgentState.ONLINE, AgentState.BUSY})
_AHEAD: Final = (-(1 << 40), 0)
_demand_key: Final = msgspec.json.Encoder(order="sorted").encode


class SeenAgent(msgspec.Struct, frozen=True, kw_only=True):
    """An agent as it is now; `slots` of all its running instances together."""

    id: str
    spec: AgentSpec
    state: AgentState
    slots: int


class _Group(msgspec.Struct, frozen=True):
    able: list[SeenAgent]
    unable: list[str]
    slots: int


def plan_run(
    plan: Plan,
    agents: Sequence[SeenAgent],
    history: Mapping[str, Times],
    sizes: Mapping[str, int | None],
    waiting: Mapping[str, int],
) -> RunPlan:
    """Return what would become of a run.

    Args:
        history: times by task type.
        sizes: elements of fan-outs by stage, None where they are not known beforehand.
        waiting: tasks that wait already, by type.
    """
    fleet = _Fleet(agents)
    stages = [planned.stage for planned in plan.stages]
    main = [fleet.group(demand_of(stage)) for stage in stages]
    ahead = {kind: count for kind, count in waiting.items() if count and kind in fleet.types}
    queued = {kind: fleet.group(Demand(type=kind)) for kind in ahead}
    combining = {
        place: fleet.group(demand_of(stage, stage.fan_out.combine.uses))
        for place, stage in enumerate(stages)
        if stage.fan_out is not None and stage.fan_out.combine is not None
    }
    pools = fleet.pools()

    def parts(seconds: Mapping[str, float]) -> list[Part]:
        last = {place: len(stages) + at for at, place in enumerate(combining)}
        made = [
            Part(
                group=main[place],
                tasks=_at_once(stage, sizes),
                seconds=seconds.get(stage.uses, 0.0) * _waves(stage, sizes),
                needs=tuple(last.get(need, need) for need in plan.stages[place].needs),
                rank=plan.stages[place].rank,
            )
            for place, stage in enumerate(stages)
        ]
        for place, group in combining.items():
            fan_out = stages[place].fan_out
            assert fan_out is not None
            assert fan_out.combine is not None
            made.append(
                Part(
                    group=group,
                    seconds=seconds.get(fan_out.combine.uses, 0.0),
                    needs=(place,),
                    rank=plan.stages[place].rank,
                    holds=False,
                )
            )
        for kind, group in queued.items():
            made.append(Part(group=group, tasks=ahead[kind], seconds=seconds.get(kind, 0.0), rank=_AHEAD, holds=False))
        return made

    width = plan.width
    half = parts({kind: each.p50 for kind, each in history.items()})
    spans = simulate(half, pools, width)
    count = len(stages) + len(combining)
    p50 = _end(spans[:count])
    p90 = _end(simulate(parts({kind: each.p90 for kind, each in history.items()}), pools, width)[:count])
    path = _critical(plan, [_alone(part, fleet.groups[part.group].slots) for part in half], combining)
    asked = [group for group, stage in zip(main, stages, strict=True) if _asks(stage)]
    routable = all(fleet.groups[group].slots for group in (*asked, *combining.values()))
    wanted = {stage.uses for stage in stages} | {
        stage.fan_out.combine.uses
        for stage in stages
        if stage.fan_out is not None and stage.fan_out.combine is not None
    }
    lasts = {place: len(stages) + at for at, place in enumerate(combining)}
    critical = frozenset(path)
    uncertain = _uncertain(plan, history)
    shown = [
        _stage(
            stage,
            fleet.groups[main[place]],
            history,
            sizes,
            spans[place],
            spans[lasts.get(place, place)],
            place in critical,
            place in uncertain,
        )
        for place, stage in enumerate(stages)
    ]
    return RunPlan(
        pipeline=plan.spec.metadata.name,
        warnings=[],
        routable=routable,
        known=wanted <= history.keys(),
        p50=p50,
        p90=p90,
        critical_path=[stages[place].id for place in path],
        waiting=sum(ahead.values()),
        one_more_agent=None if p50 is None else _one_more(fleet, half, pools, width, count, p50),
        stages=shown,
    )


def demand_of(stage: Stage, uses: str | None = None) -> Demand:
    """Return what a stage asks of an agent; `uses` is the type of its combining task."""
    needs = stage.requires
    return Demand(
        type=stage.uses if uses is None else uses,
        type_version=stage.version if uses is None else "*",
        capabilities=needs.capabilities,
        labels=needs.labels,
        resources=needs.resources,
        slots=needs.slots,
        agent=needs.agent,
    )


class _Fleet:
    """Agents and what is asked of them; each demand is looked at once, however many stages have it."""

    def __init__(self, agents: Sequence[SeenAgent]) -> None:
        self._agents = agents
        self._known: dict[bytes, int] = {}
        self.groups: list[_Group] = []
        self.types = {capability.name for agent in agents for capability in agent.spec.capabilities}

    def group(self, demand: Demand) -> int:
        key = _demand_key(demand)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.groups)
            self.groups.append(self._look(demand))
        return found

    def _look(self, demand: Demand) -> _Group:
        able: list[SeenAgent] = []
        unable: list[str] = []
        misfits: list[str] = []
        for agent in self._agents:
            reason = misfit(agent.id, agent.spec, demand)
            if reason is not None:
                misfits.append(f"{agent.spec.name} {reason}")
            elif agent.state in _THERE:
                able.append(agent)
            else:
                unable.append(f"{agent.spec.name} is {agent.state.value}")
        if not self._agents:
            misfits.append("no agent is registered")
        shown = [*sorted(unable), *sorted(misfits)][:_REASONS_SHOWN]
        return _Group(able, shown, sum(agent.slots for agent in able))

    def pools(self) -> dict[frozenset[int], int]:
        slots = {agent.id: agent.slots for agent in self._agents}
        pools: dict[frozenset[int], int] = {}
        for agent_id, groups in self._groups_of().items():
            pools[frozenset(groups)] = pools.get(frozenset(groups), 0) + slots[agent_id]
        return pools

    def examples(self) -> dict[frozenset[int], SeenAgent]:
        """Return one agent of each pool."""
        agents = {agent.id: agent for agent in self._agents}
        return {frozenset(groups): agents[agent_id] for agent_id, groups in self._groups_of().items()}

    def _groups_of(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            for agent in group.able:
                found.setdefault(agent.id, []).append(number)
        return found


def _asks(stage: Stage) -> bool:
    """Say whether a stage asks anything of agents itself: not a run of another pipeline, nor one that waits for people."""
    return bool(stage.uses) and not stage.uses.startswith(NESTED)


def _waits_for(stage: Stage) -> Literal["people", "signal", "run"] | None:
    """Return what a stage waits for that nobody can tell the time of; None where agents do it."""
    if stage.approval is not None:
        return "people"
    if stage.wait_for is not None:
        return "signal"
    return "run" if stage.uses.startswith(NESTED) else None


def _uncertain(plan: Plan, history: Mapping[str, Times]) -> frozenset[int]:
    """Return the places of stages that begin or end later than can be said: they, or one before them, wait or have no history."""
    found: set[int] = set()
    for place in plan.order:
        stage = plan.stages[place].stage
        combine = None if stage.fan_out is None else stage.fan_out.combine
        known = stage.uses in history and (combine is None or combine.uses in history)
        if not known or any(need in found for need in plan.stages[place].needs):
            found.add(place)
    return frozenset(found)


def _at_once(stage: Stage, sizes: Mapping[str, int | None]) -> int:
    return min(_tasks(stage, sizes), _width(stage)) if _asks(stage) else 0


def _waves(stage: Stage, sizes: Mapping[str, int | None]) -> int:
    return -(-_tasks(stage, sizes) // _width(stage))


def _width(stage: Stage) -> int:
    if stage.fan_out is None:
        return 1
    return 1 if stage.fan_out.mode == "sequential" else stage.fan_out.width or ITEMS_MAX


def _tasks(stage: Stage, sizes: Mapping[str, int | None]) -> int:
    if stage.fan_out is None:
        return 1
    size = sizes.get(stage.id)
    return 1 if size is None else size


def _alone(part: Part, slots: int) -> float:
    """Return how long a part takes when nothing else runs."""
    return -(-part.tasks // max(1, slots)) * part.seconds


def _end(spans: Sequence[Span]) -> float | None:
    ends = [span.ends for span in spans]
    return None if None in ends else round(max((end for end in ends if end is not None), default=0.0), 3)


def _critical(plan: Plan, seconds: Sequence[float], combining: Mapping[int, int]) -> list[int]:
    """Return the places of the longest chain; of equally long ones that of most stages."""
    last = {place: len(plan.stages) + at for at, place in enumerate(combining)}
    longest: dict[int, tuple[float, int]] = {}
    before: dict[int, int] = {}
    for place in plan.order:
        best = (0.0, 0)
        for need in plan.stages[place].needs:
            if longest[need] > best:
                best, before[place] = longest[need], need
        own = seconds[place] + (seconds[last[place]] if place in last else 0.0)
        longest[place] = (best[0] + own, best[1] + 1)
    if not longest:
        return []
    path = [max(longest, key=lambda place: longest[place])]
    while path[-1] in before:
        path.append(before[path[-1]])
    return path[::-1]


def _one_more(
    fleet: _Fleet, parts: Sequence[Part], pools: Pools, width: int | None, count: int, p50: float
) -> OneMore | None:
    """Return the kind of agent of which one more saves most; the largest pools are tried."""
    best: OneMore | None = None
    examples = fleet.examples()
    for groups in sorted(examples, key=lambda groups: (-len(groups), examples[groups].spec.name))[:_CANDIDATES]:
        example = examples[groups]
        more = simulate(parts, {**pools, groups: pools[groups] + example.spec.slots}, width)
        end = _end(more[:count])
        saves = 0.0 if end is None else round(p50 - end, 3)
        if saves > 0 and (best is None or saves > best.saves_seconds):
            best = OneMore(like=example.spec.name, saves_seconds=saves)
    return best


def _stage(
    stage: Stage,
    group: _Group,
    history: Mapping[str, Times],
    sizes: Mapping[str, int | None],
    first: Span,
    last: Span,
    critical: bool,
    uncertain: bool,
) -> StagePlan:
    waits_for = _waits_for(stage)
    known = history.get(stage.uses)
    return StagePlan(
        stage=stage.id,
        uses=stage.uses,
        needs=stage.needs,
        able=len(group.able),
        agents=sorted(agent.spec.name for agent in group.able)[:AGENTS_SHOWN],
        unable=group.unable if _asks(stage) else [],
        tasks=sizes.get(stage.id) if stage.fan_out is not None else 1,
        history=0 if known is None else known.count,
        p50=None if known is None else known.p50,
        p90=None if known is None else known.p90,
        waits_for=waits_for,
        begins=None if first.begins is None else round(first.begins, 3),
        ends=None if last.ends is None or waits_for is not None else round(last.ends, 3),
        at_least=uncertain,
        critical=critical,
    )
