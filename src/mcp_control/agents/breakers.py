"""Circuit breakers as people see them: those of the servers and those around what the handlers of agents call."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

from mcp_control.agents.breaker_news import facts
from mcp_control.agents.model import BreakerView
from mcp_control.agents.service import AgentManager
from mcp_control.coordination.nodes import Nodes
from mcp_control.kernel.breaker_rules import BreakerStatus, State
from mcp_control.kernel.changes import Change
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.security.model import DEFAULT_TENANT, Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store


class Breakers:
    """Reads all breakers, and tells when those of this server open and close.

    Args:
        name: of this server.
        server: its id among those that share the store; empty for a single one.
        own: how the breakers of this server stand.
        nodes: the servers that share the store; None for a single one.
        manager: knows the agents and their instances.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        server: str,
        own: Callable[[], list[BreakerStatus]],
        nodes: Nodes | None,
        manager: AgentManager,
    ) -> None:
        self._store = store
        self._name = name
        self._server = server or name
        self._own = own
        self._nodes = nodes
        self._manager = manager
        self._told: list[BreakerStatus] = []

    async def list(
        self, actor: Actor, state: State | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[BreakerView]:
        """Return a page of breakers by owner and name. What is told of others is as old as their last sign of life."""
        allow(actor, "breakers.list")
        views = [_view("server", self._name, self._server, status) for status in self._own()]
        for node in [] if self._nodes is None else await self._nodes.all():
            if node.id != self._server:
                views += [_view("server", node.name, node.id, status) for status in node.breakers]
        await self._manager.look()
        for agent in self._manager.registry.registered(actor.tenant):
            for instance in self._manager.running(agent.id):
                views += [
                    _view("agent", agent.spec.name, instance.id, status) for status in instance.beat.breakers or ()
                ]
        if state is not None:
            views = [view for view in views if view.state == state]
        views.sort(key=_place)
        if cursor is not None:
            after = tuple(map(str, decode_cursor("breakers", cursor, 4)))
            views = [view for view in views if _place(view) > after]
        more = len(views) > limit
        return Page(
            items=views[:limit], next_cursor=encode_cursor("breakers", _place(views[limit - 1])) if more else None
        )

    async def once(self, now: int) -> None:
        """Record what has happened to the breakers of this server since the last time. Raises Problem of the store."""
        after = self._own()
        if found := facts(self._server, self._name, self._told, after, DEFAULT_TENANT, now):
            (problem,) = await self._store.commit([Change(facts=found)])
            if problem is not None:
                raise problem
        self._told = after

    def counts(self) -> dict[str, float]:
        """Return how many breakers have which state, of this server and of the agents connected to it."""
        found = Counter(status.state for status in self._own())
        for session in self._manager.sessions.all():
            found.update(status.state for status in session.instance.beat.breakers or ())
        return {state: float(count) for state, count in found.items()}


def _view(kind: Literal["server", "agent"], owner: str, instance: str, status: BreakerStatus) -> BreakerView:
    return BreakerView(
        owner=owner,
        owner_kind=kind,
        instance=instance,
        name=status.name,
        state=status.state,
        since=to_datetime(status.since),
        failures=status.failures,
        opened=status.opened,
        probe_at=None if status.probe_at is None else to_datetime(status.probe_at),
        error=status.error,
        fallback=status.fallback,
    )


def _place(view: BreakerView) -> tuple[str, str, str, str]:
    return view.owner, view.name, view.owner_kind, view.instance
