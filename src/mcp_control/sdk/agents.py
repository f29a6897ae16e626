"""Agents as a client sees and orders them."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from mcp_control.agents.model import AgentView
from mcp_control.sdk import calls
from mcp_control.sdk.calls import EnrolmentToken

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client


class Agents:
    """`client.agents`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def get(self, name: str) -> AgentView:
        """Read an agent by id or name."""
        return self._client.do(calls.get_agent(name))

    def iter(self, **filters: Any) -> Iterator[AgentView]:
        """Yield agents; filters are `capability`, `type`, `state`, `label` (mapping), `free`, `sort`."""
        return self._client.pages(lambda cursor: calls.list_agents(cursor=cursor, **filters))

    def drain(self, name: str, note: str | None = None) -> AgentView:
        """Let an agent finish and give it nothing new."""
        return self._client.do(calls.agent_verb(name, "drain", note))

    def resume(self, name: str, note: str | None = None) -> AgentView:
        """Give work to a drained or quarantined agent again."""
        return self._client.do(calls.agent_verb(name, "resume", note))

    def quarantine(self, name: str, note: str | None = None) -> AgentView:
        """Keep an agent from work."""
        return self._client.do(calls.agent_verb(name, "quarantine", note))

    def retire(self, name: str) -> AgentView:
        """End an agent for good."""
        return self._client.do(calls.agent_verb(name, "retire"))

    def enrol(
        self, name: str | None = None, *, uses: int | None = None, ttl_seconds: float | None = None
    ) -> EnrolmentToken:
        """Make a one-time token with which an agent enrols."""
        return self._client.do(calls.enrolment_token(name=name, uses=uses, ttl_seconds=ttl_seconds))


class AsyncAgents:
    """`client.agents` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def get(self, name: str) -> AgentView:
        """Read an agent by id or name."""
        return await self._client.do(calls.get_agent(name))

    def iter(self, **filters: Any) -> AsyncIterator[AgentView]:
        """Yield agents; filters are `capability`, `type`, `state`, `label` (mapping), `free`, `sort`."""
        return self._client.pages(lambda cursor: calls.list_agents(cursor=cursor, **filters))

    async def drain(self, name: str, note: str | None = None) -> AgentView:
        """Let an agent finish and give it nothing new."""
        return await self._client.do(calls.agent_verb(name, "drain", note))

    async def resume(self, name: str, note: str | None = None) -> AgentView:
        """Give work to a drained or quarantined agent again."""
        return await self._client.do(calls.agent_verb(name, "resume", note))

    async def quarantine(self, name: str, note: str | None = None) -> AgentView:
        """Keep an agent from work."""
        return await self._client.do(calls.agent_verb(name, "quarantine", note))

    async def retire(self, name: str) -> AgentView:
        """End an agent for good."""
        return await self._client.do(calls.agent_verb(name, "retire"))

    async def enrol(
        self, name: str | None = None, *, uses: int | None = None, ttl_seconds: float | None = None
    ) -> EnrolmentToken:
        """Make a one-time token with which an agent enrols."""
        return await self._client.do(calls.enrolment_token(name=name, uses=uses, ttl_seconds=ttl_seconds))
