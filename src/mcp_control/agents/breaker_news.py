"""What is recorded when circuit breakers open and close."""

from typing import Final

from mcp_control.agents.model import Agent, Beat, Instance
from mcp_control.events.log import fact
from mcp_control.kernel.breaker_rules import BreakerStatus, news
from mcp_control.kernel.changes import Fact

_EVENTS: Final = {"opened": "breaker.opened", "closed": "breaker.closed"}


def facts(
    owner: str, name: str, before: list[BreakerStatus], after: list[BreakerStatus], tenant: str, now: int
) -> list[Fact]:
    """Return what has happened to the breakers of an owner (its id and name) between two reports."""
    return [
        fact(
            _EVENTS[verb],
            owner,
            "system",
            now,
            {"breaker": status.name, "owner": name, "error": status.error, "failures": status.failures},
            tenant=tenant,
        )
        for verb, status in news(before, after)
    ]


def news_of(agent: Agent, before: Instance, beat: Beat, now: int) -> list[Fact]:
    """Return what a heartbeat tells of breakers that its instance had not told before."""
    if beat.breakers is None:
        return []
    return facts(agent.id, agent.spec.name, before.beat.breakers or [], beat.breakers, agent.tenant, now)
