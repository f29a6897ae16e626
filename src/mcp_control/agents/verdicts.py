"""What follows from verdicts on agents, written where every server sees it: marks, quarantine, the probe, the return."""

from collections.abc import Callable

from msgspec.structs import replace

from mcp_control.agents.health import Judgement, Rules, probed, restored, tripped
from mcp_control.agents.model import SYSTEM_ORDER, Agent, Drain, Health
from mcp_control.agents.registry import TRIES, Registry, agent_fact
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict

Step = Callable[[Agent, int], tuple[Agent, str] | None]


class Verdicts:
    """Writes the health of agents. Two servers that do the same at once leave what one would have left."""

    def __init__(self, clock: Clock, registry: Registry, rules: Rules) -> None:
        self._clock = clock
        self._registry = registry
        self._rules = rules

    def agent(self, agent_id: str) -> Agent | None:
        """Return an agent that is not retired."""
        return self._registry.by_id(agent_id)

    async def mark(self, agent_id: str, judgement: Judgement) -> None:
        """Show a verdict that keeps the agent at work, or that it is well."""

        def step(agent: Agent, now: int) -> tuple[Agent, str] | None:
            health = agent.health
            if health.until is not None or health.probing or health.verdict == judgement.verdict:
                return None
            after = Health(verdict=judgement.verdict, since=now, reason=judgement.reason, trips=health.trips)
            return replace(agent, health=after), "agent.judged"

        await self._write(agent_id, step)

    async def quarantine(self, agent_id: str, judgement: Judgement) -> None:
        """Keep an agent from work for a time, unless it is kept from it already."""

        def step(agent: Agent, now: int) -> tuple[Agent, str] | None:
            if agent.quarantine is not None:
                return None
            health = tripped(agent.health, judgement.verdict, judgement.reason, now, self._rules)
            order = Drain(at=now, by=SYSTEM_ORDER, note=f"{judgement.verdict}: {judgement.reason}")
            return replace(agent, quarantine=order, health=health), "agent.quarantined"

        await self._write(agent_id, step)

    async def succeeded(self, agent_id: str) -> None:
        """Take back an agent whose probe ended well."""

        def step(agent: Agent, now: int) -> tuple[Agent, str] | None:
            if not agent.health.probing:
                return None
            return replace(agent, health=restored(agent.health, now)), "agent.restored"

        await self._write(agent_id, step)

    async def once(self, now: int) -> int:
        """Give those whose time in quarantine is over their probe; returns how many there were. For the server that leads."""
        due = [
            agent.id
            for agent in self._registry.everybody()
            if agent.health.until is not None and agent.health.until <= now and agent.quarantine is not None
        ]

        def step(agent: Agent, now: int) -> tuple[Agent, str] | None:
            order, until = agent.quarantine, agent.health.until
            if order is None or order.by != SYSTEM_ORDER or until is None or until > now:
                return None
            return replace(agent, quarantine=None, health=probed(agent.health)), "agent.probing"

        for agent_id in due:
            await self._write(agent_id, step)
        return len(due)

    async def _write(self, agent_id: str, step: Step) -> None:
        for _ in range(TRIES):
            agent = self._registry.by_id(agent_id)
            if agent is None or agent.retired_at is not None:
                return
            now = self._clock.now()
            if (found := step(agent, now)) is None:
                return
            after = self._registry.settled(found[0], now, await self._registry.elsewhere(agent_id))
            health = after.health
            told = agent_fact(found[1], after, "system", now, verdict=health.verdict, reason=health.reason)
            try:
                await self._registry.save(after, [told])
            except Conflict:
                await self._registry.reload(agent_id)
                continue
            return
