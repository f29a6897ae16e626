"""Random histories of submits, connections, reports, cancellations, silence and restarts, against a model made of dictionaries."""

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mcp_control.agents.model import AgentSpec, Capability
from mcp_control.kernel.changes import Query
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import (
    AlreadyTerminal,
    IdempotencyMismatch,
    InvalidTransition,
    LeaseSuperseded,
    Unroutable,
)
from mcp_control.pipelines.approvals import read_question
from mcp_control.pipelines.input_model import ApprovalState
from mcp_control.security.model import Actor
from mcp_control.tasks.ask_model import Answered, Ask
from mcp_control.tasks.ledger import Intent
from mcp_control.tasks.model import (
    FINAL_STATES,
    HELD_STATES,
    Failure,
    Lease,
    Needs,
    Origin,
    RetryPolicy,
    TaskSpec,
    TaskState,
)
from mcp_control.tasks.records import CANCEL_GRACE_MS, read
from mcp_control.tasks.service import Submitted
from mcp_control.tasks.transitions import TRANSITIONS
from mcp_control.tasks.verbs import answering
from mcp_control.tasks.wire import Assignment, Done, Progress, Started
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, Peer, World, world_at

S = TaskState
T = TypeVar("T")
ORIGIN = Origin(principal=ADMIN.id)
LEASE_MS, GRACE_MS = 30_000, 5_000
AGENTS: Final = {"w0": (("echo",), 2), "w1": (("echo", "sum"), 2), "w2": (("sum",), 1)}
STEPS: Final = {
    (source, target) for rows in TRANSITIONS.values() for source, targets in rows.items() for target in targets
}
SAME: Final = {"task.progressed", "task.logged", "task.cancel_requested", "task.updated", "task.retried"}


class Known:
    """What the model knows of a task."""

    def __init__(self, spec: TaskSpec, state: TaskState, now: int) -> None:
        self.spec = spec
        self.state = state
        self.pin = spec.needs.agent
        self.due: int | None = None
        self.deadline = None if spec.deadline is None else now + 60_000
        self.holder = ""
        self.failures = 0
        self.lost = 0
        self.cancel_at: int | None = None
        self.result: bytes | None = None
        self.given: list[Assignment] = []
        self.ended: Done | None = None
        self.ask: Ask | None = None
        self.answer_due = 0
        self.answers: dict[str, str] = {}

    @property
    def held(self) -> bool:
        """Whether an agent has it."""
        return self.state in HELD_STATES

    def end(self, state: TaskState) -> None:
        """Take the lease away."""
        self.state, self.holder = state, ""

    def lose(self) -> None:
        """Lose a lease."""
        self.lost += 1
        self.end(S.CANCELLED if self.cancel_at is not None else S.FAILED if self.lost >= 3 else S.QUEUED)

    def fits(self, name: str) -> bool:
        """Whether an agent can take it."""
        return self.spec.type in AGENTS[name][0] and self.pin in (None, name)


class Instance:
    """What the model knows of an agent's running instance."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.connected = False
        self.ended = True
        self.lease_until = 0


class Tasks(RuleBasedStateMachine):
    """Everything that can happen to tasks."""

    @initialize()
    def begin(self) -> None:
        """Open a world on an empty folder."""
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.known: dict[str, Known] = {}
        self.keys: dict[str, tuple[tuple[str, int], str]] = {}
        self.instances: dict[str, Instance] = {}
        self.stack: AsyncExitStack | None = None
        self.run(self._open())
        self.run(self._register())

    async def _open(self) -> None:
        self.stack = AsyncExitStack()
        self.world: World = await self.stack.enter_async_context(world_at(Path(self.folder.name), self.clock))
        self.held_from = self.clock.now()
        for instance in self.instances.values():
            instance.peer.world = self.world
            instance.connected = False

    async def _register(self) -> None:
        for name, (types, slots) in AGENTS.items():
            spec = AgentSpec(name=name, capabilities=[Capability(name=kind) for kind in types], slots=slots)
            agent = (await self.world.manager.register(ADMIN, spec)).agent
            peer = Peer(self.world, Actor(id=agent.id, kind="agent", roles=("agent",)), spec)
            self.instances[name] = Instance(peer)

    def teardown(self) -> None:
        """Close the world."""
        if hasattr(self, "runner"):
            if self.stack is not None:
                self.run(self.stack.aclose())
            self.runner.close()
            self.folder.cleanup()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run one step on the loop of this history."""

        async def bounded() -> T:
            async with asyncio.timeout(10):
                return await work

        return self.runner.run(bounded())

    def pick(self, number: int, *states: TaskState) -> tuple[str, Known] | None:
        """Choose a task in one of these states."""
        found = [(task_id, task) for task_id, task in sorted(self.known.items()) if task.state in states]
        return found[number % len(found)] if found else None

    @rule(
        kind=st.sampled_from(["echo", "sum", "none"]),
        priority=st.sampled_from([30, 50, 90]),
        delay=st.sampled_from([0, 0, 20]),
        pin=st.sampled_from([None, None, "w0", "w1"]),
        deadline=st.booleans(),
    )
    def submit(self, kind: str, priority: int, delay: int, pin: str | None, deadline: bool) -> None:
        """An accepted task is there once."""
        now = self.clock.now()
        spec = TaskSpec(
            type=kind,
            priority=priority,
            needs=Needs(agent=pin),
            retry=RetryPolicy(max_attempts=2, first_seconds=4),
            run_at=to_datetime(now + delay * 1000) if delay else None,
            deadline=to_datetime(now + 60_000) if deadline else None,
        )
        (result,) = self.run(self.world.tasks.submit(ADMIN, [spec], ORIGIN))
        assert isinstance(result, Submitted)
        assert result.created
        assert result.task.id not in self.known
        task = Known(spec, S.SCHEDULED if delay else S.QUEUED, now)
        task.due = now + delay * 1000 if delay else None
        self.known[result.task.id] = task

    @rule(key=st.sampled_from(["k1", "k2"]), kind=st.sampled_from(["echo", "sum"]), priority=st.sampled_from([50, 60]))
    def submit_keyed(self, key: str, kind: str, priority: int) -> None:
        """One key is one task, whatever became of it meanwhile."""
        spec = TaskSpec(type=kind, priority=priority, idempotency_key=key)
        (result,) = self.run(self.world.tasks.submit(ADMIN, [spec], ORIGIN))
        body = (kind, priority)
        if key not in self.keys:
            assert isinstance(result, Submitted)
            assert result.created
            self.keys[key] = (body, result.task.id)
            self.known[result.task.id] = Known(spec, S.QUEUED, self.clock.now())
        elif self.keys[key][0] == body:
            assert isinstance(result, Submitted)
            assert (result.created, result.task.id) == (False, self.keys[key][1])
        else:
            assert isinstance(result, IdempotencyMismatch)

    @rule(name=st.sampled_from(sorted(AGENTS)))
    def connect(self, name: str) -> None:
        """An instance comes, or comes back with what it still has."""
        instance = self.instances[name]
        running = [task_id for task_id, task in self.known.items() if task.holder == name]
        self.run(instance.peer.connect(*running[:1]))
        instance.connected, instance.ended = True, False
        instance.lease_until = self.clock.now() + LEASE_MS

    @rule(name=st.sampled_from(sorted(AGENTS)))
    def disconnect(self, name: str) -> None:
        """A connection breaks; the leases live on."""
        instance = self.instances[name]
        if instance.connected:
            self.run(self.world.agents.disconnected(instance.peer.live))
            instance.connected = False

    @rule(name=st.sampled_from(sorted(AGENTS)))
    def leave(self, name: str) -> None:
        """An instance ends in good order; what it holds is queued again and costs nothing."""
        instance = self.instances[name]
        if instance.connected:
            self.run(self.world.agents.leave(instance.peer.live))
            instance.connected, instance.ended = False, True
            for task in self.known.values():
                if task.holder == name:
                    task.end(S.CANCELLED if task.cancel_at is not None else S.QUEUED)
                    task.lost = 0

    @rule(number=st.integers(0, 99), again=st.booleans())
    def start(self, number: int, again: bool) -> None:
        """An attempt begins."""
        found = self.pick(number, *((S.ASSIGNED, S.RUNNING) if again else (S.ASSIGNED,)))
        if found is None:
            return
        task_id, task = found
        token = task.given[-1].lease_token
        self._accepted(task, started=[Started(task_id=task_id, lease_token=token)])
        task.state = S.RUNNING

    @rule(number=st.integers(0, 99), fraction=st.floats(-1, 2))
    def progress(self, number: int, fraction: float) -> None:
        """An attempt makes progress."""
        found = self.pick(number, S.ASSIGNED, S.RUNNING)
        if found is None:
            return
        task_id, task = found
        token = task.given[-1].lease_token
        self._accepted(task, progress=[Progress(task_id=task_id, lease_token=token, fraction=fraction)])
        task.state = S.RUNNING

    @rule(
        number=st.integers(0, 99),
        outcome=st.sampled_from(["completed", "completed", "failed", "permanent", "cancelled", "released", "asked"]),
    )
    def done(self, number: int, outcome: str) -> None:
        """An attempt ends, even one whose instance has lost its connection meanwhile."""
        found = self.pick(number, S.ASSIGNED, S.RUNNING)
        if found is None:
            return
        task_id, task = found
        token = task.given[-1].lease_token
        cancelled = task.cancel_at is not None
        failure = None
        if outcome in ("failed", "permanent"):
            failure = Failure(error_class="temporary" if outcome == "failed" else "permanent", code=outcome)
        result = f'"{task_id} {task.given[-1].fence}"'.encode()
        ask = None
        if outcome == "asked":
            default = "approve" if number % 2 else None
            ask = Ask(key=f"q{len(task.given)}", title="Go on?", timeout_seconds=20, default=default)
            task.ask, task.answer_due = ask, self.clock.now() + 20_000
        told = Done(
            task_id=task_id,
            lease_token=token,
            outcome="failed" if failure else outcome,  # type: ignore[arg-type]  # the strategy has the five outcomes
            result=msgspec.Raw(result),
            failure=failure,
            ask=ask,
        )
        self._accepted(task, done=[told])
        if outcome == "completed":
            task.result = result
        if failure is not None:
            task.failures += 1
        if outcome != "cancelled":
            task.lost = 0
        if outcome == "failed" and task.failures < task.spec.retry.max_attempts:
            task.end(S.CANCELLED if cancelled else S.SCHEDULED)
            if not cancelled:
                task.due = self.run(self.world.task(task_id)).not_before
        elif outcome in ("released", "asked"):
            task.end(S.CANCELLED if cancelled else S.QUEUED if outcome == "released" else S.INPUT_REQUIRED)
        else:
            task.end({"completed": S.COMPLETED, "cancelled": S.CANCELLED}.get(outcome, S.FAILED))
        if task.state in FINAL_STATES:
            task.ended = told

    def _accepted(self, task: Known, **report: Any) -> None:
        ack = self.run(self.instances[task.holder].peer.report(**report))
        assert (ack.refused, ack.retry) == ([], False)

    @rule(number=st.integers(0, 99), option=st.sampled_from(["approve", "reject"]))
    def answer(self, number: int, option: str) -> None:
        """A person answers: the task waits for an agent again, with the answer; the second answer is refused."""
        found = self.pick(number, S.INPUT_REQUIRED)
        if found is None:
            return
        task_id, task = found
        assert task.ask is not None
        now = self.clock.now()
        given = Answered(title=task.ask.title, option=option, by="user_anna", at=now)
        intents = [Intent(task_id, answering(task.ask.key, given, now))]
        (result,) = self.run(self.world.settler.settle(intents))
        if task.answer_due <= now:
            assert isinstance(result, InvalidTransition)
            return
        task.answers[task.ask.key] = option
        task.state = S.QUEUED
        (refused,) = self.run(self.world.settler.settle(intents))
        assert isinstance(refused, InvalidTransition)

    @rule(number=st.integers(0, 99), name=st.sampled_from(sorted(AGENTS)))
    def done_again(self, number: int, name: str) -> None:
        """A result told again is accepted, whichever connection it comes by; another result is refused."""
        ended = [task for _, task in sorted(self.known.items()) if task.ended is not None]
        if not ended or self.instances[name].peer.session is None:
            return
        told = ended[number % len(ended)].ended
        assert told is not None
        peer = self.instances[name].peer
        assert self.run(peer.report(done=[told])).refused == []
        other = msgspec.structs.replace(told, outcome="failed", failure=Failure(code="other"))
        (refusal,) = self.run(peer.report(done=[other])).refused
        assert refusal.code == "already-terminal"

    @rule(number=st.integers(0, 99), name=st.sampled_from(sorted(AGENTS)), begins=st.booleans())
    def stale(self, number: int, name: str, begins: bool) -> None:
        """A report under a lease that is over, or that nobody gave, changes nothing."""
        found = self.pick(number, *TaskState)
        peer = self.instances[name].peer
        if found is None or peer.session is None:
            return
        task_id, task = found
        tokens = [given.lease_token for given in task.given[:-1]] + ["made-up"]
        token = tokens[number % len(tokens)]
        if begins:
            ack = self.run(peer.report(started=[Started(task_id=task_id, lease_token=token)]))
        else:
            ack = self.run(peer.report(done=[Done(task_id=task_id, lease_token=token, outcome="completed")]))
        assert [refusal.code for refusal in ack.refused] == [LeaseSuperseded.code]

    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        """A waiting task is cancelled at once, a held one is asked to stop, a final one stays."""
        found = self.pick(number, *TaskState)
        if found is None:
            return
        task_id, task = found
        try:
            after = self.run(self.world.control.cancel(ADMIN, task_id))
        except InvalidTransition:
            assert task.state in FINAL_STATES
            return
        assert task.state not in FINAL_STATES
        if task.held:
            task.cancel_at = task.cancel_at or self.clock.now()
        else:
            task.end(S.CANCELLED)
        assert after.state is task.state

    @rule(number=st.integers(0, 99))
    def retry(self, number: int) -> None:
        """A finished task is tried again as a new one that names it; an open one is not."""
        found = self.pick(number, *TaskState)
        if found is None:
            return
        task_id, task = found
        try:
            created = self.run(self.world.steering.dead_letters.retry(ADMIN, task_id, ORIGIN)).task
        except InvalidTransition:
            assert task.state not in FINAL_STATES
            return
        assert task.state in FINAL_STATES
        assert created.links.retry_of == task_id
        spec = msgspec.structs.replace(task.spec, deadline=None, run_at=None)
        self.known[created.id] = Known(spec, S.QUEUED, self.clock.now())
        self.known[created.id].pin = task.pin

    @rule(number=st.integers(0, 99), name=st.sampled_from(sorted(AGENTS)))
    def assign_by_hand(self, number: int, name: str) -> None:
        """A waiting task goes to the agent an operator chose, if it can do it; choosing twice is choosing once."""
        found = self.pick(number, *TaskState)
        if found is None:
            return
        task_id, task = found
        try:
            self.run(self.world.control.assign(ADMIN, task_id, name))
        except Unroutable:
            assert task.spec.type not in AGENTS[name][0]
        except InvalidTransition:
            assert task.held
        except AlreadyTerminal:
            assert task.state in FINAL_STATES
        else:
            task.pin = name

    @rule(seconds=st.sampled_from([1, 5, 12, 21, 36]), beating=st.sets(st.sampled_from(sorted(AGENTS))))
    def time_passes(self, seconds: int, beating: set[str]) -> None:
        """Those that are heard keep their leases, the silent ones lose them; what is due happens."""
        self.clock.advance(seconds)
        now = self.clock.now()
        for name in beating:
            instance = self.instances[name]
            if instance.connected:
                self.run(self.world.agents.heartbeat(instance.peer.live, self._beat(name)))
                instance.lease_until = now + LEASE_MS
        self.run(self.world.leases.once())
        for name, instance in self.instances.items():
            silent = instance.lease_until < now - GRACE_MS and self.held_from + LEASE_MS <= now
            if not instance.ended and silent:
                instance.ended, instance.connected = True, False
                for task in self.known.values():
                    if task.holder == name:
                        task.lose()
        # What was queued again is given away before time asks for more, or not; both are right.
        self.run(self._settled())
        self._take_in()
        self.run(self.world.timekeeper.once())
        for task in self.known.values():
            self._due(task, now)

    def _beat(self, name: str) -> Any:
        beat = self.instances[name].peer.live.instance.beat
        return msgspec.structs.replace(beat, tick=beat.tick + 1)

    def _due(self, task: Known, now: int) -> None:
        if task.state in FINAL_STATES:
            return
        if task.deadline is not None and task.deadline <= now:
            task.end(S.EXPIRED)
        elif task.held and task.cancel_at is not None and task.cancel_at + CANCEL_GRACE_MS <= now:
            task.end(S.CANCELLED)
        elif task.state is S.SCHEDULED and (task.due or 0) <= now:
            task.state = S.QUEUED
        elif task.state is S.INPUT_REQUIRED and task.ask is not None and task.answer_due <= now:
            task.state = S.FAILED if task.ask.default is None else S.QUEUED
            if task.ask.default is not None:
                task.answers[task.ask.key] = task.ask.default

    @rule()
    def restart(self) -> None:
        """The server ends and starts again on the same data."""
        assert self.stack is not None
        self.run(self.stack.aclose())
        self.run(self._open())

    def _take_in(self) -> None:
        """Hear what the agents were given since."""
        for name, instance in self.instances.items():
            for assignment in instance.peer.given.values():
                task = self.known[assignment.task_id]
                if any(before.lease_token == assignment.lease_token for before in task.given):
                    continue
                assert task.state is S.QUEUED, "only queued tasks are given away"
                assert task.fits(name)
                if task.given:
                    assert _fence(assignment) > _fence(task.given[-1]), "fences grow"
                assert {key: given.option for key, given in assignment.answers.items()} == task.answers
                task.given.append(assignment)
                task.state, task.holder = S.ASSIGNED, name

    async def _settled(self) -> None:
        """Wait until nobody waits whom a free slot fits, and until memory and store agree on who holds what."""

        async def quiet() -> bool:
            holders: dict[str, set[str]] = {}
            queued = []
            for entity in await self.world.store.find("task", Query(limit=5000)):
                task = read(entity)
                if task.lease is not None:
                    holders.setdefault(task.lease.instance_id, set()).add(task.id)
                    if not self._told(task.id, task.lease):
                        return False
                elif task.state is S.QUEUED:
                    queued.append(task.id)
            sessions = list(self.world.sessions.all())
            return all(session.held == holders.get(session.instance.id, set()) for session in sessions) and not any(
                session.free and self._can(session.agent.spec.name, task_id)
                for session in sessions
                for task_id in queued
            )

        await self.world.until(quiet, 3)

    def _told(self, task_id: str, lease: Lease) -> bool:
        """Whether the holder has heard of its lease, or cannot hear now."""
        return self.world.sessions.get(lease.instance_id) is None or any(
            given.lease_token == lease.token
            for instance in self.instances.values()
            if (given := instance.peer.given.get(task_id)) is not None
        )

    def _can(self, name: str, task_id: str) -> bool:
        return task_id in self.known and self.known[task_id].fits(name)

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        """States, leases, results and facts are what they must be after every step."""
        if not hasattr(self, "world"):
            return
        self.run(self._settled())
        self._take_in()
        self.run(self._compare())

    async def _compare(self) -> None:
        entities = await self.world.store.find("task", Query(limit=5000, cold=("result",)))
        assert {entity.id for entity in entities} == set(self.known), "what was accepted is there, once"
        assert await self.world.reconciler.once() == 0, "no task without a live holder"
        tokens = []
        for entity in entities:
            stored, task = read(entity), self.known[entity.id]
            assert (stored.state, stored.failures, stored.lost) == (task.state, task.failures, task.lost), entity.id
            assert entity.cold.get("result") == task.result
            assert (stored.cancel is not None and stored.lease is not None) == (
                task.held and task.cancel_at is not None
            )
            if stored.lease is not None:
                tokens.append(stored.lease.token)
                assert stored.lease.token == task.given[-1].lease_token
        assert len(set(tokens)) == len(tokens)
        for session in self.world.sessions.all():
            assert len(session.held) <= session.slots, "credit is never exceeded"
        inbox = [read_question(row) for row in await self.world.store.find("approval", Query(limit=5000))]
        pending = sorted(one.task_id for one in inbox if one.state is ApprovalState.PENDING)
        waiting = sorted(task_id for task_id, task in self.known.items() if task.state is S.INPUT_REQUIRED)
        assert pending == waiting, "who waits for a person is in the inbox, nobody else"
        await self._facts()

    async def _facts(self) -> None:
        stored = await self.world.store.facts(0, 100_000)
        assert [fact.seq for fact in stored] == list(range(1, len(stored) + 1)), "no gap in the order of facts"
        told: dict[str, TaskState] = {}
        for fact in (entry.fact for entry in stored if entry.fact.type.startswith("task.")):
            state = TaskState(msgspec.json.decode(fact.data)["state"])
            before = told.get(fact.subject)
            if before is None:
                assert fact.type in ("task.queued", "task.scheduled")
            elif fact.type in SAME:
                assert state is before
            else:
                assert (before, state) in STEPS, "one fact per transition"
            told[fact.subject] = state
        assert told == {task_id: task.state for task_id, task in self.known.items()}


def _fence(assignment: Assignment) -> tuple[int, int]:
    generation, epoch = assignment.fence.split(".")
    return int(generation), int(epoch)


def test_random_histories_of_tasks_keep_every_promise() -> None:
    """Nothing accepted is lost or doubled, one result per task, fences grow, nobody waits while a slot fits, facts tell everything."""
    run_state_machine_as_test(
        Tasks,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
