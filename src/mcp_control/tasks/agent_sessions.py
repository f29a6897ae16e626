"""What an agent's connection can ask for, whichever door it came through: connect, heartbeat, report, claim, leave."""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec.structs import replace

from mcp_control.agents.model import PROTOCOL_VERSION, Beat
from mcp_control.agents.reserving import Load, load_of
from mcp_control.agents.service import AgentManager
from mcp_control.agents.sessions import Frame, Session
from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Forbidden, LeaseSuperseded, Problem
from mcp_control.security.model import Actor
from mcp_control.storage.ports import Store
from mcp_control.tasks.budget_model import Over
from mcp_control.tasks.budgets import CODE, sentence
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.ledger import Intent, Ledger
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.peers import Peers
from mcp_control.tasks.records import assignment
from mcp_control.tasks.reports import LogCap, deciding, gather
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.speeds import Speeds
from mcp_control.tasks.spending import Spending, Told
from mcp_control.tasks.verbs import losing, releasing
from mcp_control.tasks.wire import UNKNOWN_TYPE, Ack, BeatAck, Done, Hello, Refusal, Report, Tasks, Welcome

_HELD_MAX: Final = 10_000
_ON_ITS_WAY_MS: Final = 3000  # how long an assignment may be under way to an agent that polls


class AgentSessions:
    """The agents' side of the task component.

    Attributes:
        speeds: told how long attempts took that completed.
        log_cap: how much is kept of what a task logs.
        tried: told how a task ended that an agent on trial was given.
        refused: how often an agent reported under a lease that was not the live one, or after the end.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        manager: AgentManager,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        spending: Spending,
        chance: Callable[[], float] = random.random,
        peers: Peers | None = None,
    ) -> None:
        self._peers = peers or Peers(None)
        self._missing: dict[str, set[str]] = {}
        self.log_cap = LogCap()
        self.speeds: Speeds | None = None
        self.tried: Callable[[Session, Task, str], Awaitable[None]] | None = None
        self._store = store
        self._clock = clock
        self._manager = manager
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self._spending = spending
        self._chance = chance
        self.refused = 0

    async def connect(
        self,
        actor: Actor,
        hello: Hello,
        send: Callable[[Sequence[Frame]], None],
        *,
        address: str = "",
        allowance: int | None = None,
    ) -> Session:
        """Open or resume the session of an instance: `Welcome` is sent first, then what it holds and does not know of, then new work.

        Args:
            send: puts frames on their way without waiting; must not fail.
            allowance: None for a socket; 0 for a poller, which raises it with `claim`.

        Raises:
            Forbidden, AgentSuspended: not this agent, or an agent that gets no work.
        """
        agent = await self._manager.session_of(actor, hello.agent)
        instance = await self._manager.instances.open(actor, agent, hello.instance_id, hello.software, address)
        session = Session(agent, instance, agent.spec.slots, send, allowance)
        held = await self.held_by(instance.id)
        session.leaving = hello.beat.draining
        for task in held:
            session.hold(task.id, load_of(task.needs.slots, task.needs.resources), task.type)
        session.refresh(agent)
        known = set(hello.beat.running)
        send(
            [
                Welcome(
                    protocol=PROTOCOL_VERSION,
                    agent_id=agent.id,
                    instance_id=instance.id,
                    lease_ms=instance.lease_ms,
                    beat_ms=instance.lease_ms // 3,
                    resumed=sorted(session.held & known),
                )
            ]
        )
        self._manager.sessions.add(session)
        try:
            await self._manager.instances.connected(session)
            self._peers.opened(instance.id)
            unknown = [task.id for task in held if task.id not in known]
            if unknown:
                found = await self._ledger.load_with_payload(unknown)
                again = [
                    assignment(task, payload)
                    for task, payload in filter(None, found)
                    if task.lease and task.lease.instance_id == instance.id
                ]
                if again:
                    send([Tasks(tasks=again)])
        except BaseException:
            # The door tells the agent that it is not connected; nothing may be sent into a connection that nobody reads.
            if self._manager.sessions.get(instance.id) is session:
                self._manager.sessions.drop(instance.id)
            raise
        return session

    async def resume(
        self, actor: Actor, instance_id: str, send: Callable[[Sequence[Frame]], None], *, address: str = ""
    ) -> Session:
        """Take over the session of a polling agent from another server, as when a load balancer sends its next request here.

        Raises:
            LeaseSuperseded: there is no such session any more.
            Forbidden: it is another agent's.
        """
        instance = await self._manager.instances.read(instance_id)
        if instance is None or instance.ended_at is not None:
            raise LeaseSuperseded("this session is over; say hello again")
        if instance.agent_id != actor.id:
            raise Forbidden("this session is that of another agent")
        agent = self._manager.registry.by_id(actor.id) or await self._manager.registry.fetch(actor.id)
        if agent is None:
            raise LeaseSuperseded("this session is over; say hello again")
        # What was put on its way on the other server just before may have stayed there: it is sent again unless it is known to have come.
        since = self._clock.now() - _ON_ITS_WAY_MS
        held = await self.held_by(instance_id)
        beat = replace(instance.beat, running=[task.id for task in held if not _lost_on_its_way(task, since)])
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            agent=agent.spec,
            instance_id=instance_id,
            software=instance.software,
            beat=beat,
        )
        return await self.connect(actor, hello, send, address=address, allowance=0)

    async def taken_over(self, ids: Sequence[str]) -> None:
        """Hear that instances were opened or ended by another server; a session here that is no longer the live one is dropped."""
        for instance_id in ids:
            session = self._manager.sessions.get(instance_id)
            if session is None or await self._manager.instances.connected_here(instance_id):
                continue
            if self._manager.sessions.get(instance_id) is session:
                self._manager.sessions.drop(instance_id)

    async def held_by(self, instance_id: str) -> list[Task]:
        """Return the tasks whose lease an instance holds."""
        found = await self._store.find("task", Query(where=[Where("holder", "eq", instance_id)], limit=_HELD_MAX))
        return [
            task
            for task in self._ledger.readable(found)
            if task.lease is not None and task.lease.instance_id == instance_id
        ]

    async def heartbeat(self, session: Session, beat: Beat) -> BeatAck:
        """Renew the session's lease.

        Raises:
            LeaseSuperseded: it has ended already; the agent must connect as a new instance.
        """
        self._current(session)
        if beat.draining and not session.leaving:
            await self.drain(session)
        await self._manager.instances.beat(session, beat)
        if self._ledger.shared:
            await self._compare(session, beat)
        gone = [task_id for task_id in beat.running if task_id not in session.held]
        running = [task_id for task_id in beat.running if task_id in session.held]
        cancel = [
            task.id
            for task in await self._ledger.load(running, fresh=True)
            if task is not None and task.cancel is not None
        ]
        agent = session.agent
        drain = agent.drain is not None or agent.retired_at is not None
        return BeatAck(lease_ms=session.instance.lease_ms, gone=gone, cancel=cancel, drain=drain)

    async def _compare(self, session: Session, beat: Beat) -> None:
        """Set right what a session holds by what the store says: another server may have had this instance's session a moment ago."""
        instance_id = session.instance.id
        before = set(session.held)
        stored = {task.id: task for task in await self.held_by(instance_id)}
        gone = (before & session.held) - stored.keys()
        # A slot may be reserved for a task on its way into the store: only what is missing twice is gone.
        for task_id in gone & self._missing.pop(instance_id, set()):
            self._dispatcher.unreserve(session, task_id)
        if gone:
            self._missing[instance_id] = gone
        unheard = [task_id for task_id in stored if task_id not in session.held]
        for task_id in unheard:
            task = stored[task_id]
            session.hold(task_id, load_of(task.needs.slots, task.needs.resources), task.type)
        if session.allowance is not None:
            since = self._clock.now() - max(_ON_ITS_WAY_MS, session.instance.lease_ms // 3)
            unheard += [task.id for task in stored.values() if _lost_on_its_way(task, since)]
        if missing := [task_id for task_id in dict.fromkeys(unheard) if task_id not in beat.running]:
            found = await self._ledger.load_with_payload(missing)
            again = [assignment(task, payload) for task, payload in filter(None, found) if task.lease is not None]
            if again:
                session.send([Tasks(tasks=again)])

    async def report(self, session: Session, report: Report) -> Ack:
        """Record what an agent reports; durable on return but for what is refused. `retry` in the answer: send it again."""
        now = self._clock.now()
        actor = session.agent.id
        intents: list[Intent] = []
        freed: list[tuple[str, Load | None]] = []
        gathered = gather(report)
        for (task_id, token), told in gathered.items():
            intents.append(Intent(task_id, deciding(told, actor, now, self._chance, self.log_cap)))
            if told.done is not None and self._ledger.leased(task_id, token):
                # The slot is free as soon as the agent says so; its next task may share the commit of this result.
                freed.append((task_id, session.let_go(task_id)))
        self._dispatcher.freed(session)
        over: dict[str, Over] = {}
        try:
            if using := self._using(report):
                # First what was used: what ended may start others, and they must know what is left.
                over = await self._spending.told(using, actor)
            results = await self._settler.settle(intents)
        except Problem as problem:
            if problem.status < 500:
                raise
            # Not recorded for all we know: still the agent's, until it has said so again.
            for task_id, load in freed:
                session.hold(task_id, load)
            return Ack(id=report.id, retry=True)
        refused: list[Refusal] = []
        for ((task_id, _), told), result in zip(gathered.items(), results, strict=True):
            if task_id in over:
                refused.append(Refusal(task_id=task_id, code=CODE, detail=sentence(over[task_id])))
            elif isinstance(result, Problem):
                refused.append(Refusal(task_id=task_id, code=result.code, detail=result.detail))
                await self._refused(session, task_id)
            elif told.done is not None:
                self._let_go(session, result)
                outcome = _ended(told.done)
                if outcome == UNKNOWN_TYPE:
                    self._manager.sessions.turned_down(session, result.type)
                if told.moved and outcome in ("completed", "failed"):  # a repeated report counts once
                    self._manager.registry.count(actor, outcome)
                    if outcome == "completed" and self.speeds is not None and self.speeds.asked:
                        began = result.started_at or now
                        self.speeds.ran(actor, result.type, (now - began) / 1000)
                    if session.probing and self.tried is not None:
                        await self.tried(session, result, outcome)
        return Ack(id=report.id, refused=refused)

    def _using(self, report: Report) -> list[Told]:
        """Return what a report says of usage; the end of a task that draws from a budget ends what it holds of it."""
        if not report.used and not any(self._ledger.draws(done.task_id) for done in report.done):
            return []
        spent = {(used.task_id, used.lease_token): used.spent for used in report.used}
        told = [
            Told(done.task_id, done.lease_token, spent.pop((done.task_id, done.lease_token), None), over=True)
            for done in report.done
        ]
        return [*told, *(Told(task_id, token, each) for (task_id, token), each in spent.items())]

    async def _refused(self, session: Session, task_id: str) -> None:
        """Free the slot of a task that is not this instance's any more; it may hold it again under a newer lease."""
        self.refused += 1
        try:
            task = (await self._ledger.load([task_id]))[0]
        except Problem:
            return
        if task is None:
            self._dispatcher.unreserve(session, task_id)
        else:
            self._let_go(session, task)

    def _let_go(self, session: Session, task: Task) -> None:
        # A queued task that is held is on its way to this session right now.
        held = task.lease is not None and task.lease.instance_id == session.instance.id
        if not held and task.state is not TaskState.QUEUED:
            self._dispatcher.unreserve(session, task.id)

    async def leave(self, session: Session) -> None:
        """End a session in good order; what it still holds is queued again."""
        self._current(session)
        session.leaving = True
        session.refresh(session.agent)
        instance_id = session.instance.id
        now = self._clock.now()
        await self._release(instance_id, now)
        await self._manager.instances.end(instance_id, "left")
        # What was on its way to it meanwhile.
        await self._release(instance_id, now)

    async def _release(self, instance_id: str, now: int) -> None:
        while tasks := await self.held_by(instance_id):
            await self._settler.settle([Intent(task.id, releasing(instance_id, now)) for task in tasks])

    async def drain(self, session: Session) -> None:
        """Give a session nothing new; an agent all of whose sessions leave is `draining`."""
        session.leaving = True
        session.refresh(session.agent)
        self._dispatcher.closed(session)
        await self._manager.registry.restate(session.agent.id)

    async def disconnected(self, session: Session) -> None:
        """Hear that a connection is gone. Its leases live on until they end: the instance may come back."""
        self._missing.pop(session.instance.id, None)
        if self._manager.sessions.get(session.instance.id) is session:
            self._manager.sessions.drop(session.instance.id)
            await self._manager.instances.disconnected(session)

    async def take_back(self, instance_id: str, now: int) -> int:
        """Queue again everything an instance holds, then end it; returns how many tasks that were.

        Tasks first: after a crash in between, the instance is still overdue and this is done again. A heartbeat in between keeps the
        instance alive, which then hears that its tasks are gone.
        """
        self.silence(instance_id)
        taken = await self._lose(instance_id, now)
        if await self._manager.instances.end(instance_id, "lease-expired", unless_alive_at=now):
            self._peers.opened(instance_id)
            # What was on its way to it meanwhile.
            taken += await self._lose(instance_id, now)
        return taken

    def silence(self, instance_id: str) -> None:
        """Give an instance nothing new that is silent on an open connection, until its next heartbeat sets this right."""
        session = self._manager.sessions.get(instance_id)
        if session is not None:
            session.stalled = True
            self._manager.sessions.refresh(session.agent)

    async def _lose(self, instance_id: str, now: int) -> int:
        taken = 0
        while tasks := await self.held_by(instance_id):
            for task in tasks:
                if task.lease is not None:
                    self._manager.registry.count(task.lease.agent_id, "lost")
            taken += len(tasks)
            await self._settler.settle([Intent(task.id, losing(instance_id, now)) for task in tasks])
        return taken

    def _current(self, session: Session) -> None:
        if self._manager.sessions.get(session.instance.id) is not session:
            raise LeaseSuperseded("this session is over")


def _ended(done: Done) -> str:
    """Return how an attempt ended, for the figures of its agent; that what it needs is not to be had is no failure of it."""
    failure = done.failure
    if failure is None:
        return done.outcome
    if failure.code == UNKNOWN_TYPE:
        return UNKNOWN_TYPE
    return done.outcome if failure.retry_after is None else "postponed"


def _lost_on_its_way(task: Task, since: int) -> bool:
    """Say whether a task was given out before this moment and nobody has said yet that it has begun."""
    return task.state is TaskState.ASSIGNED and task.lease is not None and task.lease.since < since
