"""A run while it is being decided: what is known, what was decided so far, and the few ways to note it. Pure."""

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.pipelines.decision import Decision, Material, Missing, Start
from mcp_control.pipelines.expressions import Raw, Scope
from mcp_control.pipelines.model import STAGE_FINAL, Run, RunState, StageRun, StageState
from mcp_control.pipelines.plan import Plan, PlannedStage

PAYLOAD_MAX: Final = 1 << 20
_OUTPUT_SMALL: Final = 256
_STAGES_FEW: Final = 16
_GOING: Final = frozenset({RunState.PENDING, RunState.RUNNING, RunState.INPUT_REQUIRED})
_TIMED: Final = frozenset({StageState.RUNNING, StageState.INPUT_REQUIRED})
OPEN: Final = frozenset({StageState.PENDING, StageState.READY})
_PENDING: Final = RunState.PENDING


class Draft:
    """A run while it is being decided. Lives for one decision.

    Attributes:
        before: the run as it was; run, stages: as they are now.
        start, cancel, asked, outputs, results: as in `Decision`.
        progressed: places of stages that counted a task; ended: how many tasks those were.
        summary: the run's summary where it changed.
    """

    __slots__ = (
        "asked",
        "before",
        "cancel",
        "ended",
        "hits",
        "material",
        "now",
        "outputs",
        "plan",
        "progressed",
        "result",
        "results",
        "run",
        "stages",
        "start",
        "summary",
        "used",
    )

    def __init__(self, plan: Plan, run: Run, material: Material, now: int) -> None:
        self.plan = plan
        self.before = run
        self.run = run
        self.stages = list(run.stages)
        self.material = material
        self.now = now
        self.start: list[Start] = []
        self.cancel: list[str] = []
        self.asked: dict[int, bytes] = {}
        self.outputs: dict[str, Raw] = {}
        self.results: dict[str, dict[int, Raw]] = {}
        self.progressed: set[int] = set()
        self.ended = 0
        self.result: Raw | None = None
        self.hits: dict[str, dict[int, Raw]] = {}
        self.used: list[str] = []
        self.summary: dict[str, object] | None = None

    def close(self, place: int, state: StageState, reason: str | None = None, message: str | None = None) -> None:
        """End a stage in a state; reason and message stay where none are given."""
        stage = self.stages[place]
        self.stages[place] = replace(
            stage,
            state=state,
            finished_at=self.now,
            reason=stage.reason if reason is None else reason,
            message=stage.message if message is None else message,
        )

    def fail(self, place: int, message: str, reason: str = "expression-error") -> None:
        """Fail a stage, and the run with it."""
        self.close(place, StageState.FAILED, reason, message[:500])
        self.end(RunState.FAILED, reason, f"stage {self.stages[place].id}: {message}"[:500])

    def spoil(self, place: int, message: str) -> None:
        """Fail a stage that may have tasks under way, and the run with it; it ends when they have."""
        self.stages[place] = replace(self.stages[place], reason="expression-error", message=message[:500])
        self.end(RunState.FAILED, "expression-error", f"stage {self.stages[place].id}: {message}"[:500])

    def made(
        self, planned: PlannedStage, item: int | None, round: int, payload: bytes, priority: int | None = None
    ) -> Start:
        """Return a task to start. Raises ExpressionError when its payload is too large."""
        return Start(planned, item, round, self.sized(payload), priority)

    def sized(self, payload: bytes) -> bytes:
        """Return a payload that is not too large. Raises ExpressionError."""
        if len(payload) > PAYLOAD_MAX:
            raise ExpressionError(
                f"the payload would have {len(payload)} bytes, at most {PAYLOAD_MAX}; pass data as artifacts"
            )
        return payload

    def small(self, output: Raw) -> bytes:
        """Return an output that is kept with the stage; nothing where it is too large for that, or there are too many."""
        if len(self.stages) > _STAGES_FEW or len(memoryview(output)) > _OUTPUT_SMALL:
            return b""
        return bytes(output)

    def scope(
        self,
        *,
        item: Raw | None = None,
        index: int | None = None,
        items: Sequence[Raw] | None = None,
        failures: Sequence[Raw] | None = None,
        output: Raw | None = None,
    ) -> Scope:
        """Return what expressions see. Raises Missing."""
        params = self.material.params
        if params is None:
            raise Missing(params=True)
        run = self.run
        about = {"id": run.id, "pipeline": run.pipeline, "version": run.pipeline_number, "round": run.round}
        return Scope(
            params,
            self.output_of,
            about,
            item=item,
            index=index,
            items=items,
            failures=failures,
            output=output,
            state_of=self.state_of,
        )

    def state_of(self, stage_id: str) -> str:
        """Return the state of a stage by id."""
        return self.stages[self.plan.place_of[stage_id]].state.value

    def output_of(self, stage_id: str) -> Raw:
        """Return the output of a stage by id, null where it ended without one. Raises Missing."""
        found = self.outputs.get(stage_id)
        if found is None:
            found = self.material.outputs.get(stage_id)
        if found is None:
            stage = self.stages[self.plan.place_of[stage_id]]
            if stage.output:
                return stage.output
            if stage.state in STAGE_FINAL and not stage.has_output:
                return b"null"
            raise Missing(output=stage_id)
        return found

    def end(self, state: RunState, reason: str, message: str) -> None:
        """Have the run end; the first reason stands."""
        if self.run.ending is None:
            self.run = replace(self.run, ending=state, reason=reason, message=message)

    def free(self, planned: PlannedStage) -> int | None:
        """Return how many slots there are for more tasks of a stage, with those that just ended; None where that is not known."""
        free = self.material.free.get(planned.stage.id)
        return None if free is None else free + self.ended

    def over(self) -> bool:
        """Say whether all stages have ended."""
        for stage in self.stages:  # noqa: SIM110  twice as fast as `all`, on the path of every task
            if stage.state not in STAGE_FINAL:
                return False
        return True

    def late(self) -> bool:
        """Say whether the deadline of the run has passed."""
        return self.run.deadline_at is not None and self.run.deadline_at <= self.now

    def running(self) -> int:
        """Return how many stages run."""
        return sum(stage.state is StageState.RUNNING for stage in self.stages)

    def _asking(self, run: Run) -> Run:
        """Return the run in the state that says whether anything goes on by itself."""
        if run.state not in _GOING:
            return run
        states = {stage.state for stage in self.stages}
        waits = run.ending is None and StageState.INPUT_REQUIRED in states and StageState.RUNNING not in states
        state = RunState.INPUT_REQUIRED if waits else RunState.RUNNING
        if state is run.state:
            return run
        started = self.now if run.started_at is None else run.started_at
        return replace(run, state=state, state_at=self.now, started_at=started)

    def _stage_due(self) -> int | None:
        due = [stage.deadline_at for stage in self.stages if stage.state in _TIMED and not stage.reason]
        return min((at for at in due if at is not None), default=None)

    def _still_asked(self) -> dict[int, bytes]:
        stages = self.stages
        return {at: text for at, text in self.asked.items() if stages[at].state is StageState.INPUT_REQUIRED}

    def decision(self) -> Decision:
        """Return what was decided."""
        before, run, stages = self.before, self.run, self.stages
        moved: list[StageRun] = []
        progressed: list[StageRun] = []
        changed = False
        for old, new in zip(before.stages, stages, strict=True):
            if old is not new:
                changed = True
                if old.state is not new.state:
                    moved.append(new)
                elif self.plan.place_of[new.id] in self.progressed:
                    progressed.append(new)
        if run is before and not changed:
            return Decision(run=before, cancel=self.cancel)
        if self.plan.timed:
            run = replace(run, stage_due=self._stage_due())
        if self.plan.waiting:
            run = self._asking(run)
        pending = run.state is _PENDING
        run = replace(
            run,
            version=before.version + 1,
            stages=stages,
            summary=run.summary if self.summary is None else self.summary,
            started_at=self.now if (self.start or self.asked) and run.started_at is None else run.started_at,
            state=RunState.RUNNING if pending else run.state,
            state_at=self.now if pending else run.state_at,
        )
        return Decision(
            run=run,
            start=self.start,
            cancel=self.cancel,
            asked=self._still_asked() if self.asked else self.asked,
            outputs=self.outputs,
            result=self.result,
            hits=self.hits,
            used=self.used,
            results=self.results,
            moved=moved,
            progressed=progressed,
        )
