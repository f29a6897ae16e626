"""What a server does as a member of a cluster: hear the others, look after them, and step back when it is cut off."""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from mcp_control.api.open_sockets import OpenSockets
from mcp_control.backend import Backend
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.janitors import LeaseKeeper, Reconciler
from mcp_control.tasks.peers import Hint, Peers
from mcp_control.tasks.settling import Settler

_log = structlog.get_logger(__name__)
_TRY_AGAIN_LATER: Final = 1013  # RFC 6455 registry


def led(base: Backend, once: Callable[[int], Awaitable[object]]) -> Callable[[int], Awaitable[object]]:
    """Return what does something only while this server leads."""

    async def guarded(now: int) -> object:
        return await once(now) if base.leading else None

    return guarded


class Member:
    """One `once` for each of the loops that a single server does not need."""

    def __init__(
        self,
        base: Backend,
        peers: Peers,
        dispatcher: Dispatcher,
        sessions: AgentSessions,
        settler: Settler,
        lease_keeper: LeaseKeeper,
        reconciler: Reconciler,
        sockets: OpenSockets,
    ) -> None:
        self._base = base
        self._peers = peers
        self._dispatcher = dispatcher
        self._sessions = sessions
        self._settler = settler
        self._lease_keeper = lease_keeper
        self._reconciler = reconciler
        self._sockets = sockets
        self._elections = base.elections()

    async def heard(self, hint: Hint) -> None:
        """Hear what another server says in passing."""
        if hint.lanes:
            await self._dispatcher.heard(hint.lanes)
        if hint.cancel:
            await self._settler.tell_local(hint.cancel)
        if hint.opened:
            await self._sessions.taken_over(hint.opened)

    async def look(self, _: int) -> None:
        """Look for waiting tasks that nobody told of."""
        await self._dispatcher.look()

    async def silence(self, _: int) -> None:
        """Give nothing new to silent agents, and hold all leases when the database has a new primary."""
        self._lease_keeper.silence()
        if self._base.elections() != self._elections:
            self._elections = self._base.elections()
            self._lease_keeper.hold("primary-changed")

    async def refill(self, _: int) -> None:
        """Fill Redis from the store where it lacks something. For the leader."""
        queue = self._base.resilient
        if queue is not None and await queue.needs_refill():
            waiting = await self._reconciler.refill(queue)
            done = await queue.refilled()
            _log.info("cluster.refilled", tasks=waiting, complete=done)

    async def cut_off(self, _: int) -> None:
        """Send everybody to other servers while this one does not reach the store."""
        if self._base.nodes is not None and self._base.nodes.cut_off:
            closed = self._sockets.close(_TRY_AGAIN_LATER, "this server has lost its store")
            if closed:
                _log.warning("cluster.cut_off", sockets=closed)
