"""Worker processes: started when first needed, kept, one attempt at a time each, killable one by one."""

import asyncio
import multiprocessing
import os
import signal
from contextlib import suppress
from typing import Any

from mcp_control.sdk.context import Sink
from mcp_control.sdk.guards import Guards
from mcp_control.sdk.handlers import Handler
from mcp_control.sdk.runtime.worker import (
    Ended,
    Guarding,
    Moved,
    Ready,
    Run,
    Said,
    Spending,
    Stop,
    decode_news,
    encode,
    encode_assignment,
    main,
)
from mcp_control.tasks.model import Failure
from mcp_control.tasks.wire import Assignment


class WorkerProcess:
    """One process and the pipe to it. It is started fresh (spawn), so it inherits neither threads nor locks."""

    def __init__(self, url: str, credential: str, guards: Guards) -> None:
        self._guards = guards
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, url, credential), name="mcp-control-worker")
        self._process.start()
        theirs.close()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[Ended] | None = None
        self._sink: Sink | None = None
        self.alive = True
        self._loop.add_reader(self._pipe.fileno(), self._readable)

    async def run(self, handler: Handler[Any, Any], assignment: Assignment, sink: Sink) -> Ended:
        """Do one attempt. A process that dies, or is killed, ends it as a temporary failure."""
        self._ended = self._loop.create_future()
        self._sink = sink
        try:
            await self._ready
            if not self.alive:
                self._died_working()
            self._send(Run(handler.__module__, handler.__qualname__, encode_assignment(assignment)))
            return await self._ended
        finally:
            self._ended = self._sink = None

    def stop(self, reason: str) -> None:
        """Tell the handler that it must stop."""
        self._send(Stop(reason))

    def kill(self) -> None:
        """End the process, and what its handler has started, now."""
        if not self._process.is_alive():
            return
        pid = self._process.pid
        assert pid is not None
        with suppress(ProcessLookupError):
            # Before it is ready the process may not lead its group yet, and the group would be ours.
            if self._ready.done() and os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and wait for its end, which is near."""
        self.kill()
        self._process.join(5)
        self._died()

    def _send(self, message: object) -> None:
        if self.alive:
            with suppress(OSError):  # a dead process is noticed by reading
                self._pipe.send_bytes(encode(message))

    def _readable(self) -> None:
        try:
            while self.alive and self._pipe.poll():
                news = decode_news(self._pipe.recv_bytes())
                if isinstance(news, Moved):
                    if self._sink is not None:
                        self._sink.progress(news.fraction, news.message)
                elif isinstance(news, Said):
                    if self._sink is not None:
                        self._sink.log(news.line)
                elif isinstance(news, Spending):
                    if self._sink is not None:
                        self._sink.used(news.spent)
                elif isinstance(news, Guarding):
                    self._guards.heard(self, news.breakers)
                elif isinstance(news, Ready):
                    self._ready.set_result(None)
                elif self._ended is not None and not self._ended.done():
                    self._ended.set_result(news)
        except (EOFError, OSError):
            self._died()

    def _died(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._guards.forget(self)
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.close()
        self._process.join(1)
        if not self._ready.done():
            self._ready.set_result(None)
        self._died_working()

    def _died_working(self) -> None:
        if self._ended is not None and not self._ended.done():
            code = self._process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
            failure = Failure(cause="infra", code="worker-died", message=f"the worker process ended {how}")
            self._ended.set_result(Ended("failed", failure=failure))


class ProcessPool:
    """At most `size` processes; a killed one is replaced when next needed."""

    def __init__(self, size: int, url: str, credential: str, guards: Guards) -> None:
        self._guards = guards
        self._url = url
        self._credential = credential
        self._room = asyncio.Semaphore(size)
        self._idle: list[WorkerProcess] = []
        self._all: set[WorkerProcess] = set()

    async def acquire(self) -> WorkerProcess:
        """Return an idle process, or a new one; waits while all are busy."""
        await self._room.acquire()
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            self._all.discard(worker)
        try:
            worker = WorkerProcess(self._url, self._credential, self._guards)
        except BaseException:
            self._room.release()
            raise
        self._all.add(worker)
        return worker

    def release(self, worker: WorkerProcess) -> None:
        """Take a process back."""
        if worker.alive:
            self._idle.append(worker)
        else:
            self._all.discard(worker)
        self._room.release()

    def close(self) -> None:
        """End all processes."""
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            worker.close()
        self._all.clear()
        self._idle.clear()
