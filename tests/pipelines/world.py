"""A real store, the real task component and the engine, with a clock that moves when told; agents are played by the test."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from mcp_control.agents.model import Agent, AgentSpec, Capability
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.artifacts.service import KINDS as ARTIFACT_KINDS
from mcp_control.kernel.changes import Query, StoredFact, Where
from mcp_control.kernel.errors import Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.healing import RunHealer
from mcp_control.pipelines.input_model import APPROVAL_KIND
from mcp_control.pipelines.inputs import Inputs
from mcp_control.pipelines.model import PIPELINE_KIND, RUN_KIND, Run, RunRequest
from mcp_control.pipelines.nesting import Nesting
from mcp_control.pipelines.result_model import STAGE_RESULT_KIND
from mcp_control.pipelines.results import StageResults
from mcp_control.pipelines.schedule_model import KINDS as SCHEDULE_KINDS
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.security.model import Actor
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.budget_model import BUDGET_KIND
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.ledger import Intent, Ledger, Move
from mcp_control.tasks.model import LOG_KIND, TASK_KIND, Failure, Origin, Task, TaskState
from mcp_control.tasks.records import read, task_fact
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.transitions import assign, complete, fail
from mcp_control.testing.clock import FakeClock

ANNA = Actor(id="user_anna", kind="user", display="Anna", roles=("administrator",))
ORIGIN = Origin(principal="user_anna")
KEEP_MS = 1000
OPEN = (TaskState.QUEUED, TaskState.SCHEDULED)


def agent_of(code: str) -> Agent:
    """Return the agent that does all work of these tests, with its code at this version."""
    spec = AgentSpec(name="worker", capabilities=[Capability(name="work", version=code)])
    return Agent(id="agent_x", version=1, spec=spec, created_at=0)


class World:
    """One server's worth of components over a folder."""

    def __init__(self, store: SqliteStore, facts: list[StoredFact]) -> None:
        self.facts = facts
        self.store = store
        self.clock = FakeClock()
        self.ids = IdSource(self.clock)
        self.agent = agent_of("1")
        self.restart()

    def restart(self) -> None:
        """Forget everything in memory, as a new process would."""
        sessions = Sessions()
        ledger = Ledger(self.store)

        async def hand_out(_pairs: list[tuple[str, Session]]) -> None: ...

        dispatcher = Dispatcher(LocalQueue(), sessions, hand_out)
        self.settler = Settler(ledger, sessions, dispatcher, self.clock, self.ids)
        self.catalogue = Catalogue(self.store, self.clock, self.ids, lambda _tenant: {"work"})
        self.kept = StageResults(self.store, self.clock, lambda _tenant: [self.agent], keep_ms=KEEP_MS)
        self.engine = PipelineEngine(self.store, self.clock, self.ids, self.settler, self.catalogue, kept=self.kept)
        self.settler.follower = self.engine
        self.nesting = Nesting(self.store, self.clock, self.engine)
        self.inputs = Inputs(self.store, self.clock, self.ids, self.engine, self.settler)
        self.healer = RunHealer(self.store, self.engine)

    async def start(self, spec: PipelineSpec, **params: object) -> Run:
        """Accept a definition and execute it."""
        pipeline, _ = await self.engine.create(ANNA, spec)
        given = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in params.items()}
        run, created = await self.engine.execute(ANNA, pipeline.name, RunRequest(params=given), ORIGIN)
        assert created
        return run

    async def tasks(self, run: Run, stage: str | None = None, states: Sequence[TaskState] = OPEN) -> list[Task]:
        """Return the run's tasks in these states, in the order of their items."""
        rows = await self.store.find("task", Query(where=[Where("run", "eq", run.id)], limit=20_000))
        found = [task for row in rows if (task := read(row)).state in states and stage in (None, task.links.stage)]
        return sorted(found, key=lambda task: (task.links.stage or "", task.links.round, task.links.item or 0))

    async def payload(self, task: Task) -> object:
        """Return what an agent would be given."""
        entity = (await self.store.get("task", [task.id], ("payload",)))[0]
        assert entity is not None
        return msgspec.json.decode(entity.cold["payload"])

    async def finish(self, tasks: Sequence[Task], result: Callable[[Task], object] | object = None) -> None:
        """Complete tasks all at once, as one agent's report does."""

        def decide(task: Task) -> Move:
            value = result(task) if callable(result) else result
            now = self.clock.now()
            done = complete(assign(task, "agent_x", "inst_x", "token", now), now)
            return Move(done, [task_fact("task.completed", done, "agent_x", now)], result=msgspec.json.encode(value))

        await self._settle([Intent(task.id, decide) for task in tasks])

    async def fail(self, tasks: Sequence[Task], message: str = "broken") -> None:
        """Fail tasks for good."""

        def decide(task: Task) -> Move:
            now = self.clock.now()
            failure = Failure(error_class="permanent", code="boom", message=message)
            return Move(fail(assign(task, "agent_x", "inst_x", "token", now), failure, now, 0.0))

        await self._settle([Intent(task.id, decide) for task in tasks])

    async def _settle(self, intents: list[Intent]) -> None:
        for outcome in await self.settler.settle(intents):
            if isinstance(outcome, Problem):
                raise outcome

    async def settled(self) -> None:
        """Wait until the task component has done what it does in the background."""
        every = (self.settler.handing.background, self.nesting.background, self.kept.background)
        # One may begin work of another: all have to be at rest in the same moment.
        while any(each.busy for each in every):
            for each in every:
                await each.idle()

    async def run(self, run: Run) -> Run:
        """Return the run as the engine knows it."""
        return await self.engine.run(ANNA, run.id)

    def told(self, run: Run) -> list[str]:
        """Return the types of the run's facts but those of tasks, in order."""
        return [
            stored.fact.type
            for stored in self.facts
            if stored.fact.run == run.id and not stored.fact.type.startswith("task.")
        ]


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """Open a world over a folder."""
    problems: list[Problem] = []
    facts: list[StoredFact] = []
    store = SqliteStore(folder, fatal=problems.append)
    await store.open(
        [
            BUDGET_KIND,
            TASK_KIND,
            LOG_KIND,
            PIPELINE_KIND,
            RUN_KIND,
            STAGE_RESULT_KIND,
            APPROVAL_KIND,
            *SCHEDULE_KINDS,
            *ARTIFACT_KINDS,
        ],
        facts.extend,
    )
    made = World(store, facts)
    try:
        yield made
    finally:
        await made.kept.background.close()
        await made.nesting.background.close()
        await made.settler.handing.background.close()
        await store.close()
    assert not problems
