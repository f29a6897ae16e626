"""A definition made ready for running: places instead of names, expressions compiled once."""

import asyncio
from collections.abc import Callable
from graphlib import TopologicalSorter
from typing import Final, ParamSpec, TypeVar

import msgspec

from mcp_control.pipelines.definition_model import NESTED, PipelineSpec, Stage
from mcp_control.pipelines.expressions import Expression
from mcp_control.pipelines.model import StageRun, StageState
from mcp_control.pipelines.templates import Template
from mcp_control.pipelines.view_model import StageView

P = ParamSpec("P")
T = TypeVar("T")
_STAGES_AT_ONCE: Final = 100


async def off_loop(spec: PipelineSpec, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Do some work on a definition; in a thread where it is so large that the event loop would stand still meanwhile."""
    if len(spec.spec.stages) <= _STAGES_AT_ONCE:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


class PlannedStage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage with its place in the definition, the places before and after it, and what it computes with.

    Attributes:
        rank: order in which stages start where there is a choice: higher priority first, then the place.
        nested: the pipeline of which it, or each of its items, is a run.
        windowed: its items are started bit by bit; lenient: some of them may fail.
        untouched: as it is in a new run; shown: what callers see of it then.
    """

    place: int
    stage: Stage
    rank: tuple[int, int]
    needs: tuple[int, ...]
    after: tuple[int, ...]
    payload: Template
    untouched: StageRun
    shown: StageView
    over: Expression | None = None
    combine: Template | None = None
    gate: Expression | None = None
    when: Expression | None = None
    item_rank: Expression | None = None
    match: Expression | None = None
    undo: Template | None = None
    nested: str | None = None
    windowed: bool = False
    lenient: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A whole definition.

    Attributes:
        order: places so that needs come first.
        read: the stages whose outputs others read.
        width: how many stages may run at once.
        choosy: what may start depends on what else runs.
        cleaning: places of the stages that run even when the run has failed.
        timed: some stage has a deadline.
        nested: places of the stages that are runs of other pipelines; cached: of those that take results of earlier runs.
        outputs: what a run gives when it has completed.
        adaptive: places of the stages of which more is under way the more room agents have.
        waiting: places of the stages that wait for an answer or a signal; undoing: of those that can be undone.
    """

    spec: PipelineSpec
    stages: tuple[PlannedStage, ...]
    place_of: dict[str, int]
    order: tuple[int, ...]
    read: frozenset[str]
    width: int | None = None
    choosy: bool = False
    cleaning: frozenset[int] = frozenset()
    timed: bool = False
    adaptive: frozenset[int] = frozenset()
    nested: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    outputs: Template | None = None
    waiting: tuple[int, ...] = ()
    undoing: tuple[int, ...] = ()

    def descendants(self, place: int) -> set[int]:
        """Return the places of all stages that come after one."""
        found: set[int] = set()
        waiting = [place]
        while waiting:
            for after in self.stages[waiting.pop()].after:
                if after not in found:
                    found.add(after)
                    waiting.append(after)
        return found


def compile_plan(spec: PipelineSpec) -> Plan:
    """Compile a definition that `validate` accepted."""
    stages = spec.spec.stages
    place_of = {stage.id: place for place, stage in enumerate(stages)}
    after: list[list[int]] = [[] for _ in stages]
    for place, stage in enumerate(stages):
        for need in stage.needs:
            after[place_of[need]].append(place)
    planned = tuple(
        _planned(place, stage, place_of, tuple(after[place]), spec.spec.priority) for place, stage in enumerate(stages)
    )
    order = tuple(TopologicalSorter({stage.place: stage.needs for stage in planned}).static_order())
    read: set[str] = set()
    for each in planned:
        read |= each.payload.stages
        for part in (each.over, each.combine, each.gate, each.when, each.item_rank, each.match, each.undo):
            if part is not None:
                read |= part.stages
    body = spec.spec
    outputs = Template(body.outputs) if body.outputs else None
    if outputs is not None:
        read |= outputs.stages
    width = 1 if body.mode == "sequential" else body.max_running
    return Plan(
        spec=spec,
        stages=planned,
        place_of=place_of,
        order=order,
        read=frozenset(read),
        width=width,
        choosy=width is not None or body.mode != "concurrent",
        cleaning=frozenset(place for place, stage in enumerate(stages) if stage.run_when == "always"),
        cached=tuple(place for place, stage in enumerate(stages) if stage.cache is not None),
        nested=tuple(each.place for each in planned if each.nested is not None),
        outputs=outputs,
        adaptive=frozenset(
            place
            for place, stage in enumerate(stages)
            if body.mode == "adaptive" or (stage.fan_out is not None and stage.fan_out.mode == "adaptive")
        ),
        timed=any(stage.deadline_seconds is not None or _timeout(stage) is not None for stage in stages),
        waiting=tuple(place for place, stage in enumerate(stages) if stage.approval or stage.wait_for),
        undoing=tuple(place for place, stage in enumerate(stages) if stage.compensate is not None),
    )


def _timeout(stage: Stage) -> float | None:
    waits = stage.approval or stage.wait_for
    return None if waits is None else waits.timeout_seconds


def _payload(stage: Stage) -> Template:
    asks = stage.approval
    return Template(stage.with_ if asks is None else {"title": asks.title, "message": asks.message})


def _planned(place: int, stage: Stage, place_of: dict[str, int], after: tuple[int, ...], priority: int) -> PlannedStage:
    fan_out = stage.fan_out
    return PlannedStage(
        place=place,
        stage=stage,
        rank=(-(priority if stage.priority is None else stage.priority), place),
        needs=tuple(place_of[need] for need in stage.needs),
        after=after,
        payload=_payload(stage),
        untouched=StageRun(id=stage.id),
        shown=StageView(name=stage.id, state=StageState.PENDING, uses=stage.uses, needs=stage.needs, progress=0.0),
        over=None if fan_out is None else Expression(fan_out.over),
        combine=None if fan_out is None or fan_out.combine is None else Template(fan_out.combine.with_),
        gate=None if stage.gate is None else Expression(stage.gate.check),
        match=None if stage.wait_for is None or stage.wait_for.match is None else Expression(stage.wait_for.match),
        undo=None if stage.compensate is None else Template(stage.compensate.with_),
        when=None if stage.when is None else Expression(stage.when),
        item_rank=None if fan_out is None or fan_out.rank is None else Expression(fan_out.rank),
        nested=stage.uses.removeprefix(NESTED) if stage.uses.startswith(NESTED) else None,
        windowed=fan_out is not None and (fan_out.width is not None or fan_out.mode in ("sequential", "adaptive")),
        lenient=fan_out is not None and fan_out.at_least is not None,
    )
