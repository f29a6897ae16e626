"""The inside of a worker process: one handler at a time on its main thread, a second thread listening to the agent.

The process dies with the agent: when the pipe closes, even by kill -9, it kills its own process group.
"""

import importlib
import os
import queue
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final, Literal

import msgspec

from mcp_control.kernel.breaker_rules import BreakerStatus
from mcp_control.sdk.asking import question_in
from mcp_control.sdk.context import StopFlag, SyncContext
from mcp_control.sdk.errors import Cancelled
from mcp_control.sdk.guards import Guards
from mcp_control.sdk.handlers import Handler, encode_result, failure_from, invalid_payload
from mcp_control.tasks.ask_model import Ask
from mcp_control.tasks.budget_model import Spent
from mcp_control.tasks.model import Failure, LogLine
from mcp_control.tasks.wire import Assignment


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Agent to worker: do this. `module` and `name` say where the handler stands."""

    module: str
    name: str
    assignment: bytes


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Agent to worker: the attempt must stop."""

    reason: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to agent: up and waiting."""


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """Worker to agent: progress."""

    fraction: float
    message: str


class Said(msgspec.Struct, frozen=True, tag="said"):
    """Worker to agent: a log line."""

    line: LogLine


class Spending(msgspec.Struct, frozen=True, tag="spending"):
    """Worker to agent: what the attempt has used in all."""

    spent: Spent


class Guarding(msgspec.Struct, frozen=True, tag="guarding"):
    """Worker to agent: how its circuit breakers stand."""

    breakers: list[BreakerStatus]


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """Worker to agent: the attempt has ended; `result` is JSON."""

    outcome: Literal["completed", "failed", "cancelled", "asked"]
    result: bytes = b"null"
    failure: Failure | None = None
    ask: Ask | None = None


encode: Final = msgspec.msgpack.Encoder().encode
decode_order: Final = msgspec.msgpack.Decoder(Run | Stop).decode
decode_news: Final = msgspec.msgpack.Decoder(Ready | Moved | Said | Spending | Guarding | Ended).decode
encode_assignment: Final = msgspec.json.Encoder().encode
_decode_assignment: Final = msgspec.json.Decoder(Assignment).decode


class _PipeSink:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # handlers may log from threads of their own

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send_bytes(encode(message))

    def progress(self, fraction: float, message: str) -> None:
        self.send(Moved(fraction, message))

    def log(self, line: LogLine) -> None:
        self.send(Said(line))

    def used(self, spent: Spent) -> None:
        self.send(Spending(spent))


def main(connection: Connection, url: str, credential: str) -> None:
    """Serve one agent until its end of the pipe closes."""
    with suppress(OSError):
        os.setpgid(0, 0)  # what handlers start dies with this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent drains; it says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    runs: queue.SimpleQueue[tuple[Run, StopFlag]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, runs), daemon=True, name="agent-pipe").start()
    sink = _PipeSink(connection)
    guards = Guards(lambda statuses: sink.send(Guarding(statuses)))
    clients: list[Any] = []

    def client() -> Any:
        if not clients:
            from mcp_control.sdk.client import Client  # only handlers that use it pay for it

            clients.append(Client(url, token=credential))
        return clients[0]

    sink.send(Ready())
    while True:
        run, flag = runs.get()
        sink.send(_attempt(run, flag, sink, client, guards))


def _listen(connection: Connection, runs: "queue.SimpleQueue[tuple[Run, StopFlag]]") -> None:
    flag = StopFlag()
    try:
        while True:
            order = decode_order(connection.recv_bytes())
            if isinstance(order, Run):
                flag = StopFlag()
                runs.put((order, flag))
            else:
                flag.set(order.reason)
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)


def _attempt(run: Run, flag: StopFlag, sink: _PipeSink, client: Any, guards: Guards) -> Ended:
    assignment = _decode_assignment(run.assignment)
    os.environ["MCP_FENCE"] = assignment.fence
    os.environ["MCP_TASK_ID"] = assignment.task_id
    try:
        handler: Handler[Any, Any] = find_handler(run.module, run.name)
        try:
            payload = handler.decode(assignment.payload)
        except msgspec.MsgspecError as error:
            return Ended("failed", failure=invalid_payload(error))
        result = (
            handler.function(payload, SyncContext(assignment, sink, flag, client, guards))
            if handler.wants_context
            else handler.function(payload)
        )
        return Ended("completed", encode_result(result))
    except Cancelled as error:
        return Ended("cancelled", failure=failure_from(error))
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return Ended("failed", failure=failure_from(error))
    except BaseException as error:
        ask = question_in(error)
        if ask is None:
            raise
        return Ended("asked", ask=ask)


def find_handler(module: str, name: str) -> Handler[Any, Any]:
    """Return the handler that stands under this name in this module."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Handler):
        raise TypeError(f"{module}.{name} is not a task handler")
    return found
