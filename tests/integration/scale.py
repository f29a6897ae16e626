"""A thousand agents in one process, without the SDK: each keeps a socket open and does what it is given at once.

`python -m tests.integration.scale URL TOKEN AGENTS SLOTS` registers and connects them, prints `connected`, and then a line
`SECONDS TASKS` whenever so many tasks were acknowledged as done since it started, until its input ends.
"""

import asyncio
import os
import sys
import time
from typing import Any

import httpx2
import uvloop
import websockets

from mcp_control.agents.model import Beat
from mcp_control.tasks.wire import Ack, Done, Heartbeat, Report, Tasks, decode_server_frame, encode_frame

EVERY = 2000
AGAIN_SECONDS = 0.5


class Crowd:
    """All the agents, and what they have done together."""

    def __init__(self) -> None:
        self.done = 0
        self._told = 0
        self._sending: set[asyncio.Future[None]] = set()
        self._began = time.monotonic()

    def count(self, tasks: int) -> None:
        """Count tasks whose end is durable, and tell from time to time."""
        self.done += tasks
        if self.done - self._told >= EVERY:
            self._told = self.done
            sys.stdout.write(f"{time.monotonic() - self._began:.3f} {self.done}\n")
            sys.stdout.flush()

    async def agent(self, url: str, credential: str, spec: dict[str, Any], connected: asyncio.Semaphore) -> None:
        """Be one agent."""
        socket = await websockets.connect(
            url.replace("http", "ws") + "/ws/agent",
            additional_headers={"Authorization": f"Bearer {credential}"},
            ping_interval=None,
            compression=None,
            open_timeout=60,
        )
        await socket.send(_text({"op": "hello", "protocol": 1, "agent": spec}))
        await socket.recv()
        connected.release()
        beating = asyncio.create_task(self._beat(socket))
        reports: dict[int, str] = {}
        sizes: dict[int, int] = {}
        loop = asyncio.get_running_loop()
        number = 0
        try:
            async for text in socket:
                frame = decode_server_frame(text)
                if isinstance(frame, Tasks):
                    number += 1
                    sizes[number] = len(frame.tasks)
                    done = [
                        Done(task_id=one.task_id, lease_token=one.lease_token, outcome="completed")
                        for one in frame.tasks
                    ]
                    reports[number] = encode_frame(Report(id=number, done=done)).decode()
                    await socket.send(reports[number])
                elif isinstance(frame, Ack) and frame.retry:
                    # The server has more to do than it can at the moment; the report is sent again.
                    loop.call_later(AGAIN_SECONDS, self._again, socket, reports[frame.id])
                elif isinstance(frame, Ack):
                    assert not frame.refused, frame.refused
                    del reports[frame.id]
                    self.count(sizes.pop(frame.id))
        finally:
            beating.cancel()
            await socket.close()

    def _again(self, socket: websockets.ClientConnection, report: str) -> None:
        sending = asyncio.ensure_future(socket.send(report))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _beat(self, socket: websockets.ClientConnection) -> None:
        while True:
            await asyncio.sleep(20)
            await socket.send(encode_frame(Heartbeat(beat=Beat())).decode())


def _text(value: object) -> str:
    return encode_frame(value).decode()


async def main(url: str, token: str, agents: int, slots: int) -> None:
    """Register and connect everybody, then work until told to end."""
    crowd = Crowd()
    connected = asyncio.Semaphore(0)
    headers = {"Authorization": f"Bearer {token}"}
    working: list[asyncio.Task[None]] = []
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
        at_once = asyncio.Semaphore(50)

        async def enter(number: int) -> None:
            spec = {
                "name": f"scale-{number}", "capabilities": [{"name": "it.scale"}], "slots": slots, "lease_seconds": 120
            }  # fmt: skip
            async with at_once:
                answer = await http.post("/api/v1/agents/register", json=spec)
                assert answer.status_code == 201, answer.text
                credential = answer.json()["credential"]
                working.append(asyncio.create_task(crowd.agent(url, credential, spec, connected)))
                await connected.acquire()

        await asyncio.gather(*map(enter, range(agents)))
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    # An agent that ends before it is told to has a fault; then all end, so that nobody waits for its tasks.
    await asyncio.wait([told, *working], return_when=asyncio.FIRST_COMPLETED)
    for one in working:
        one.cancel()
    ends = await asyncio.gather(*working, return_exceptions=True)
    faults = [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)]
    if not told.done() or faults:
        sys.stderr.write(f"{len(faults)} agents ended: {faults[:3]}\n")
        sys.stderr.flush()
        os._exit(1)  # a thread waits for the input, which does not end


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
