"""Many tasks at once, and tasks that failed for good, as a client steers them."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from mcp_control.kernel.paging import Page
from mcp_control.sdk.calls import LONG_POLL_SECONDS, Flow, Request, query
from mcp_control.sdk.errors import WaitTimeout
from mcp_control.sdk.submission import encode_json
from mcp_control.sdk.transport import Call
from mcp_control.tasks.operation_model import OperationView, Preview, Verb
from mcp_control.tasks.selection import Selection
from mcp_control.tasks.view_model import ParkedTask, TaskView

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

Conditions = Selection | Mapping[str, Any]
_UNSET: Final = object()


def _get(type: Any, path: str, params: Mapping[str, object], timeout: float = 30.0) -> Request[Any]:
    return Request(Call(path=path, params=query(params), timeout=timeout), lambda reply: reply.json(type))


def _post(type: Any, path: str, body: object, *, repeatable: bool = False) -> Request[Any]:
    call = Call(method="POST", path=path, body=encode_json(body), repeatable=repeatable)
    return Request(call, lambda reply: reply.json(type))


def _body(verb: Verb, where: Conditions, options: Mapping[str, object]) -> dict[str, object]:
    return {"verb": verb, "where": where} | {name: value for name, value in options.items() if value is not None}


def preview(verb: Verb, where: Conditions, **options: object) -> Request[Preview]:
    """Say how many tasks an operation would be done with."""
    return _post(Preview, "/operations", _body(verb, where, options) | {"dry_run": True}, repeatable=True)


def start(verb: Verb, where: Conditions, **options: object) -> Request[OperationView]:
    """Begin an operation."""
    return _post(OperationView, "/operations", _body(verb, where, options))


def get(operation_id: str, wait: float | None = None) -> Request[OperationView]:
    """Say how far an operation is; with `wait`, when it has ended or after so many seconds."""
    return _get(OperationView, f"/operations/{quote(operation_id, safe='')}", {"wait": wait}, 30.0 + (wait or 0.0))


def listed(**filters: object) -> Request[Page[OperationView]]:
    """Read a page of operations."""
    return _get(Page[OperationView], "/operations", filters)


def cancel(operation_id: str) -> Request[OperationView]:
    """Do it with no more tasks."""
    return _post(OperationView, f"/operations/{quote(operation_id, safe='')}/cancel", {}, repeatable=True)


def until_ended(operation_id: str, timeout: float | None, clock: Callable[[], float]) -> Flow[OperationView]:
    """Wait for the end of an operation. Raises WaitTimeout."""
    ends_at = None if timeout is None else clock() + timeout
    while True:
        left = LONG_POLL_SECONDS if ends_at is None else ends_at - clock()
        view = yield get(operation_id, max(0.0, min(left, LONG_POLL_SECONDS)))
        if view.state != "running":
            return view
        if ends_at is not None and clock() >= ends_at:
            raise WaitTimeout(f"operation {operation_id} has not ended after {timeout:g} seconds")


def letters(**filters: object) -> Request[Page[TaskView]]:
    """Read a page of dead letters."""
    return _get(Page[TaskView], "/dead-letters", filters)


def letter(task_id: str) -> Request[TaskView]:
    """Read a dead letter with its attempts, errors and payload."""
    return _get(TaskView, f"/dead-letters/{quote(task_id, safe='')}", {})


def replay(task_id: str, payload: object = _UNSET, **edit: object) -> Request[TaskView]:
    """Have a dead letter tried again."""
    body = {name: value for name, value in edit.items() if value is not None}
    if payload is not _UNSET:
        body["payload"] = payload
    return _post(TaskView, f"/dead-letters/{quote(task_id, safe='')}/replay", body)


def discard(task_id: str, reason: str) -> Request[TaskView]:
    """Take a task out of the dead-letter set."""
    return _post(TaskView, f"/dead-letters/{quote(task_id, safe='')}/discard", {"reason": reason})


def parked() -> Request[list[ParkedTask]]:
    """Read the stored tasks that cannot be decoded."""
    call = Call(path="/dead-letters/parked", repeatable=True)
    return Request(call, lambda reply: reply.json(dict[str, list[ParkedTask]])["items"])


def remove_parked(task_id: str) -> Request[None]:
    """Remove a stored task that cannot be decoded."""
    call = Call(method="DELETE", path=f"/dead-letters/parked/{quote(task_id, safe='')}", repeatable=True)
    return Request(call, lambda reply: None)


class Operations:
    """`client.operations`: one verb for all tasks that fulfil conditions."""

    def __init__(self, client: "Client", clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock

    def preview(self, verb: Verb, where: Conditions, **options: Any) -> Preview:
        """Say how many tasks it would be done with, and the first of them; nothing is done."""
        return self._client.do(preview(verb, where, **options))

    def start(self, verb: Verb, where: Conditions, **options: Any) -> OperationView:
        """Begin an operation; it is durable when this returns. Raises Conflicting where more match than expected.

        Args:
            verb: cancel, pause, resume, reprioritize, reassign, retry, replay or discard.
            where: conditions, all of which must hold; see `Selection`.
            options: `expected_at_most`, `reason`, `priority` (reprioritize), `agent` (reassign).
        """
        return self._client.do(start(verb, where, **options))

    def run(self, verb: Verb, where: Conditions, *, timeout: float | None = None, **options: Any) -> OperationView:
        """Begin an operation and return it when it has ended. Raises WaitTimeout; it goes on then."""
        return self.wait(self.start(verb, where, **options).id, timeout)

    def wait(self, operation_id: str, timeout: float | None = None) -> OperationView:
        """Wait for the end of an operation. Raises WaitTimeout."""
        return self._client.drive(until_ended(operation_id, timeout, self._clock))

    def get(self, operation_id: str) -> OperationView:
        """Say how far an operation is."""
        return self._client.do(get(operation_id))

    def iter(self, **filters: Any) -> Iterator[OperationView]:
        """Yield operations, newest first."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    def cancel(self, operation_id: str) -> OperationView:
        """Do it with no more tasks; what was done stays done."""
        return self._client.do(cancel(operation_id))


class DeadLetters:
    """`client.dead_letters`: tasks that failed for good. Many at once: `client.operations` with `replay` and `discard`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def iter(self, **filters: Any) -> Iterator[TaskView]:
        """Yield dead letters, newest first; filters are `type`, `run`, `code`, `error_class`, `ended_after`, `ended_before`, `label`."""
        return self._client.pages(lambda cursor: letters(cursor=cursor, **filters))

    def get(self, task_id: str) -> TaskView:
        """Read a dead letter with its attempts, errors and payload."""
        return self._client.do(letter(task_id))

    def replay(self, task_id: str, **edit: Any) -> TaskView:
        """Have it tried again as a new task; `payload`, `needs` and `priority` change it. Returns the new task."""
        return self._client.do(replay(task_id, **edit))

    def discard(self, task_id: str, reason: str = "") -> TaskView:
        """Take it out of the set; it stays among the finished tasks."""
        return self._client.do(discard(task_id, reason))

    def parked(self) -> list[ParkedTask]:
        """Return the stored tasks that cannot be decoded."""
        return self._client.do(parked())

    def remove_parked(self, task_id: str) -> None:
        """Remove a stored task that cannot be decoded, for good."""
        self._client.do(remove_parked(task_id))


class AsyncOperations:
    """`client.operations` of the async client; the same names."""

    def __init__(self, client: "AsyncClient", clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock

    async def preview(self, verb: Verb, where: Conditions, **options: Any) -> Preview:
        """Say how many tasks it would be done with, and the first of them; nothing is done."""
        return await self._client.do(preview(verb, where, **options))

    async def start(self, verb: Verb, where: Conditions, **options: Any) -> OperationView:
        """Begin an operation; it is durable when this returns. See `Operations.start`."""
        return await self._client.do(start(verb, where, **options))

    async def run(
        self, verb: Verb, where: Conditions, *, timeout: float | None = None, **options: Any
    ) -> OperationView:
        """Begin an operation and return it when it has ended. Raises WaitTimeout; it goes on then."""
        return await self.wait((await self.start(verb, where, **options)).id, timeout)

    async def wait(self, operation_id: str, timeout: float | None = None) -> OperationView:
        """Wait for the end of an operation. Raises WaitTimeout."""
        return await self._client.drive(until_ended(operation_id, timeout, self._clock))

    async def get(self, operation_id: str) -> OperationView:
        """Say how far an operation is."""
        return await self._client.do(get(operation_id))

    def iter(self, **filters: Any) -> AsyncIterator[OperationView]:
        """Yield operations, newest first."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    async def cancel(self, operation_id: str) -> OperationView:
        """Do it with no more tasks; what was done stays done."""
        return await self._client.do(cancel(operation_id))


class AsyncDeadLetters:
    """`client.dead_letters` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    def iter(self, **filters: Any) -> AsyncIterator[TaskView]:
        """Yield dead letters, newest first; the filters are those of `DeadLetters.iter`."""
        return self._client.pages(lambda cursor: letters(cursor=cursor, **filters))

    async def get(self, task_id: str) -> TaskView:
        """Read a dead letter with its attempts, errors and payload."""
        return await self._client.do(letter(task_id))

    async def replay(self, task_id: str, **edit: Any) -> TaskView:
        """Have it tried again as a new task; `payload`, `needs` and `priority` change it. Returns the new task."""
        return await self._client.do(replay(task_id, **edit))

    async def discard(self, task_id: str, reason: str = "") -> TaskView:
        """Take it out of the set; it stays among the finished tasks."""
        return await self._client.do(discard(task_id, reason))

    async def parked(self) -> list[ParkedTask]:
        """Return the stored tasks that cannot be decoded."""
        return await self._client.do(parked())

    async def remove_parked(self, task_id: str) -> None:
        """Remove a stored task that cannot be decoded, for good."""
        await self._client.do(remove_parked(task_id))
