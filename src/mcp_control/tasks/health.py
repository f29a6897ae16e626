"""Watching what agents get done: every server judges the instances that are connected to it, and acts on the verdicts.

The verdicts themselves are pure (`agents/health.py`); what they lead to is written by `agents/verdicts.py` and, for tasks, here.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import structlog
from msgspec.structs import replace

from mcp_control.agents.health import Expected, Held, Judgement, Observed, Rules, judge
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.agents.verdicts import Verdicts
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Problem, StoreUnavailable
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.ledger import Decide, Intent, Ledger, Move
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.records import task_fact
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.statistics import Times
from mcp_control.tasks.transitions import lose

_log = structlog.get_logger(__name__)
_LEARN_SECONDS: Final = 10.0
_CALM_SECONDS: Final = 10.0
_YOUNG_SECONDS: Final = 1.0
_Lease = tuple[str, int]
"""The token of a task's lease, and when there was the last sign of life, in wall milliseconds."""
History = Callable[[str, Iterable[str]], Awaitable[dict[str, Times]]]


class _Watch:
    """What is remembered of a connection from one look to the next; `since` is when it was first seen, in wall milliseconds."""

    __slots__ = ("asked", "calm_since", "idle_since", "session", "since")

    def __init__(self, session: Session, since: int) -> None:
        self.session = session
        self.since = since
        self.asked = session.asked
        self.idle_since: float | None = None
        self.calm_since: float | None = None


class HealthKeeper:
    """Looks at the instances connected here.

    Args:
        history: how long types of a tenant take.
        fence, quarantine: whether verdicts may take tasks away, and keep agents from work; else they are only shown.
    """

    def __init__(
        self,
        clock: Clock,
        sessions: Sessions,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        verdicts: Verdicts,
        history: History,
        rules: Rules,
        *,
        fence: bool = True,
        quarantine: bool = True,
    ) -> None:
        self._clock = clock
        self._sessions = sessions
        self._ledger = ledger
        self._settler = settler
        self._dispatcher = dispatcher
        self._verdicts = verdicts
        self._history = history
        self._rules = rules
        self._fence = fence
        self._quarantine = quarantine
        self._watches: dict[str, _Watch] = {}
        self._losses: dict[str, deque[float]] = {}
        self._connects: dict[str, deque[float]] = {}
        self._times: dict[str, dict[str, Expected]] = {}
        self._learned_at: dict[tuple[str, str], float] = {}
        self.fenced = 0

    def connected(self, session: Session) -> None:
        """Hear that an instance has connected. One that polls may be passed from server to server with each request."""
        if session.allowance is None:
            _noted(self._connects, session.agent.id, self._clock.monotonic(), self._rules.flapping_connects)

    async def lost(self, agent_id: str) -> None:
        """Hear that a lease of an agent ended because it was silent. An agent on trial has failed with that."""
        losses = _noted(self._losses, agent_id, self._clock.monotonic(), self._rules.flapping_losses)
        agent = self._verdicts.agent(agent_id)
        if agent is not None and self._quarantine and agent.health.probing:
            await self._verdicts.quarantine(agent_id, Judgement("flapping", "lost its lease on trial"))
        elif self._quarantine and (found := self._flaps(agent_id, losses)) is not None:
            await self._verdicts.quarantine(agent_id, found)

    def _flaps(self, agent_id: str, losses: deque[float]) -> Judgement | None:
        """Judge an agent that need not be connected here."""
        seen = Observed(lease_seconds=1.0, losses=_recent(losses, self._clock.monotonic(), self._rules))
        found = judge(seen, {}, self._rules)
        if not found.quarantine:
            return None
        self._losses.pop(agent_id, None)
        return found

    async def ended(self, session: Session, task: Task, outcome: str) -> None:
        """Hear how a task of an agent on trial ended. What fails for its own reasons says nothing of the agent."""
        cause = "" if task.failure is None else task.failure.cause
        if outcome == "completed":
            await self._verdicts.succeeded(session.agent.id)
        elif outcome == "failed" and cause in ("timeout", "infra") and self._quarantine:
            await self._verdicts.quarantine(session.agent.id, Judgement("stuck", f"failed on trial: {cause}"))

    async def once(self, now: int) -> int:
        """Judge every instance connected here; returns how many are not well.

        While the store does not answer nobody can report anything, so nothing of that time counts.
        """
        try:
            return await self._judge(now)
        except StoreUnavailable:
            self._watches.clear()
            raise

    async def _judge(self, now: int) -> int:
        sessions = list(self._sessions.all())
        watches, self._watches = self._watches, {}
        unwell = 0
        for session in sessions:
            watch = watches.get(session.instance.id)
            if watch is None or watch.session is not session:
                watch = _Watch(session, now)
            self._watches[session.instance.id] = watch
            if session.probing and session.try_again():
                self._dispatcher.freed(session)
            seen, leases = await self._observe(session, watch, now)
            await self._learn(session.agent.tenant, seen.held)
            found = judge(seen, self._times.get(session.agent.tenant, {}), self._rules)
            unwell += found.verdict != "ok"
            await self._act(session, watch, found, leases, now)
        return unwell

    async def _observe(self, session: Session, watch: _Watch, now: int) -> tuple[Observed, dict[str, _Lease]]:
        held: list[Held] = []
        leases: dict[str, _Lease] = {}
        running = set(session.instance.beat.running)
        for task in await self._ledger.load(list(session.held)):
            lease = None if task is None else task.lease
            if task is None or lease is None or lease.instance_id != session.instance.id:
                continue
            begun = task.state is TaskState.RUNNING or task.id in running
            sign = _sign_of_life(task)
            # Before it was connected here it could not say anything: a server that was away must not cost anybody their work.
            quiet = (now - max(sign, watch.since)) / 1000
            ran = (now - (task.started_at or lease.since)) / 1000 if begun else quiet
            held.append(Held(task.id, task.type, begun, ran, quiet))
            leases[task.id] = (lease.token, sign)
        instance, monotonic = session.instance, self._clock.monotonic()
        still = (instance.beat_at - instance.tick_at) / 1000 if instance.tick_at else 0.0
        seen = Observed(
            lease_seconds=instance.lease_ms / 1000,
            held=held,
            loop_still=max(0.0, still),
            idle_while_waiting=self._idle(session, watch, monotonic),
            losses=_recent(self._losses.get(session.agent.id, deque()), monotonic, self._rules),
            connects=_recent(self._connects.get(session.agent.id, deque()), monotonic, self._rules),
        )
        return seen, leases

    def _idle(self, session: Session, watch: _Watch, now: float) -> float:
        """Return for how long an instance that polls has asked for nothing although something it could do waits."""
        waits = (
            session.allowance == 0
            and session.asked == watch.asked
            and session.accepting
            and session.taken < session.slots
            and any(lane.waiting and session in lane.sessions for lane in self._dispatcher.lanes())
        )
        watch.asked = session.asked
        if not waits:
            watch.idle_since = None
            return 0.0
        if watch.idle_since is None:
            watch.idle_since = now
        return now - watch.idle_since

    async def _learn(self, tenant: str, held: Iterable[Held]) -> None:
        """Read how long the types take of which something has run for a while, now and then."""
        now = self._clock.monotonic()
        types = {
            each.type
            for each in held
            if each.ran > _YOUNG_SECONDS and now - self._learned_at.get((tenant, each.type), -1e9) > _LEARN_SECONDS
        }
        if types:
            found: Mapping[str, Times] = await self._history(tenant, types)
            known = self._times.setdefault(tenant, {})
            for name in types:
                self._learned_at[(tenant, name)] = now
                if (times := found.get(name)) is not None:
                    known[name] = Expected(times.count, times.p99)

    async def _act(
        self, session: Session, watch: _Watch, found: Judgement, leases: Mapping[str, _Lease], now: int
    ) -> None:
        agent = session.agent
        if found.quarantine and self._quarantine:
            # First: what is taken from it must not be handed back to it.
            if found.verdict == "flapping":
                self._losses.pop(agent.id, None)
                self._connects.pop(agent.id, None)
            await self._verdicts.quarantine(agent.id, found)
        elif found.verdict != "ok":
            watch.calm_since = None
            await self._verdicts.mark(agent.id, found)
        elif agent.health.verdict != "ok":
            monotonic = self._clock.monotonic()
            watch.calm_since = watch.calm_since or monotonic
            if monotonic - watch.calm_since >= _CALM_SECONDS:
                await self._verdicts.mark(agent.id, found)
        if found.fence and self._fence:
            intents = [Intent(task_id, _fencing(leases[task_id], found.reason, now)) for task_id in found.fence]
            results = await self._settler.settle(intents)
            fenced = [result.id for result in results if not isinstance(result, Problem) and result.lease is None]
            if not fenced:
                return
            self.fenced += len(fenced)
            _log.warning("tasks.fenced", agent=agent.id, verdict=found.verdict, tasks=fenced[:20])


def _sign_of_life(task: Task) -> int:
    return max(task.moved_at or 0, task.started_at or 0, 0 if task.lease is None else task.lease.since)


def _fencing(seen: _Lease, reason: str, now: int) -> Decide:
    """Take a task from an agent that lives but does not move it on, unless it has moved since or may be started only once."""
    token, sign = seen

    def decide(task: Task) -> Move | None:
        if task.lease is None or not task.lease.opens(token) or task.retry.max_attempts == 1:
            return None
        if _sign_of_life(task) != sign:
            return None
        after = lose(task, now)
        if not after.final:
            after = replace(after, reason="fenced", message=f"taken from its agent, which {reason}")
        kind = "task.lost" if not after.final else f"task.{after.state.value}"
        return Move(after, [task_fact(kind, after, "system", now, agent_id=task.lease.agent_id)])

    return decide


def _noted(log: dict[str, deque[float]], agent_id: str, now: float, most: int) -> deque[float]:
    times = log.setdefault(agent_id, deque(maxlen=most))
    times.append(now)
    return times


def _recent(times: deque[float], now: float, rules: Rules) -> int:
    while times and now - times[0] > rules.window_seconds:
        times.popleft()
    return len(times)
