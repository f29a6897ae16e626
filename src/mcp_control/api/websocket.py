"""`/ws`: programs and pages follow events over a WebSocket, with filters and resume.

A bare ASGI handler: the classes of frameworks halve the rate. The credential comes in the header before the upgrade; a browser can only
send it from an allowed origin, since it sends cookies to anybody and this server reads none.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Final

import msgspec
import structlog

from mcp_control.api.call import Receive, Scope, Send
from mcp_control.api.outbox import Outbox, close_extension, write_extension
from mcp_control.api.problem import code_of
from mcp_control.api.protocol import wire_text
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
from mcp_control.events.backlog import Batch
from mcp_control.events.broadcaster import Subscription
from mcp_control.events.model import Event, event_id, event_seq, to_event
from mcp_control.events.rounds import Rounds
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.errors import Forbidden, InvalidToken, Problem
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.tasks.wire import encode_frame

_log = structlog.get_logger(__name__)
SUBSCRIPTIONS_MAX: Final = 100
_GROUP: Final = 200
_IDS: Final = 16  # ids of subscriptions for which the frames of a round are kept
SubscriptionId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Subscribe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op", tag="subscribe"):
    """Follow events; `after` resumes behind an event that was seen."""

    id: SubscriptionId
    types: list[str] = []
    subject: str | None = None
    run: str | None = None
    after: str | None = None


class Unsubscribe(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op", tag="unsubscribe"
):
    """Stop following."""

    id: SubscriptionId


class Ping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="ping"):
    """Are you there?"""


class Renewal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op", tag="renew"):
    """A fresh credential of the same caller."""

    credential: str


class OneEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="event"):
    """An event."""

    sub: str
    event: Event


class SomeEvents(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="events"):
    """Events that gathered."""

    sub: str
    events: list[Event]


class Subscribed(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="subscribed"):
    """The subscription is open; events after `after` follow."""

    id: str
    after: str


class Reread(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="reread"):
    """Events were left out because this socket was too slow: read the current state."""

    sub: str
    reason: str = "slow"


class Pong(msgspec.Struct, frozen=True, tag_field="op", tag="pong"):
    """Yes."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="problem"):
    """A frame was not understood or not allowed."""

    code: str
    detail: str
    sub: str | None = None


ClientFrame = Subscribe | Unsubscribe | Ping | Renewal
_decode: Final = msgspec.json.Decoder(ClientFrame).decode


class EventSocket:
    """Serves `/ws`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._texts = EventTexts()
        self._rounds = Rounds(services.broadcaster)

    async def __call__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Serve one socket until it ends."""
        services = self._services
        check_origin(scope, services.settings.security.allowed_origins)
        _, actor = await authenticated(scope, services)
        allow(actor, "events.list")
        await receive()
        await send({"type": "websocket.accept", "headers": [(b"x-request-id", request_id.encode())]})
        outbox = Outbox(send, close_extension(scope), stall=services.body_stall_seconds)
        with services.sockets.one(outbox):
            send_events = _Way(self._rounds, self._texts, outbox, write_extension(scope))
            await _Connection(services, actor, receive, send_events).run()


class _Way(msgspec.Struct, frozen=True):
    """How events get to one socket: with everybody else's in rounds, or behind what waits in its outbox."""

    rounds: Rounds
    texts: "EventTexts"
    outbox: Outbox
    write: Callable[[bytes], bool]


class _Connection:
    def __init__(self, services: Services, actor: Actor, receive: Receive, way: _Way) -> None:
        self._services = services
        self._actor = actor
        self._receive = receive
        self._way = way
        self._outbox = way.outbox
        self._problems = 0
        self._following: dict[str, _Follower] = {}
        self._expiry: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        self._outbox.start()
        self._watch_expiry()
        code, reason = 0, ""
        try:
            while True:
                await self._frame(await text_of(self._receive))
        except Gone as gone:
            code, reason = gone.code, gone.reason
        except Exception:
            _log.exception("event socket failed", actor=self._actor.id)
            code, reason = 1011, "internal error"
        finally:
            if self._expiry is not None:
                self._expiry.cancel()
            for follower in self._following.values():
                follower.stop()
            if code:
                await self._outbox.finish(code, reason)
            await self._outbox.stop()

    def _watch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if self._actor.expires_at is not None:
            left = max(0.0, (self._actor.expires_at - self._services.clock.now()) / 1000)
            self._expiry = asyncio.get_running_loop().call_later(left, self._outbox.close, 4401, "credential expired")

    async def _frame(self, text: str) -> None:
        sub: str | None = None
        try:
            checked_json(text.encode())
            frame = _decode(text)
            match frame:
                case Subscribe():
                    sub = frame.id
                    await self._subscribe(frame)
                case Unsubscribe():
                    self._unsubscribe(frame.id)
                case Ping():
                    self._outbox.put((Pong(),))
                case Renewal():
                    await self._renew(frame.credential)
        except msgspec.ValidationError as error:
            self._trouble(*frame_problem(error), sub)
        except Problem as problem:
            if isinstance(problem, InvalidToken):
                raise Gone(4401, "credential expired") from None
            self._trouble(code_of(problem), problem.detail, sub)

    def _trouble(self, code: str, detail: str, sub: str | None) -> None:
        self._outbox.put((Trouble(code=code, detail=detail, sub=sub),))
        self._problems += 1
        if self._problems >= PROBLEMS_MAX:
            raise Gone(1008, "too many problems")

    async def _subscribe(self, frame: Subscribe) -> None:
        if len(self._following) >= SUBSCRIPTIONS_MAX and frame.id not in self._following:
            return self._trouble("limit-exceeded", f"at most {SUBSCRIPTIONS_MAX} subscriptions", frame.id)
        self._unsubscribe(frame.id)
        after = None if frame.after is None else event_seq(frame.after)
        subscription = await self._services.broadcaster.subscribe(
            frame.types, frame.subject, frame.run, self._actor.tenant, after
        )
        self._outbox.put((Subscribed(id=frame.id, after=event_id(subscription.after)),))
        follower = self._following[frame.id] = _Follower(frame.id, subscription, self._way, self._ended)
        follower.behind()
        return None

    def _unsubscribe(self, id: str) -> None:
        found = self._following.pop(id, None)
        if found is not None:
            found.stop()

    def _ended(self, id: str) -> None:
        del self._following[id]

    async def _renew(self, credential: str) -> None:
        services = self._services
        actor = await services.authenticator.authenticate(f"Bearer {credential}", services.clock.now())
        if actor.id != self._actor.id:
            raise Forbidden("the credential is that of somebody else")
        self._actor = actor
        self._watch_expiry()


class _Follower:
    """One subscription of a socket, served in rounds while it keeps up and by a task of its own while it does not."""

    __slots__ = ("_ended", "_id", "_subscription", "_task", "_way")

    def __init__(self, id: str, subscription: Subscription, way: _Way, ended: Callable[[str], None]) -> None:
        self._ended = ended
        self._id = id
        self._subscription = subscription
        self._way = way
        self._task: asyncio.Task[None] | None = None

    def take(self, batch: Batch) -> bool:
        """Write a batch straight to the network where nothing is before it."""
        way = self._way
        return way.outbox.idle and way.write(way.texts.wire(self._id, batch))

    def behind(self) -> None:
        """Catch up, and join the rounds then."""
        self._task = asyncio.create_task(self._catch_up())

    def stop(self) -> None:
        """Send no more."""
        self._subscription.close()
        if self._task is not None:
            self._task.cancel()

    async def _catch_up(self) -> None:
        way, subscription = self._way, self._subscription
        try:
            while True:
                # The backlog of the subscription is the bound and knows what may be left out; the socket only takes what it can send.
                await way.outbox.drained()
                if way.rounds.join(subscription, self):
                    return
                way.outbox.put(way.texts.frames(self._id, await anext(subscription)))
        except StopAsyncIteration:
            return
        except Problem as problem:
            way.outbox.put((Trouble(code=code_of(problem), detail=problem.detail, sub=self._id),))
            subscription.close()
            self._ended(self._id)
        except Exception:
            _log.exception("following events failed")
            way.outbox.close(1011, "internal error")


class EventTexts:
    """Events as they are sent, encoded once for all who follow them."""

    def __init__(self, capacity: int = 5000) -> None:
        self._capacity = capacity
        self._texts: dict[int, bytes] = {}
        self._batch: Batch | None = None
        self._wires: dict[str, bytes] = {}

    def of(self, stored: StoredFact) -> bytes:
        """Return an event as JSON."""
        text = self._texts.get(stored.seq)
        if text is None:
            text = self._texts[stored.seq] = encode_frame(to_event(stored))
            if len(self._texts) > self._capacity:
                del self._texts[next(iter(self._texts))]
        return text

    def wire(self, id: str, batch: Batch) -> bytes:
        """Return the frames of a batch as they go over the network; kept until another batch is asked for."""
        if batch is not self._batch:
            self._batch, self._wires = batch, {}
        wire = self._wires.get(id)
        if wire is None:
            wire = b"".join(wire_text(frame) for frame in self.frames(id, batch))
            if len(self._wires) < _IDS:
                self._wires[id] = wire
        return wire

    def frames(self, id: str, batch: Batch) -> list[bytes]:
        """Return the frames (see `OneEvent`, `SomeEvents`) that bring a batch to the subscription of this id."""
        frames = [encode_frame(Reread(sub=id))] if batch.reread else []
        texts = [self.of(stored) for stored in batch.facts]
        sub = encode_frame(id)
        if len(texts) == 1:
            frames.append(b'{"op":"event","sub":%b,"event":%b}' % (sub, texts[0]))
        else:
            groups = (b",".join(texts[at : at + _GROUP]) for at in range(0, len(texts), _GROUP))
            frames.extend(b'{"op":"events","sub":%b,"events":[%b]}' % (sub, group) for group in groups)
        return frames
