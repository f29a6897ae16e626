"""An agent that a test drives by hand, over the socket or by requests, and on whichever server it likes with each step."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Self

import httpx2
import websockets

from tests.integration.support import API

Frame = dict[str, Any]


class Peer:
    """One instance of an agent.

    Args:
        spec: what it says of itself.
        headers: its credential.
    """

    def __init__(self, spec: Frame, headers: dict[str, str]) -> None:
        self.spec = spec
        self.headers = headers
        self.instance_id: str | None = None
        self.running: list[str] = []
        self._reports = 0
        self._ticks = 0

    @classmethod
    async def registered(
        cls, client: httpx2.AsyncClient, name: str, type: str, slots: int = 1, lease: float = 30, token: str = ""
    ) -> Self:
        """Enrol a new agent that does tasks of one type; `token` is an enrolment token, one is made where there is none."""
        token = token or (await client.post(f"{API}/agents/enrolment-tokens", json={"uses": 1})).json()["token"]
        spec = {"name": name, "capabilities": [{"name": type}], "slots": slots, "lease_seconds": lease}
        made = await client.post(f"{API}/agents/register", json=spec, headers={"Authorization": f"Bearer {token}"})
        assert made.status_code in (200, 201), made.text
        return cls(spec, {"Authorization": f"Bearer {made.json()['credential']}"})

    def hello(self) -> Frame:
        """Return the first frame of a connection."""
        there = {"instance_id": self.instance_id, "beat": self.beat()} if self.instance_id else {}
        return {"op": "hello", "protocol": 1, "agent": self.spec, **there}

    def beat(self) -> Frame:
        """Return what a heartbeat says."""
        self._ticks += 1
        return {"tick": self._ticks, "running": list(self.running)}

    def report(self, task: Frame, outcome: str | None, result: object = None) -> Frame:
        """Return the frame that says that a task has begun (None) or how it ended."""
        self._reports += 1
        one = {"task_id": task["task_id"], "lease_token": task["lease_token"]}
        if outcome is None:
            return {"op": "report", "id": self._reports, "started": [one]}
        return {"op": "report", "id": self._reports, "done": [{**one, "outcome": outcome, "result": result}]}


class Socket:
    """A peer's connection to one server. Frames are kept as they come."""

    def __init__(self, peer: Peer, connection: websockets.ClientConnection) -> None:
        self.peer = peer
        self.connection = connection
        self.frames: list[Frame] = []
        self.welcome: Frame = {}
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def opened(cls, peer: Peer, url: str) -> Self:
        """Connect, say hello and be welcomed."""
        connection = await websockets.connect(
            url.replace("http", "ws", 1) + "/ws/agent", additional_headers=peer.headers, compression=None
        )
        made = cls(peer, connection)
        made._reader = asyncio.create_task(made._read())
        await made.send(peer.hello())
        made.welcome = await made.one(lambda frame: frame["op"] == "welcome")
        peer.instance_id = made.welcome["instance_id"]
        return made

    async def _read(self) -> None:
        try:
            async for text in self.connection:
                self.frames.append(json.loads(text))
                self._news.set()
        except websockets.ConnectionClosedError:
            pass

    async def send(self, frame: Frame) -> None:
        """Send a frame."""
        await self.connection.send(json.dumps(frame))

    async def one(self, wanted: Callable[[Frame], object], seconds: float = 10.0) -> Frame:
        """Wait for a frame and take it out."""
        async with asyncio.timeout(seconds):
            while True:
                for frame in self.frames:
                    if wanted(frame):
                        self.frames.remove(frame)
                        return frame
                self._news.clear()
                await self._news.wait()

    async def task(self, seconds: float = 10.0) -> Frame:
        """Wait for the next task that is given."""
        given: list[Frame] = (await self.one(lambda frame: frame["op"] == "tasks", seconds))["tasks"]
        assert len(given) == 1
        self.peer.running.append(given[0]["task_id"])
        return given[0]

    async def done(self, task: Frame, outcome: str = "completed", result: object = None) -> Frame:
        """Report how a task ended; returns the answer."""
        return await self.told(self.peer.report(task, outcome, result), task["task_id"])

    async def started(self, task: Frame) -> Frame:
        """Report that a task has begun; returns the answer."""
        return await self.told(self.peer.report(task, None))

    async def told(self, report: Frame, ends: str | None = None) -> Frame:
        """Send a report until it is recorded; returns the answer."""
        while True:
            await self.send(report)
            answer = await self.one(lambda frame: frame["op"] == "ack" and frame["id"] == report["id"])
            if not answer.get("retry"):
                if ends is not None:
                    self.peer.running.remove(ends)
                return answer

    async def beat(self) -> Frame:
        """Send a heartbeat; returns the answer."""
        await self.send({"op": "beat", "beat": self.peer.beat()})
        return await self.one(lambda frame: frame["op"] == "beat_ack")

    async def close(self) -> int | None:
        """Hang up; returns the code the connection was closed with."""
        await self.connection.close()
        if self._reader is not None:
            await self._reader
        return self.connection.close_code
