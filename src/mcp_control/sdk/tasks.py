"""Tasks as a client submits, watches and steers them."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack

import msgspec

from mcp_control.events.model import Event
from mcp_control.kernel.batching import Batcher
from mcp_control.sdk import calls
from mcp_control.sdk.errors import ApiProblem, NotNow, TaskFailed, Unreachable
from mcp_control.sdk.follow import TaskFollower, Update
from mcp_control.sdk.submission import BATCH_TASKS, SubmitOptions, batches, encode_json, keyed, make_spec
from mcp_control.sdk.usage import Added
from mcp_control.tasks.budget_model import Amounts, Budget, BudgetEdit, BudgetView
from mcp_control.tasks.model import LogLine, TaskSpec, TaskState
from mcp_control.tasks.view_model import Explanation, StatisticView, TaskView

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

LOG_WAIT_SECONDS: Final = 20.0
DROP_PAUSE_SECONDS: Final = 0.5
_clock: Final = time.monotonic


def result_of(view: TaskView, type: Any = Any) -> Any:
    """Return the result of a task that has ended, as this type. Raises TaskFailed where it did not complete."""
    if view.state is not TaskState.COMPLETED:
        raise TaskFailed(view)
    return msgspec.json.decode(b"null" if view.result is msgspec.UNSET else view.result, type=type)


class TaskHandle:
    """A task at the server. `id` names it; everything else is asked for."""

    def __init__(self, client: "Client", task_id: str, view: TaskView | None = None) -> None:
        self._client = client
        self.id = task_id
        self._known = view

    def get(self) -> TaskView:
        """Read the task."""
        self._known = self._client.do(calls.get_task(self.id))
        return self._known

    def wait(self, timeout: float | None = None) -> TaskView:
        """Wait for the end and return the task. Raises WaitTimeout."""
        self._known = self._client.drive(calls.task_until_final(self.id, timeout, _clock, self._known))
        return self._known

    def result(self, timeout: float | None = None, type: Any = Any) -> Any:
        """Wait for the result and return it, as this type. Raises TaskFailed, WaitTimeout."""
        return result_of(self.wait(timeout), type)

    def stream(self) -> Iterator[Update]:
        """Yield states, progress and log lines until the task has ended; a dropped connection is taken up again."""
        follower = TaskFollower()
        cursor: str | None = None
        while not follower.ended():
            try:
                for found, position in self._client.event_lines((), self.id, None, cursor):
                    cursor = position
                    if isinstance(found, Event) and found.type == "task.logged":
                        yield from self._lines(follower)
                        continue
                    updates = follower.happened(found) if isinstance(found, Event) else follower.viewed(self.get())
                    if follower.ended():
                        yield from self._lines(follower)
                    yield from updates
                    if follower.ended():
                        return
            except (Unreachable, NotNow):
                pass  # the next connection goes on after the last event seen
            time.sleep(DROP_PAUSE_SECONDS)

    def _lines(self, follower: TaskFollower) -> Iterator[Update]:
        while True:
            page = self._client.do(calls.logs(self.id, follower.next_line))
            yield from follower.lines(page.lines, page.next)
            if not page.lines:
                return

    def logs(self, follow: bool = False) -> Iterator[LogLine]:
        """Yield the log lines; with `follow`, also those to come, until the task has ended."""
        after = 0
        while True:
            page = self._client.do(calls.logs(self.id, after, wait=LOG_WAIT_SECONDS if follow else None))
            yield from page.lines
            after = page.next
            if page.final or (not follow and not page.lines):
                return

    def budget(self) -> BudgetView:
        """Read its budget and what was used of it. Raises Missing where it has none."""
        return self._client.do(calls.get_budget(self.id))

    def raise_budget(self, set: Budget | None = None, **add: Unpack[Added]) -> BudgetView:
        """Replace the limits that `set` names, and add to limits that are there; what waits for them goes on."""
        return self._client.do(calls.edit_budget(self.id, BudgetEdit(set=set, add=Amounts(**add))))

    def refuse_budget(self) -> TaskView:
        """Say no to a task that asked for more: it fails."""
        return self._client.do(calls.refuse_budget(self.id))

    def cancel(self, reason: str | None = None) -> TaskView:
        """Cancel the task: at once when it waits, by telling the agent when it runs."""
        return self._client.do(calls.task_verb(self.id, "cancel", reason=reason))

    def pause(self, reason: str | None = None) -> TaskView:
        """Hold the task back: no agent gets it until it is resumed; a running attempt goes on."""
        return self._client.do(calls.task_verb(self.id, "pause", reason=reason))

    def resume(self) -> TaskView:
        """Let the task go; it waits at its old place."""
        return self._client.do(calls.task_verb(self.id, "resume"))

    def retry(self) -> "TaskHandle":
        """Submit it once more, as a new task that names this one."""
        view = self._client.do(calls.task_verb(self.id, "retry"))
        return TaskHandle(self._client, view.id, view)


class Tasks:
    """`client.tasks`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def statistics(self) -> Iterator[StatisticView]:
        """Yield how many tasks of each type completed and failed, and how long they took."""
        return self._client.pages(lambda cursor: calls.statistics(cursor=cursor))

    def submit(self, type: str, payload: object = None, **options: Unpack[SubmitOptions]) -> TaskHandle:
        """Submit a task. It is durable when this returns. Raises ApiProblem, Unreachable."""
        view = self._client.do(calls.submit(make_spec(type, payload, options)))
        return TaskHandle(self._client, view.id, view)

    def submit_many(self, specs: Sequence[TaskSpec]) -> list[TaskHandle | ApiProblem]:
        """Submit many tasks, each on its own: the answer has a handle or a problem for each, in order."""
        found: list[TaskHandle | ApiProblem] = []
        for batch in batches(encode_json(keyed(spec)) for spec in specs):
            answers = self._client.do(calls.submit_batch(batch))
            found += [a if isinstance(a, ApiProblem) else TaskHandle(self._client, a) for a in answers]
        return found

    def run(
        self,
        type: str,
        payload: object = None,
        *,
        wait: float | None = None,
        result_type: Any = Any,
        **options: Unpack[SubmitOptions],
    ) -> Any:
        """Submit a task and return its result: one request when it ends within a minute. Raises TaskFailed, WaitTimeout.

        Args:
            type: the task type.
            payload: any JSON.
            wait: seconds to wait for the result; None waits for ever.
            result_type: the type the result is read as.
            options: as for `submit`.
        """
        began = _clock()
        view = self._client.do(
            calls.submit(make_spec(type, payload, options), calls.SERVER_WAIT_LIMIT if wait is None else wait)
        )
        left = None if wait is None else max(0.0, wait - (_clock() - began))
        return TaskHandle(self._client, view.id, view).result(left, result_type)

    def get(self, task_id: str) -> TaskView:
        """Read a task, payload and result included."""
        return self._client.do(calls.get_task(task_id))

    def handle(self, task_id: str) -> TaskHandle:
        """Return a handle for a known id, without asking the server."""
        return TaskHandle(self._client, task_id)

    def list(self, **filters: Any) -> list[TaskView]:
        """Return the first page; filters are `state`, `type`, `run`, `group`, `agent`, `label` (mapping), `limit`, `order`."""
        return self._client.do(calls.list_tasks(**filters)).items

    def iter(self, **filters: Any) -> Iterator[TaskView]:
        """Yield all tasks that match; filters as for `list`."""
        return self._client.pages(lambda cursor: calls.list_tasks(cursor=cursor, **filters))

    def explain(self, task_id: str) -> Explanation:
        """Say why a task is not running."""
        return self._client.do(calls.explain(task_id))


class AsyncTaskHandle:
    """A task at the server, for the async client; the same names."""

    def __init__(self, client: "AsyncClient", task_id: str, view: TaskView | None = None) -> None:
        self._client = client
        self.id = task_id
        self._known = view

    async def get(self) -> TaskView:
        """Read the task."""
        self._known = await self._client.do(calls.get_task(self.id))
        return self._known

    async def wait(self, timeout: float | None = None) -> TaskView:
        """Wait for the end and return the task. Raises WaitTimeout."""
        self._known = await self._client.drive(calls.task_until_final(self.id, timeout, _clock, self._known))
        return self._known

    async def result(self, timeout: float | None = None, type: Any = Any) -> Any:
        """Wait for the result and return it, as this type. Raises TaskFailed, WaitTimeout."""
        return result_of(await self.wait(timeout), type)

    async def stream(self) -> AsyncIterator[Update]:
        """Yield states, progress and log lines until the task has ended; a dropped connection is taken up again."""
        follower = TaskFollower()
        cursor: str | None = None
        while not follower.ended():
            try:
                async for found, position in self._client.event_lines((), self.id, None, cursor):
                    cursor = position
                    if isinstance(found, Event) and found.type == "task.logged":
                        async for update in self._lines(follower):
                            yield update
                        continue
                    updates = (
                        follower.happened(found) if isinstance(found, Event) else follower.viewed(await self.get())
                    )
                    if follower.ended():
                        async for update in self._lines(follower):
                            yield update
                    for update in updates:
                        yield update
                    if follower.ended():
                        return
            except (Unreachable, NotNow):
                pass  # the next connection goes on after the last event seen
            await asyncio.sleep(DROP_PAUSE_SECONDS)

    async def _lines(self, follower: TaskFollower) -> AsyncIterator[Update]:
        while True:
            page = await self._client.do(calls.logs(self.id, follower.next_line))
            for update in follower.lines(page.lines, page.next):
                yield update
            if not page.lines:
                return

    async def logs(self, follow: bool = False) -> AsyncIterator[LogLine]:
        """Yield the log lines; with `follow`, also those to come, until the task has ended."""
        after = 0
        while True:
            page = await self._client.do(calls.logs(self.id, after, wait=LOG_WAIT_SECONDS if follow else None))
            for line in page.lines:
                yield line
            after = page.next
            if page.final or (not follow and not page.lines):
                return

    async def budget(self) -> BudgetView:
        """Read its budget and what was used of it. Raises Missing where it has none."""
        return await self._client.do(calls.get_budget(self.id))

    async def raise_budget(self, set: Budget | None = None, **add: Unpack[Added]) -> BudgetView:
        """Replace the limits that `set` names, and add to limits that are there; what waits for them goes on."""
        return await self._client.do(calls.edit_budget(self.id, BudgetEdit(set=set, add=Amounts(**add))))

    async def refuse_budget(self) -> TaskView:
        """Say no to a task that asked for more: it fails."""
        return await self._client.do(calls.refuse_budget(self.id))

    async def cancel(self, reason: str | None = None) -> TaskView:
        """Cancel the task: at once when it waits, by telling the agent when it runs."""
        return await self._client.do(calls.task_verb(self.id, "cancel", reason=reason))

    async def pause(self, reason: str | None = None) -> TaskView:
        """Hold the task back: no agent gets it until it is resumed; a running attempt goes on."""
        return await self._client.do(calls.task_verb(self.id, "pause", reason=reason))

    async def resume(self) -> TaskView:
        """Let the task go; it waits at its old place."""
        return await self._client.do(calls.task_verb(self.id, "resume"))

    async def retry(self) -> "AsyncTaskHandle":
        """Submit it once more, as a new task that names this one."""
        view = await self._client.do(calls.task_verb(self.id, "retry"))
        return AsyncTaskHandle(self._client, view.id, view)


class AsyncTasks:
    """`client.tasks` of the async client; the same names. Submissions at the same time share a request."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client
        self._batcher: Batcher[TaskSpec, TaskView | str] = Batcher(self._submit_batch, BATCH_TASKS)

    def statistics(self) -> AsyncIterator[StatisticView]:
        """Yield how many tasks of each type completed and failed, and how long they took."""
        return self._client.pages(lambda cursor: calls.statistics(cursor=cursor))

    async def submit(self, type: str, payload: object = None, **options: Unpack[SubmitOptions]) -> AsyncTaskHandle:
        """Submit a task. It is durable when this returns. Raises ApiProblem, Unreachable."""
        found = await self._batcher.put(make_spec(type, payload, options))
        return (
            AsyncTaskHandle(self._client, found)
            if isinstance(found, str)
            else AsyncTaskHandle(self._client, found.id, found)
        )

    async def _submit_batch(self, specs: list[TaskSpec]) -> list[TaskView | str | BaseException]:
        if len(specs) == 1:
            view = await self._client.do(calls.submit(specs[0]))
            return [view]
        found: list[TaskView | str | BaseException] = []
        for batch in batches(encode_json(spec) for spec in specs):
            try:
                answers = await self._client.do(calls.submit_batch(batch))
                found += answers
            except (ApiProblem, Unreachable) as error:
                found += [error] * len(batch)
        return found

    async def submit_many(self, specs: Sequence[TaskSpec]) -> list[AsyncTaskHandle | ApiProblem]:
        """Submit many tasks, each on its own: the answer has a handle or a problem for each, in order."""
        found: list[AsyncTaskHandle | ApiProblem] = []
        for batch in batches(encode_json(keyed(spec)) for spec in specs):
            answers = await self._client.do(calls.submit_batch(batch))
            found += [a if isinstance(a, ApiProblem) else AsyncTaskHandle(self._client, a) for a in answers]
        return found

    async def run(
        self,
        type: str,
        payload: object = None,
        *,
        wait: float | None = None,
        result_type: Any = Any,
        **options: Unpack[SubmitOptions],
    ) -> Any:
        """Submit a task and return its result: one request when it ends within a minute. See `Tasks.run`."""
        began = _clock()
        view = await self._client.do(
            calls.submit(make_spec(type, payload, options), calls.SERVER_WAIT_LIMIT if wait is None else wait)
        )
        left = None if wait is None else max(0.0, wait - (_clock() - began))
        return await AsyncTaskHandle(self._client, view.id, view).result(left, result_type)

    async def get(self, task_id: str) -> TaskView:
        """Read a task, payload and result included."""
        return await self._client.do(calls.get_task(task_id))

    def handle(self, task_id: str) -> AsyncTaskHandle:
        """Return a handle for a known id, without asking the server."""
        return AsyncTaskHandle(self._client, task_id)

    async def list(self, **filters: Any) -> list[TaskView]:
        """Return the first page; filters are `state`, `type`, `run`, `group`, `agent`, `label` (mapping), `limit`, `order`."""
        return (await self._client.do(calls.list_tasks(**filters))).items

    def iter(self, **filters: Any) -> AsyncIterator[TaskView]:
        """Yield all tasks that match; filters as for `list`."""
        return self._client.pages(lambda cursor: calls.list_tasks(cursor=cursor, **filters))

    async def explain(self, task_id: str) -> Explanation:
        """Say why a task is not running."""
        return await self._client.do(calls.explain(task_id))
