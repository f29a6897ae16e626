"""Routes of `/agents`: enrolment, registration, discovery and orders. Their sessions are in `agent_polling.py`."""

from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from mcp_control.agents.model import AgentKind, AgentSpec, AgentState, AgentView
from mcp_control.agents.service import AgentEdit, AgentFilter
from mcp_control.api.call import Call, Reply, invalid, reply, tagged
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import VersionConflict
from mcp_control.kernel.paging import Page


class EnrolmentRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A short-lived permission for agents to register: its seconds, how many agents, and the one name it is for (empty: any)."""

    ttl_seconds: int = 600
    uses: int = 1
    name: str = ""


class EnrolmentToken(msgspec.Struct, frozen=True, kw_only=True):
    """The permission; shown this once."""

    token: str
    expires_at: datetime


class Registration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A registered agent, and its own credential where one was made for it just now."""

    agent: AgentView
    resumed: bool
    credential: str | None = None


class Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, for people."""

    note: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class AgentsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold."""

    capability: str | None = None
    type: AgentKind | None = None
    state: AgentState | None = None
    label: list[str] = msgspec.field(default_factory=list)
    free: bool = False
    sort: Literal["name", "created", "last_beat"] = "created"


_ENROLMENT: Final = Body(EnrolmentRequest, optional=True, unique_keys=True)
_REGISTER: Final = Body(AgentSpec, envelope=4)
_EDIT: Final = Body(AgentEdit)
_NOTE: Final = Body(Note, optional=True)
_LIST: Final = Query(AgentsQuery)


def labels_of(given: list[str]) -> dict[str, str]:
    """Return labels from repeated `name:value` parameters. Raises Invalid."""
    found: dict[str, str] = {}
    for label in given:
        name, colon, value = label.partition(":")
        if not colon or not name:
            raise invalid("#/label", "wrong-type", "a label filter is name:value")
        found[name] = value
    return found


async def enrolment_token(call: Call) -> Reply:
    """Make a one-time token with which agents register."""
    wanted = await call.decode(_ENROLMENT)
    record, token = await call.services.credentials.create_enrolment(
        call.actor, ttl_seconds=wanted.ttl_seconds, uses=wanted.uses, name=wanted.name
    )
    return reply(EnrolmentToken(token=token, expires_at=to_datetime(record.expires_at)), 201)


async def register(call: Call) -> Reply:
    """Register an agent, or resume the identity of its name; an enrolling agent gets its own credential."""
    services = call.services
    spec = await call.decode(_REGISTER)
    token = enrolment_of(call.headers.get(b"authorization"))
    actor = call.actor if token is None else await services.credentials.redeem(token, spec.name)
    try:
        registered = await services.agents.register(actor, spec)
    except BaseException:
        if token is not None:
            await services.credentials.give_back(actor)
        raise
    agent = registered.agent
    credential = None
    # A user who registers an agent for the first time gets what it needs to connect; a resumed one has its credential.
    if token is not None or (actor.kind != "agent" and not registered.resumed):
        credential = await services.credentials.issue(actor, agent.id, spec.name)
    return reply(
        Registration(agent=services.agents.view(agent), resumed=registered.resumed, credential=credential), 201
    )


def enrolment_of(authorization: bytes | None) -> str | None:
    """Return the enrolment token in an Authorization header, None where there is another credential or none."""
    scheme, _, token = (authorization or b"").decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip().startswith("mcpe_") else None


async def list_agents(call: Call) -> Reply:
    """List agents."""
    query = call.query(_LIST)
    wanted = AgentFilter(
        capability=query.capability, kind=query.type, state=query.state, labels=labels_of(query.label), free=query.free
    )
    return reply(
        await call.services.agents.list(call.actor, wanted, cursor=query.cursor, limit=query.limit, sort=query.sort)
    )


async def get_agent(call: Call) -> Reply:
    """Return one agent, by id or name."""
    agents = call.services.agents
    view = agents.view(await agents.get(call.actor, call.params["agent"]))
    return tagged(view, view.etag)


async def edit_agent(call: Call) -> Reply:
    """Change description, owner, labels or slots."""
    version = call.if_match()
    edit = await call.decode(_EDIT)
    if not version.isdigit():
        raise VersionConflict("If-Match does not name the current version")
    agents = call.services.agents
    agent = await agents.get(call.actor, call.params["agent"])
    view = agents.view(await agents.edit(call.actor, agent.id, edit, int(version)))
    return tagged(view, view.etag)


async def drain_agent(call: Call) -> Reply:
    """Let an agent finish what it has and give it nothing new."""
    note = (await call.decode(_NOTE)).note
    return await _ordered(call, "drain", note)


async def quarantine_agent(call: Call) -> Reply:
    """Keep an agent from work until it is resumed."""
    note = (await call.decode(_NOTE)).note
    return await _ordered(call, "quarantine", note)


async def retire_agent(call: Call) -> Reply:
    """End an agent's identity for good."""
    note = (await call.decode(_NOTE)).note
    return await _ordered(call, "retire", note)


async def resume_agent(call: Call) -> Reply:
    """Undo drain and quarantine."""
    await call.decode(_NOTE)
    return await _ordered(call, "resume", "")


async def _ordered(call: Call, verb: Literal["drain", "quarantine", "retire", "resume"], note: str) -> Reply:
    agents = call.services.agents
    agent = await agents.get(call.actor, call.params["agent"])
    match verb:
        case "drain":
            agent = await agents.drain(call.actor, agent.id, note)
        case "quarantine":
            agent = await agents.quarantine(call.actor, agent.id, note)
        case "resume":
            agent = await agents.resume(call.actor, agent.id)
        case "retire":
            agent = await agents.retire(call.actor, agent.id, note)
            await call.services.credentials.revoke_agent(call.actor, agent.id)
    view = agents.view(agent)
    return tagged(view, view.etag)


_SPEC_EXAMPLE: Final = {
    "name": "worker-1",
    "capabilities": [{"name": "echo", "version": "1", "limit": 2}],
    "slots": 4,
    "labels": {"zone": "a"},
}

ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/agents/enrolment-tokens", handler=enrolment_token, summary="Create an enrolment token", tag="agents",
        body=_ENROLMENT, returns=EnrolmentToken, status=201, example={"ttl_seconds": 300, "uses": 3},
    ),
    Endpoint(
        method="POST", path="/agents/register", handler=register, summary="Register an agent", tag="agents", access="enrol",
        weight="keep", body=_REGISTER, returns=Registration, status=201, example=_SPEC_EXAMPLE,
    ),
    Endpoint(method="GET", path="/agents", handler=list_agents, summary="List agents", tag="agents", query=_LIST, returns=Page[AgentView]),
    Endpoint(method="GET", path="/agents/{agent:name}", handler=get_agent, summary="Get an agent", tag="agents", returns=AgentView),
    Endpoint(
        method="PATCH", path="/agents/{agent:name}", handler=edit_agent, summary="Edit an agent", tag="agents",
        body=_EDIT, returns=AgentView,
        example={"description": "GPU box in rack 4"},
    ),
    Endpoint(
        method="POST", path="/agents/{agent:name}/drain", handler=drain_agent, summary="Drain an agent", tag="agents", body=_NOTE,
        returns=AgentView, example={"note": "kernel update"},
    ),
    Endpoint(
        method="POST", path="/agents/{agent:name}/quarantine", handler=quarantine_agent, summary="Quarantine an agent", tag="agents",
        body=_NOTE, returns=AgentView, example={"note": "fails too often"},
    ),
    Endpoint(
        method="POST", path="/agents/{agent:name}/resume", handler=resume_agent, summary="Resume an agent", tag="agents", body=_NOTE,
        returns=AgentView,
    ),
    Endpoint(
        method="POST", path="/agents/{agent:name}/retire", handler=retire_agent, summary="Retire an agent", tag="agents", body=_NOTE,
        returns=AgentView, example={"note": "machine returned"},
    ),
)  # fmt: skip
