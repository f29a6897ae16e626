"""`/ws/agent`: an agent's session over a WebSocket. The frames are in `tasks/wire.py`, what they do in `tasks/agent_sessions.py`.

A bare ASGI handler. Reports of one socket are handled one after the other: what an agent gathers meanwhile is its next report.
"""

import asyncio
from typing import Final

import msgspec
import structlog

from mcp_control.agents.sessions import Session
from mcp_control.api.call import Receive, Scope, Send
from mcp_control.api.decode import MAX_DEPTH, check_depth
from mcp_control.api.outbox import Outbox, close_extension
from mcp_control.api.problem import code_of
from mcp_control.api.services import Services
from mcp_control.api.socket_input import (
    PROBLEMS_MAX,
    Gone,
    authenticated,
    check_origin,
    checked_json,
    frame_problem,
    text_of,
)
from mcp_control.kernel.errors import Forbidden, InvalidToken, LeaseSuperseded, Problem
from mcp_control.security.model import Actor
from mcp_control.tasks.wire import AgentFrame, Bye, Heartbeat, Hello, Renew, Report, Trouble, decode_agent_frame

_log = structlog.get_logger(__name__)
HELLO_SECONDS: Final = 15.0
_ENVELOPE: Final = 4


class AgentSocket:
    """Serves `/ws/agent`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._by_instance: dict[str, _Connection] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Serve one agent until its connection ends."""
        check_origin(scope, ())
        header, actor = await authenticated(scope, self._services)
        if actor.kind != "agent":
            raise Forbidden("this socket is for agents, with their own credential")
        await receive()
        await send({"type": "websocket.accept", "headers": [(b"x-request-id", request_id.encode())]})
        client = scope["client"]
        # A batch of assignments may be large, and an agent that takes it is not slow.
        limit = self._services.settings.queues.agent_bytes
        outbox = Outbox(send, close_extension(scope), limit, self._services.body_stall_seconds)
        address = client[0] if client else ""
        with self._services.sockets.one(outbox):
            await _Connection(self._services, self._by_instance, header, actor, address, receive, outbox).run()


class _Connection:
    def __init__(
        self,
        services: Services,
        by_instance: "dict[str, _Connection]",
        header: str,
        actor: Actor,
        address: str,
        receive: Receive,
        outbox: Outbox,
    ) -> None:
        self._services = services
        self._by_instance = by_instance
        self._header = header
        self._actor = actor
        self._address = address
        self._receive = receive
        self._outbox = outbox
        self._session: Session | None = None
        self._problems = 0

    async def run(self) -> None:
        self._outbox.start()
        code, reason = 0, ""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                while self._session is None:
                    await self._frame(await text_of(self._receive))
            while True:
                await self._frame(await text_of(self._receive))
        except Gone as gone:
            code, reason = gone.code, gone.reason
        except TimeoutError:
            code, reason = 1008, "no hello"
        except Exception:
            _log.exception("agent socket failed", agent=self._actor.id)
            code, reason = 1011, "internal error"
        finally:
            await self._end(code, reason)

    async def _end(self, code: int, reason: str) -> None:
        session = self._session
        try:
            if session is not None:
                if self._by_instance.get(session.instance.id) is self:
                    del self._by_instance[session.instance.id]
                await self._services.sessions.disconnected(session)
        except Problem as problem:
            _log.warning("agent state not recorded", agent=self._actor.id, code=problem.code)
        finally:
            if code:
                await self._outbox.finish(code, reason)
            await self._outbox.stop()

    def supersede(self) -> None:
        """Close: the same instance has connected anew."""
        self._outbox.close(4409, "superseded")

    async def _frame(self, text: str) -> None:
        try:
            raw = text.encode()
            checked_json(raw, None)
            frame = decode_agent_frame(raw)
            _check_nesting(frame, raw)
            await self._handle(frame)
        except msgspec.ValidationError as error:
            self._trouble(*frame_problem(error))
        except Problem as problem:
            if isinstance(problem, InvalidToken):
                raise Gone(4401, "credential expired") from None
            if isinstance(problem, LeaseSuperseded):
                raise Gone(4409, "superseded") from None
            self._trouble(code_of(problem), problem.detail)
            if self._session is None and problem.status in (401, 403, 422):
                raise Gone(1008, code_of(problem)) from None

    async def _handle(self, frame: AgentFrame) -> None:
        session = self._session
        sessions = self._services.sessions
        if session is None:
            if not isinstance(frame, Hello):
                return self._trouble("hello-expected", "the first frame of a connection is hello")
            return await self._hello(frame)
        match frame:
            case Report():
                self._outbox.put((await sessions.report(session, frame),))
            case Heartbeat():
                # A credential that was revoked ends here at the latest, however long the connection lives.
                await self._services.authenticator.authenticate(self._header, self._services.clock.now())
                self._outbox.put((await sessions.heartbeat(session, frame.beat),))
            case Bye(step="leave"):
                await sessions.leave(session)
                raise Gone(1000, "left")
            case Bye():
                await sessions.drain(session)
            case Renew():
                await self._renew(frame.credential)
            case Hello():
                self._trouble("unexpected-frame", "hello was said already")
        return None

    async def _hello(self, frame: Hello) -> None:
        session = await self._services.sessions.connect(self._actor, frame, self._outbox.put, address=self._address)
        self._session = session
        instance_id = session.instance.id
        if self._services.agents.sessions.get(instance_id) is not session:
            # A newer connection of the instance came while this one was being opened: the welcome is sent before all is done.
            raise Gone(4409, "superseded")
        if (before := self._by_instance.get(instance_id)) is not None:
            before.supersede()
        self._by_instance[instance_id] = self

    async def _renew(self, credential: str) -> None:
        header = f"Bearer {credential}"
        actor = await self._services.authenticator.authenticate(header, self._services.clock.now())
        if actor.id != self._actor.id:
            raise Forbidden("the credential is that of another agent")
        self._header, self._actor = header, actor

    def _trouble(self, code: str, detail: str) -> None:
        self._outbox.put((Trouble(code=code, detail=detail),))
        self._problems += 1
        if self._problems >= PROBLEMS_MAX:
            raise Gone(1008, "too many problems")


def _check_nesting(frame: AgentFrame, raw: bytes) -> None:
    """Raise TooDeep. In the frame that comes thousands of times a second only results may nest, and they are looked at one by one."""
    if isinstance(frame, Report) and not frame.logs and all(done.failure is None for done in frame.done):
        for done in frame.done:
            check_depth(bytes(done.result))
    else:
        check_depth(raw, MAX_DEPTH + _ENVELOPE)
