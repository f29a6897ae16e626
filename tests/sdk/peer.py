"""A peer that speaks the agent protocol over a real socket: the server's side of `tasks/wire.py`, with faults on demand."""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import uvicorn

from mcp_control.tasks.wire import (
    Ack,
    AgentFrame,
    Assignment,
    BeatAck,
    Bye,
    Done,
    Heartbeat,
    Hello,
    LogLine,
    Refusal,
    Report,
    ServerFrame,
    Tasks,
    Trouble,
    Welcome,
    decode_agent_frame,
    encode_frame,
)

Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds; the one place where tests poll."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions are of any kind, most without an event
            await asyncio.sleep(0.005)


class Peer:
    """Records what agents say; assigns what tests submit."""

    def __init__(self) -> None:
        self.url = ""
        self.lease_ms = 30_000
        self.beat_ms: int | None = None
        self.answer_beats = True
        self.ack_reports = True
        self.refuse_upgrade = 0
        self.refuse: dict[str, str] = {}
        self.not_understood: bytes | None = None
        self.greeting: ServerFrame | None = None
        self.close_after_welcome = 0
        self.cancel_by_beat: list[str] = []
        self.gone_by_beat: list[str] = []
        self.forget_on_reconnect: set[str] = set()
        self.hellos: list[Hello] = []
        self.hello_times: list[float] = []
        self.beats: list[Heartbeat] = []
        self.reports: list[Report] = []
        self.byes: list[str] = []
        self.done: dict[str, Done] = {}
        self.done_count: dict[str, int] = {}
        self.started: list[str] = []
        self.progress: dict[str, list[tuple[float, str]]] = {}
        self.logs: dict[str, list[LogLine]] = {}
        self.held: dict[str, Assignment] = {}
        self.tokens: list[str] = []
        self.registered: list[Any] = []
        self.sessions = 0
        self.polls = 0
        self.outboxes: list[asyncio.Queue[ServerFrame | int]] = []
        self._numbers = itertools.count(1)
        self._claimed: asyncio.Queue[Assignment] = asyncio.Queue()
        self._poll_cancel: list[str] = []
        self.routes: dict[tuple[str, str], Callable[[dict[str, Any], bytes], tuple[int, Any]]] = {}

    # --- what tests do ---

    @property
    def connected(self) -> bool:
        return bool(self.outboxes)

    def assignment(self, type: str, payload: object = None, **more: Any) -> Assignment:
        number = next(self._numbers)
        task_id = more.pop("task_id", f"task_{number}")
        return Assignment(
            task_id=task_id,
            type=type,
            attempt=more.pop("attempt", 1),
            fence=f"1.{number}",
            lease_token=more.pop("lease_token", f"token-{number}"),
            payload=msgspec.Raw(msgspec.json.encode(payload)),
            **more,
        )

    def give(self, *assignments: Assignment) -> None:
        """Assign over the newest socket."""
        for assignment in assignments:
            self.held[assignment.task_id] = assignment
        self.outboxes[-1].put_nowait(Tasks(tasks=list(assignments)))

    def give_poll(self, assignment: Assignment) -> None:
        self.held[assignment.task_id] = assignment
        self._claimed.put_nowait(assignment)

    async def run(self, type: str, payload: object = None, **more: Any) -> Done:
        """Assign one task and wait for its end."""
        assignment = self.assignment(type, payload, **more)
        self.give(assignment)
        await until(lambda: assignment.task_id in self.done)
        return self.done[assignment.task_id]

    def send(self, frame: ServerFrame) -> None:
        self.outboxes[-1].put_nowait(frame)

    def drop(self, code: int = 1012) -> None:
        """Close the newest socket."""
        self.outboxes[-1].put_nowait(code)

    # --- the server's side ---

    def handle(self, frame: AgentFrame) -> list[ServerFrame]:
        if isinstance(frame, Heartbeat):
            self.beats.append(frame)
            if not self.answer_beats:
                return []
            cancel, self.cancel_by_beat = self.cancel_by_beat, []
            gone, self.gone_by_beat = self.gone_by_beat, []
            return [BeatAck(lease_ms=self.lease_ms, cancel=cancel, gone=gone)]
        if isinstance(frame, Report):
            self.reports.append(frame)
            if not self.ack_reports:
                return []
            if self.not_understood and any(self.not_understood in bytes(item.result) for item in frame.done):
                return [Trouble(code="too-deep", detail="JSON is nested too deeply")]
            refused = []
            self.started += [s.task_id for s in frame.started]
            for moved in frame.progress:
                self.progress.setdefault(moved.task_id, []).append((moved.fraction, moved.message))
            for logged in frame.logs:
                self.logs.setdefault(logged.task_id, []).extend(logged.lines)
            for item in frame.done:
                if code := self.refuse.get(item.task_id):
                    refused.append(Refusal(task_id=item.task_id, code=code, detail="refused"))
                    continue
                self.held.pop(item.task_id, None)
                self.done_count[item.task_id] = self.done_count.get(item.task_id, 0) + 1
                self.done.setdefault(item.task_id, item)
            return [Ack(id=frame.id, refused=refused)]
        if isinstance(frame, Bye):
            self.byes.append(frame.step)
        return []

    def welcome(self, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        self.hello_times.append(time.monotonic())
        if hello.instance_id is None:
            self.sessions += 1
        return Welcome(
            protocol=1,
            agent_id="agent_1",
            instance_id=hello.instance_id or f"inst_{self.sessions}",
            lease_ms=self.lease_ms,
            beat_ms=self.beat_ms or self.lease_ms // 3,
            resumed=[t for t in self.held if t not in self.forget_on_reconnect] if hello.instance_id else [],
        )

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _socket(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await receive()
        headers = dict(scope["headers"])
        self.tokens.append(headers.get(b"authorization", b"").decode())
        if self.refuse_upgrade:
            await send({"type": "websocket.http.response.start", "status": self.refuse_upgrade, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b'{"code":"no-sockets-here"}'})
            return
        await send({"type": "websocket.accept"})
        outbox: asyncio.Queue[ServerFrame | int] = asyncio.Queue()

        async def write() -> None:
            while True:
                frame = await outbox.get()
                if isinstance(frame, int):
                    await send({"type": "websocket.close", "code": frame})
                    return
                await send({"type": "websocket.send", "text": encode_frame(frame).decode()})

        writer = asyncio.create_task(write())
        try:
            while True:
                message = await receive()
                if message["type"] == "websocket.disconnect":
                    return
                frame = decode_agent_frame(message.get("text") or message["bytes"])
                if isinstance(frame, Hello):
                    outbox.put_nowait(self.greeting or self.welcome(frame))
                    self.outboxes.append(outbox)
                    if self.close_after_welcome:
                        outbox.put_nowait(self.close_after_welcome)
                else:
                    for answer in self.handle(frame):
                        outbox.put_nowait(answer)
        finally:
            writer.cancel()
            if outbox in self.outboxes:
                self.outboxes.remove(outbox)

    async def _http(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, answer = await self._answer(scope, body)
        content = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"req-1")]
        if status in (429, 503):
            headers.append((b"retry-after", b"0.05"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if status == 204 else content})

    async def _answer(self, scope: dict[str, Any], body: bytes) -> tuple[int, Any]:
        method, path = scope["method"], scope["path"].removeprefix("/api/v1")
        if route := self.routes.get((method, path)):
            return route(scope, body)
        if path == "/agents/register":
            self.registered.append((dict(scope["headers"])[b"authorization"].decode(), msgspec.json.decode(body)))
            return 201, {"agent": {}, "credential": "mcpa_made", "resumed": False}
        if path == "/agents/session":
            return 200, self.welcome(msgspec.json.decode(body, type=Hello))
        if path.endswith("/claim"):
            self.polls += 1
            try:
                async with asyncio.timeout(0.3):
                    tasks = [await self._claimed.get()]
            except TimeoutError:
                tasks = []
            return 200, {"tasks": tasks, "cancel": []}
        if path.endswith(("/heartbeat", "/report")):
            kind = Heartbeat if path.endswith("/heartbeat") else Report
            answers = self.handle(msgspec.json.decode(body, type=kind))
            return (200, answers[0]) if answers else (503, {"code": "overloaded", "retryable": True})
        if method == "DELETE" and path.startswith("/agents/session/"):
            self.byes.append("leave")
            return 204, None
        return 404, {"code": "not-found", "title": "Not found", "status": 404, "detail": f"{method} {path}"}


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Serve an ASGI application on a free port of the loopback; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, ws="websockets-sansio", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
