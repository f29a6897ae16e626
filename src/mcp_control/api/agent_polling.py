"""Routes of `/agents/session`: the session of an agent that cannot keep a WebSocket. Same frames, one request each."""

from typing import Annotated, Final

import msgspec

from mcp_control.agents.model import Beat
from mcp_control.agents.sessions import Session
from mcp_control.api.call import NO_CONTENT, Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import Query, WaitSeconds
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.errors import AlreadyTerminal, Forbidden, LeaseSuperseded, NotFound, Problem
from mcp_control.tasks.polling import PollOutbox
from mcp_control.tasks.wire import Ack, Assignment, BeatAck, Hello, Report, Welcome


class ClaimQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long to wait for work and how much to take."""

    wait: WaitSeconds = 20.0
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """Work, and ids of tasks to stop working on."""

    tasks: list[Assignment]
    cancel: list[str]


class BeatBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resource figures and progress of the work loop."""

    beat: Beat


_HELLO: Final = Body(Hello, envelope=4)
_BEAT: Final = Body(BeatBody)
_REPORT: Final = Body(Report, envelope=4)
_CLAIM: Final = Query(ClaimQuery)
_REFUSALS: Final[dict[str, type[Problem]]] = {kind.code: kind for kind in (LeaseSuperseded, AlreadyTerminal, NotFound)}


class Pollers:
    """The sessions without sockets on this server, with what waits for them."""

    def __init__(self) -> None:
        self._by_instance: dict[str, tuple[Session, PollOutbox]] = {}

    def add(self, call: Call, session: Session, outbox: PollOutbox) -> None:
        """Keep a session; those that ended meanwhile are forgotten."""
        live = call.services.agents.sessions
        self._by_instance = {key: kept for key, kept in self._by_instance.items() if live.get(key) is kept[0]}
        self._by_instance[session.instance.id] = (session, outbox)

    async def get(self, call: Call) -> tuple[Session, PollOutbox]:
        """Return the session of the path, taken over from another server where it was opened there.

        Raises:
            LeaseSuperseded: it has ended. Forbidden: it is another agent's.
        """
        instance_id = call.params["instance_id"]
        found = self._by_instance.get(instance_id)
        if found is None or call.services.agents.sessions.get(instance_id) is not found[0]:
            if not call.services.agents.registry.server:
                raise LeaseSuperseded("this session is over; say hello again")
            outbox = PollOutbox()
            client = call.scope["client"]
            session = await call.services.sessions.resume(
                call.actor, instance_id, outbox.send, address=client[0] if client else ""
            )
            self.add(call, session, outbox)
            return session, outbox
        if found[0].agent.id != call.actor.id:
            raise Forbidden("this session is that of another agent")
        return found


def endpoints(pollers: Pollers) -> tuple[Endpoint, ...]:
    """Return the routes over the sessions kept in `pollers`."""

    async def open_session(call: Call) -> Reply:
        """Open or resume the session of an agent without WebSocket."""
        hello = await call.decode(_HELLO)
        if call.actor.kind != "agent":
            raise Forbidden("a session is opened with the agent's own credential")
        outbox = PollOutbox()
        client = call.scope["client"]
        session = await call.services.sessions.connect(
            call.actor, hello, outbox.send, address=client[0] if client else "", allowance=0
        )
        pollers.add(call, session, outbox)
        return reply(outbox.welcome())

    async def claim_tasks(call: Call) -> Reply:
        """Wait for work."""
        query = call.query(_CLAIM)
        await call.read()
        session, outbox = await pollers.get(call)
        tasks, cancel = await call.until_gone(outbox.claim(session, call.services.dispatcher, query.limit, query.wait))
        return reply(Claimed(tasks=tasks, cancel=cancel))

    async def heartbeat(call: Call) -> Reply:
        """Keep the session alive."""
        beat = (await call.decode(_BEAT)).beat
        session, outbox = await pollers.get(call)
        acknowledged = await call.services.sessions.heartbeat(session, beat)
        outbox.heard(session, beat.running)
        return reply(acknowledged)

    async def report(call: Call) -> Reply:
        """Report what happened to tasks; a single refused result is answered as the problem itself."""
        given = await call.decode(_REPORT)
        session, _ = await pollers.get(call)
        ack = await call.services.sessions.report(session, given)
        if len(given.done) == 1 and len(ack.refused) == 1:
            refused = ack.refused[0]
            raise _REFUSALS.get(refused.code, LeaseSuperseded)(refused.detail, task_id=refused.task_id)
        return reply(ack)

    async def close_session(call: Call) -> Reply:
        """End the session in good order; what it still holds is queued again."""
        session, _ = await pollers.get(call)
        await call.services.sessions.leave(session)
        return NO_CONTENT

    one = "/agents/session/{instance_id}"
    hello_example = {"protocol": 1, "agent": {"name": "worker-1", "capabilities": [{"name": "echo"}]}}
    return (
        Endpoint(
            method="POST", path="/agents/session", handler=open_session, summary="Open a session", tag="agents",
            weight="keep", body=_HELLO,
            returns=Welcome, example={"op": "hello", **hello_example},
        ),
        Endpoint(
            method="POST", path=f"{one}/claim", handler=claim_tasks, summary="Wait for work", tag="agents", weight="keep", query=_CLAIM,
            returns=Claimed,
        ),
        Endpoint(
            method="POST", path=f"{one}/heartbeat", handler=heartbeat, summary="Send a heartbeat", tag="agents",
            weight="keep", body=_BEAT,
            returns=BeatAck, example={"beat": {"tick": 1, "free_slots": 4}},
        ),
        Endpoint(
            method="POST", path=f"{one}/report", handler=report, summary="Report on tasks", tag="agents", weight="keep", body=_REPORT,
            returns=Ack, example={"op": "report", "id": 1, "done": [{"task_id": "task_1", "lease_token": "…",
            "outcome": "completed", "result": 42}]},
        ),
        Endpoint(method="DELETE", path=one, handler=close_session, summary="End the session", tag="agents", weight="keep", status=204),
    )  # fmt: skip
