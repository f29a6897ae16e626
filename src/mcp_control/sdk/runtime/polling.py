"""The same session over plain REST, for agents that cannot open a WebSocket: claims wait at the server for work."""

import asyncio
from collections.abc import Callable
from typing import Final, Self

import msgspec

from mcp_control.sdk.errors import ApiProblem, Conflicting, InvalidRequest, Missing, SdkError, Unreachable
from mcp_control.sdk.runtime.links import SUPERSEDED, LinkLost, LinkRefused
from mcp_control.sdk.transport import AsyncTransport, Call
from mcp_control.tasks.wire import (
    Ack,
    AgentFrame,
    Assignment,
    BeatAck,
    Bye,
    Cancel,
    Heartbeat,
    Hello,
    Refusal,
    Renew,
    Report,
    ServerFrame,
    Tasks,
    Trouble,
    Welcome,
)

CLAIM_SECONDS: Final = 20
_encode: Final = msgspec.json.Encoder().encode


class _Claimed(msgspec.Struct, frozen=True, kw_only=True):
    tasks: list[Assignment] = []
    cancel: list[str] = []


class PollLink:
    """Frames as requests. Answers and claimed tasks come out of `receive` in the order they arrived."""

    def __init__(self, http: AsyncTransport, welcome: Welcome, free_slots: Callable[[], int]) -> None:
        self.welcome = welcome
        self._http = http
        self._path = f"/agents/session/{welcome.instance_id}"
        self._free_slots = free_slots
        self._inbox: asyncio.Queue[ServerFrame | SdkError] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._claims = asyncio.create_task(self._claim())

    @classmethod
    async def open(cls, url: str, credential: str, hello: Hello, free_slots: Callable[[], int]) -> Self:
        """Open a session. Raises LinkRefused, LinkLost."""
        http = AsyncTransport(url, credential, retry=False)
        try:
            reply = await http.send(Call(method="POST", path="/agents/session", body=_encode(hello)))
        except ApiProblem as problem:
            await http.close()
            raise LinkRefused(problem.status, problem.code, problem.detail, problem.retry_after) from problem
        except Unreachable as error:
            await http.close()
            raise LinkLost(str(error)) from error
        return cls(http, reply.json(Welcome), free_slots)

    async def send(self, frame: AgentFrame) -> None:
        """Send a frame and put the answer in the inbox."""
        try:
            match frame:
                case Report():
                    self._inbox.put_nowait(await self._report(frame))
                    self._changed.set()
                case Heartbeat():
                    body = _encode({"beat": frame.beat})
                    reply = await self._http.send(Call(method="POST", path=f"{self._path}/heartbeat", body=body))
                    self._inbox.put_nowait(reply.json(BeatAck))
                    self._changed.set()
                case Bye(step="leave"):
                    await self._http.send(Call(method="DELETE", path=self._path))
                case Bye():
                    # Hanging up takes the open claim back. What was handed out meanwhile is handed back on leaving.
                    self._claims.cancel()
                    await asyncio.gather(self._claims, return_exceptions=True)
                case Renew() | Hello():
                    raise TypeError("not a frame of this transport")
        except (Missing, Conflicting) as error:
            raise LinkLost(str(error), SUPERSEDED) from error
        except (ApiProblem, Unreachable) as error:
            raise LinkLost(str(error)) from error

    async def _report(self, report: Report) -> Ack | Trouble:
        call = Call(method="POST", path=f"{self._path}/report", body=_encode(report))
        try:
            ack: Ack = (await self._http.send(call)).json(Ack)
            return ack
        except InvalidRequest as problem:
            return Trouble(code=problem.code, detail=problem.detail)
        except Conflicting as problem:
            if len(report.done) != 1 or problem.task_id != report.done[0].task_id:
                raise
            return Ack(
                id=report.id,
                refused=[Refusal(task_id=report.done[0].task_id, code=problem.code, detail=problem.detail)],
            )

    async def receive(self) -> ServerFrame:
        """Return the next frame."""
        frame = await self._inbox.get()
        if isinstance(frame, SdkError):
            raise LinkLost(str(frame), SUPERSEDED if isinstance(frame, Missing | Conflicting) else 0) from frame
        return frame

    async def close(self) -> None:
        """End the claims and close the connections."""
        self._claims.cancel()
        await asyncio.gather(self._claims, return_exceptions=True)
        await self._http.close()

    async def _claim(self) -> None:
        try:
            while True:
                free = self._free_slots()
                if free <= 0:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                call = Call(
                    method="POST",
                    path=f"{self._path}/claim",
                    params=(("wait", str(CLAIM_SECONDS)), ("limit", str(min(free, 500)))),
                    timeout=CLAIM_SECONDS + 15,
                )
                claimed = (await self._http.send(call)).json(_Claimed)
                if claimed.cancel:
                    self._inbox.put_nowait(Cancel(task_ids=claimed.cancel))
                if claimed.tasks:
                    self._inbox.put_nowait(Tasks(tasks=claimed.tasks))
                await asyncio.sleep(0)  # lets the tasks be accepted before slots are counted again
        except (ApiProblem, Unreachable) as error:
            self._inbox.put_nowait(error)
