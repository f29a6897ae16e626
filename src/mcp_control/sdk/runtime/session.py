"""The session of an agent instance: connect, keep the lease, take work, tell results, and leave in good order.

The heartbeat shares its event loop with the work loop, so a loop that stands still loses its lease, as it must. The lease is counted on a
clock that runs during suspend, from the moment the heartbeat was *sent*, and ends here at three quarters of its time (reliability,
section 2, "Agent SDK"): work is stopped before the server can have given it to somebody else.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import structlog
from msgspec.structs import replace

from mcp_control.agents.model import AgentSpec, Beat
from mcp_control.kernel.breaker_rules import BreakerStatus
from mcp_control.sdk.runtime.figures import Figures, boottime
from mcp_control.sdk.runtime.links import SUPERSEDED, Link, LinkLost, LinkRefused
from mcp_control.sdk.runtime.outbox import Outbox
from mcp_control.sdk.runtime.workbench import Workbench
from mcp_control.tasks.wire import Ack, BeatAck, Bye, Cancel, Done, Heartbeat, Hello, Order, Tasks, Trouble, Welcome

LEASE_SHARE: Final = 0.75
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 10.0
LEAVE_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 5.0  # a connection that lived as long was a good one
BUDGET_EXHAUSTED: Final = "budget-exhausted"
BUDGET_GRACE: Final = 1.0  # seconds; what is spent meanwhile counts for nobody any more
TRY_LATER: Final = 1013  # close code: overloaded, or this end is too slow
PASSING: Final = frozenset(
    {"agent-suspended", "overloaded", "store-unavailable", "storage-full", "outcome-unknown", "conflict", "internal"}
)

log = structlog.get_logger("mcp_control.agent")
Opener = Callable[[Hello], Awaitable[Link]]


def reconnect_delay(
    failures: int,
    chance: float,
    *,
    close_code: int = 0,
    retry_after: float | None = None,
    max_delay: float = LONGEST_DELAY,
) -> float:
    """Return the seconds to wait before the next connection: exponential with full jitter, at least what the server asked for. Pure.

    Args:
        failures: connections in a row that were refused, or lost before they were of use.
        chance: random, 0 to 1.
        close_code: WebSocket close code; after 1013 (overloaded) the first wait is ten times as long.
        retry_after: seconds of a Retry-After header.
        max_delay: bound of the exponential part.
    """
    first = FIRST_DELAY * 10 if close_code == TRY_LATER else FIRST_DELAY
    longest: float = min(max_delay, first * 2.0 ** min(failures, 20))
    if retry_after is not None:
        return min(retry_after, 300.0) + chance * max(longest, retry_after / 2)
    return chance * longest


class Session:
    """One instance of an agent, over all its connections.

    Attributes:
        instance_id: what the server calls this instance; None before the first welcome.
        connected: set while a connection is open.
    """

    def __init__(self, spec: AgentSpec, outbox: Outbox, software: str) -> None:
        self._spec = spec
        self._outbox = outbox
        self._software = software
        self._figures = Figures()
        self._wake = asyncio.Event()
        self._link: Link | None = None
        self._deadline: float | None = None
        self._lease_ms = round(spec.lease_seconds * 1000)
        self._beat_ms = self._lease_ms // 3
        self._beat_sent_at: float | None = None
        self._draining = False
        self._left = asyncio.Event()
        self._ack_seen = asyncio.Event()
        self._bench: Workbench | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._failures = 0
        self._breakers: list[BreakerStatus] = []  # as the server knows them
        self._told_breakers: list[BreakerStatus] = []  # as the heartbeat under way tells them
        self.instance_id: str | None = None
        self.agent_id: str | None = None
        self.connected = asyncio.Event()

    def attach(self, bench: Workbench) -> None:
        """Say who does the work."""
        self._bench = bench

    @property
    def bench(self) -> Workbench:
        """Who does the work."""
        assert self._bench is not None, "attach() comes first"
        return self._bench

    @property
    def free_slots(self) -> int:
        """Slots in which work could be done now."""
        return 0 if self._draining else max(0, self._spec.slots - self.bench.taken - self.bench.abandoned)

    def wake(self) -> None:
        """There may be something to tell."""
        self._wake.set()

    async def run(self, connect: Opener) -> None:
        """Stay connected until the agent has left.

        Raises:
            LinkRefused: the server does not want this agent, and trying again would not change that.
        """
        watch = asyncio.create_task(self._watch_lease())
        try:
            while not self._left.is_set():
                close_code, wait = 0, None
                opened_at = boottime()
                try:
                    hello = Hello(
                        agent=self._spec,
                        instance_id=self.instance_id,
                        software=self._software,
                        beat=self._beat(self._outbox.untold),
                    )
                    self._link = await connect(hello)
                    self._welcomed(self._link.welcome, opened_at)
                    await self._converse(self._link)
                except LinkLost as lost:
                    close_code = lost.code
                    if not self._left.is_set():
                        log.warning("connection.lost", reason=str(lost), code=lost.code, held=len(self.bench.works))
                    if lost.code == SUPERSEDED:
                        self._instance_over()
                except LinkRefused as refused:
                    if refused.code not in PASSING and (refused.status in (0, 401, 403) or 404 < refused.status < 429):
                        raise
                    wait = refused.retry_after
                    log.warning("connection.refused", status=refused.status, reason=str(refused))
                finally:
                    self.connected.clear()
                    link, self._link = self._link, None
                    if link is not None:
                        # A welcome alone proves nothing: the server may close every session it opens.
                        if boottime() - opened_at >= STEADY_SECONDS:
                            self._failures = 0
                        await link.close()
                if self._left.is_set():
                    return
                self._outbox.resend()
                chance = random.random()  # noqa: S311 - jitter is no secret
                # A sixth of the lease: a server that comes back soon finds the work still ours.
                longest = min(LONGEST_DELAY, max(0.5, self._lease_ms / 6000))
                delay = reconnect_delay(
                    self._failures, chance, close_code=close_code, retry_after=wait, max_delay=longest
                )
                self._failures += 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._left.wait(), delay)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def drain(self, grace: float) -> None:
        """Take nothing new, finish what is in hand within `grace` seconds, hand back the rest, tell everything, leave."""
        if self._draining:
            return
        self._draining = True
        log.info("agent.draining", held=len(self.bench.works), grace=grace)
        with suppress(LinkLost):
            if self._link is not None:
                await self._link.send(Bye(step="drain"))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.bench.emptied(), grace)
        await self.leave(LEAVE_SECONDS)

    async def leave(self, patience: float) -> None:
        """Hand back what is in hand, wait until everything told is known to be durable, at most `patience` seconds, and end the session."""
        self._draining = True
        self.bench.stop(list(self.bench.works), "drain", grace=0.0)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.bench.emptied(), patience)
        self.wake()
        ends_at = boottime() + patience
        while not self._outbox.settled and (left := ends_at - boottime()) > 0:
            self._ack_seen.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ack_seen.wait(), left)
        with suppress(LinkLost):
            if self._link is not None:
                await self._link.send(Bye(step="leave"))
        self._left.set()

    # --- one connection ---

    def _welcomed(self, welcome: Welcome, opened_at: float) -> None:
        resumed = welcome.instance_id == self.instance_id
        self.instance_id = welcome.instance_id
        self.agent_id = welcome.agent_id
        self._lease_ms = welcome.lease_ms
        self._beat_ms = min(welcome.beat_ms, max(1, welcome.lease_ms // 3))
        self._deadline = opened_at + LEASE_SHARE * welcome.lease_ms / 1000
        self._beat_sent_at = None
        self._breakers = []
        held = self.bench.works
        gone = [task_id for task_id in held if not resumed or task_id not in welcome.resumed]
        if gone:
            log.warning("leases.lost", tasks=len(gone), resumed=resumed)
            self.bench.stop(gone, "gone")
        self._outbox.resend()
        self.connected.set()
        self.wake()
        log.info("agent.connected", agent=self._spec.name, instance=self.instance_id, resumed=resumed, held=len(held))

    def _instance_over(self) -> None:
        self.instance_id = None
        self.bench.stop(list(self.bench.works), "gone", grace=0.0)

    async def _converse(self, link: Link) -> None:
        if self._draining:
            await link.send(Bye(step="drain"))
        coroutines = (self._listen(link), self._tell(link), self._beats(link), self._left.wait())
        parts: list[asyncio.Task[Any]] = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        if not self._left.is_set():
            for part in done:
                part.result()

    async def _tell(self, link: Link) -> None:
        outbox = self._outbox
        while True:
            await self._wake.wait()
            self._wake.clear()
            while outbox.urgent:
                await link.send(outbox.take())

    async def _listen(self, link: Link) -> None:
        bench, outbox = self.bench, self._outbox
        while True:
            frame = await link.receive()
            if isinstance(frame, Tasks):
                if self._draining:
                    for task in frame.tasks:
                        outbox.done(Done(task_id=task.task_id, lease_token=task.lease_token, outcome="released"))
                    self.wake()
                else:
                    bench.accept(frame.tasks)
            elif isinstance(frame, Ack):
                self._acked(frame)
            elif isinstance(frame, BeatAck):
                self._beat_acked(frame)
            elif isinstance(frame, Cancel):
                if frame.reason == BUDGET_EXHAUSTED:
                    bench.stop(frame.task_ids, "budget", BUDGET_GRACE)
                else:
                    bench.stop(frame.task_ids, "cancel")
            elif isinstance(frame, Order):
                self._ordered(frame)
            elif isinstance(frame, Trouble):
                self._troubled(frame)

    def _acked(self, ack: Ack) -> None:
        self._outbox.acked(ack)
        self._ack_seen.set()
        self._failures = 0
        for refusal in ack.refused:
            log.warning("report.refused", task=refusal.task_id, code=refusal.code, detail=refusal.detail)
        if ack.refused:
            self.bench.stop(
                [r.task_id for r in ack.refused if r.code in ("lease-superseded", "already-terminal", "not-found")],
                "gone",
            )
            spent = [refusal.task_id for refusal in ack.refused if refusal.code == BUDGET_EXHAUSTED]
            self.bench.stop(spent, "budget", BUDGET_GRACE)
        if ack.retry:
            asyncio.get_running_loop().call_later(0.2, self.wake)
        elif self._outbox.urgent:
            self.wake()

    def _beat_acked(self, ack: BeatAck) -> None:
        if self._beat_sent_at is not None:
            self._lease_ms = ack.lease_ms
            self._deadline = self._beat_sent_at + LEASE_SHARE * ack.lease_ms / 1000
            self._beat_sent_at = None
            self._breakers = self._told_breakers
        if ack.gone:
            self.bench.stop(ack.gone, "gone")
        if ack.cancel:
            self.bench.stop(ack.cancel, "cancel")

    def _troubled(self, trouble: Trouble) -> None:
        if trouble.code not in PASSING:
            log.error("frame.refused", code=trouble.code, detail=trouble.detail)
            self._outbox.not_understood(trouble.code, trouble.detail)
            self.wake()
        elif self._beat_sent_at is not None:
            # Reports have an answer of their own when the server is in trouble, so this one is that of the heartbeat: the next may pass.
            log.warning("heartbeat.failed", code=trouble.code, detail=trouble.detail)
            self._beat_sent_at = None
        else:
            raise LinkLost(f"the server is in trouble ({trouble.code})")

    def _ordered(self, order: Order) -> None:
        log.info("agent.ordered", order=order.order, note=order.note)
        if order.order == "retire":
            self._retiring = asyncio.create_task(self.drain(float("inf")))

    def _beat(self, ended: Sequence[str] = ()) -> Beat:
        figures, bench = self._figures, self.bench
        bench.tick += 1
        return Beat(
            tick=bench.tick,
            cpu_percent=figures.cpu_percent(),
            memory_mb=figures.memory_mb(),
            load=figures.load(),
            free_slots=self.free_slots,
            running=[*bench.works, *ended],
            draining=self._draining,
        )

    async def _beats(self, link: Link) -> None:
        while True:
            await asyncio.sleep(self._beat_ms / 1000)
            if self._beat_sent_at is not None:
                raise LinkLost("the last heartbeat was not answered")
            sent_at = boottime()
            self._beat_sent_at = sent_at
            beat = self._beat()
            self._told_breakers = self.bench.guards.statuses()
            if self._told_breakers != self._breakers:
                beat = replace(beat, breakers=self._told_breakers)
            await link.send(Heartbeat(beat=beat))

    async def _watch_lease(self) -> None:
        while True:
            now = boottime()
            if self._deadline is None or not self.bench.works:
                await asyncio.sleep(min(1.0, LEASE_SHARE * self._lease_ms / 4000))
                continue
            if now < self._deadline:
                await asyncio.sleep(max(0.01, min(1.0, self._deadline - now)))
                continue
            log.error("lease.not_renewed", stopped=len(self.bench.works))
            self.bench.stop(list(self.bench.works), "lease", grace=0.0)
            self._deadline = None
