"""All routes and sockets, put together into the application."""

import functools

from mcp_control.api import (
    agents,
    approvals,
    artifacts,
    asyncapi,
    auth,
    breakers,
    budgets,
    bundles,
    dead_letters,
    docs,
    events,
    groups,
    limits,
    operations,
    pipelines,
    runs,
    schedules,
    shares,
    system,
    tasks,
)
from mcp_control.api.agent_polling import Pollers
from mcp_control.api.agent_polling import endpoints as polling
from mcp_control.api.agent_socket import AgentSocket
from mcp_control.api.app import ControlApp, Socket
from mcp_control.api.openapi import build
from mcp_control.api.routing import Endpoint, Router
from mcp_control.api.services import Services
from mcp_control.api.websocket import EventSocket


def routes(version: str) -> tuple[Endpoint, ...]:
    """Return every route there is, the documentation of all of them included."""
    nouns = (
        *auth.ENDPOINTS,
        *agents.ENDPOINTS,
        *polling(Pollers()),
        *tasks.ENDPOINTS,
        *budgets.ENDPOINTS,
        *groups.ENDPOINTS,
        *operations.ENDPOINTS,
        *dead_letters.ENDPOINTS,
        *pipelines.ENDPOINTS,
        *runs.ENDPOINTS,
        *approvals.ENDPOINTS,
        *bundles.ENDPOINTS,
        *schedules.ENDPOINTS,
        *limits.ENDPOINTS,
        *shares.ENDPOINTS,
        *breakers.ENDPOINTS,
        *artifacts.ENDPOINTS,
        *events.ENDPOINTS,
        *system.ENDPOINTS,
    )
    document: list[bytes] = []

    def openapi() -> bytes:
        if not document:  # made when first asked for: it takes a while, and most servers are never asked
            document.append(build((*nouns, *shown), version))
        return document[0]

    shown = docs.endpoints(openapi, functools.cache(functools.partial(asyncapi.build, version)))
    return (*nouns, *shown)


def application(services: Services) -> ControlApp:
    """Return the ASGI application over these services."""
    sockets: dict[str, Socket] = {"/ws": EventSocket(services), "/ws/agent": AgentSocket(services)}
    return ControlApp(Router(routes(services.version)), sockets, services)
