"""Routes of `/tasks`."""

import asyncio
from typing import Annotated, Any, Final, Literal

import msgspec

from mcp_control.api.agents import labels_of
from mcp_control.api.call import JSON, Call, Reply, encode, invalid, reply, tagged
from mcp_control.api.decode import Body
from mcp_control.api.problem import ProblemDocument, document
from mcp_control.api.query import Limit, PageQuery, Query, WaitQuery, WaitSeconds
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.errors import IdempotencyKeyInvalid, NotFound, Problem, VersionConflict
from mcp_control.kernel.ids import is_id
from mcp_control.kernel.paging import Page
from mcp_control.tasks.control import TaskEdit
from mcp_control.tasks.listing import TaskFilter
from mcp_control.tasks.model import Task, TaskSpec, TaskState
from mcp_control.tasks.records import view
from mcp_control.tasks.service import Submitted
from mcp_control.tasks.view_model import Explanation, StatisticView, TaskView

BATCH_MAX: Final = 1000


class Batch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Many submissions; each is accepted or refused on its own."""

    tasks: Annotated[list[TaskSpec], msgspec.Meta(min_length=1, max_length=BATCH_MAX)]


class BatchItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one submission of a batch; `warnings` say e.g. that no registered agent can take it."""

    id: str | None = None
    state: TaskState | None = None
    warnings: list[str] = []
    problem: ProblemDocument | None = None


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One item per submission, in order."""

    items: list[BatchItem]


class Ids(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tasks to read at once."""

    ids: Annotated[list[str], msgspec.Meta(min_length=1, max_length=BATCH_MAX)]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks asked for, in order; null where there is none."""

    items: list[TaskView | None]


class Reason(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, for people."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class Nothing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No members."""


class Assign(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent that is to take the task: its id or its name."""

    agent: str


class NumberedLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line with its place in the task's log."""

    number: int
    at: int
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str
    fields: dict[str, object] | None = None
    attempt: int = 0


class LogPage(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a log; go on with `after=next`. `final` means that no more will come."""

    lines: list[NumberedLine]
    next: int
    final: bool


class Child(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task to be done for another one, and the lease under which the agent holds that."""

    lease_token: str
    task: TaskSpec


class TasksQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold."""

    state: TaskState | None = None
    type: str | None = None
    run: str | None = None
    group: str | None = None
    agent: str | None = None
    label: list[str] = msgspec.field(default_factory=list)
    order: Literal["asc", "desc"] = "desc"


class LogsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lines after a number, waiting for some where there are none."""

    after: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    limit: Limit = 500
    wait: WaitSeconds = 0.0


_SPEC: Final = Body(TaskSpec, envelope=1)
_CHILD: Final = Body(Child, envelope=2)
_BATCH: Final = Body(Batch, opaque=lambda batch: [bytes(spec.payload) for spec in batch.tasks])
_IDS: Final = Body(Ids)
_REASON: Final = Body(Reason, optional=True)
_NOTHING: Final = Body(Nothing, optional=True)
_ASSIGN: Final = Body(Assign)
_EDIT: Final = Body(TaskEdit)
_LIST: Final = Query(TasksQuery)
_LOGS: Final = Query(LogsQuery)
_WAIT: Final = Query(WaitQuery)
_COLD: Final = ("payload", "result")


def with_key(call: Call, value: Any) -> Any:
    """Return a TaskSpec or RunRequest with the Idempotency-Key of the header, where there is one."""
    header = call.headers.get(b"idempotency-key")
    if header is None:
        return value
    key = header.decode("latin-1")
    if not key or len(key) > 255:
        raise IdempotencyKeyInvalid("an Idempotency-Key has 1 to 255 characters")
    if value.idempotency_key not in (None, key):
        raise invalid("#/idempotency_key", "invalid-value", "header and body name different idempotency keys")
    return msgspec.structs.replace(value, idempotency_key=key)


def _shown(call: Call, task: Task) -> TaskView:
    return view(task, call.services.clock.now())


async def submit_task(call: Call) -> Reply:
    """Submit a task; durable when this answers. With `wait`, the answer comes when it is final or the time is over."""
    wait = call.query(_WAIT).wait
    spec = with_key(call, await call.decode(_SPEC))
    tasks = call.services.tasks
    with call.services.gate.entry(1):
        submitted = (await tasks.submit(call.actor, (spec,), call.origin))[0]
    if isinstance(submitted, Problem):
        raise submitted
    status = 201 if submitted.created else 200
    task = submitted.task
    if wait:
        await call.until_gone(tasks.wait(call.actor, task.id, wait))
        shown = await _one(call, task.id)
    elif submitted.created:
        shown = _shown(call, task)
    else:
        shown = await _one(call, task.id)
    if submitted.warnings:
        shown = msgspec.structs.replace(shown, warnings=submitted.warnings)
    return tagged(shown, shown.etag, status)


async def submit_child(call: Call) -> Reply:
    """Submit a task for one that the calling agent works on."""
    child = await call.decode(_CHILD)
    with call.services.gate.entry(1):
        submitted = await call.services.tasks.submit_child(
            call.actor, call.params["task_id"], child.lease_token, child.task, call.origin
        )
    shown = msgspec.structs.replace(_shown(call, submitted.task), warnings=submitted.warnings)
    return tagged(shown, shown.etag, 201 if submitted.created else 200)


async def _one(call: Call, task_id: str) -> TaskView:
    shown = (await call.services.tasks.get(call.actor, (task_id,), _COLD))[0]
    if shown is None:
        raise NotFound("there is no such task")
    return shown


async def submit_batch(call: Call) -> Reply:
    """Submit up to 1,000 tasks; each is accepted or refused on its own."""
    batch = await call.decode(_BATCH)
    with call.services.gate.entry(len(batch.tasks)):
        answers = await call.services.tasks.submit(call.actor, batch.tasks, call.origin)
    return Reply(200, encode({"items": [_item(answer, call.request_id) for answer in answers]}), (JSON,))


def _item(answer: Submitted | Problem, request_id: str) -> dict[str, object]:
    if isinstance(answer, Problem):
        return {"problem": document(answer, request_id)}
    item: dict[str, object] = {"id": answer.task.id, "state": answer.task.state}
    if answer.warnings:
        item["warnings"] = answer.warnings
    return item


async def read_tasks(call: Call) -> Reply:
    """Read up to 1,000 tasks by id, with their results."""
    ids = (await call.decode(_IDS)).ids
    wanted = [task_id for task_id in ids if is_id(task_id)]
    found = dict(zip(wanted, await call.services.tasks.get(call.actor, wanted, ("result",)), strict=True))
    return reply(Found(items=[found.get(task_id) for task_id in ids]))


async def list_tasks(call: Call) -> Reply:
    """List tasks, newest first unless asked otherwise."""
    query = call.query(_LIST)
    wanted = TaskFilter(
        state=query.state,
        type=query.type,
        run=query.run,
        group=query.group,
        agent=query.agent,
        labels=labels_of(query.label),
        oldest_first=query.order == "asc",
    )
    return reply(await call.services.tasks.list(call.actor, wanted, cursor=query.cursor, limit=query.limit))


async def get_task(call: Call) -> Reply:
    """Return a task with payload and result, waiting for its end when asked to."""
    wait = call.query(_WAIT).wait
    task_id = call.params["task_id"]
    if wait:
        await call.until_gone(call.services.tasks.wait(call.actor, task_id, wait))
    shown = await _one(call, task_id)
    return tagged(shown, shown.etag)


async def cancel_task(call: Call) -> Reply:
    """Cancel a task: a waiting one at once, a running one through its agent."""
    reason = (await call.decode(_REASON)).reason
    return reply(_shown(call, await call.services.steering.control.cancel(call.actor, call.params["task_id"], reason)))


async def pause_task(call: Call) -> Reply:
    """Hold a task back: no agent gets it until it is resumed; a running attempt goes on."""
    reason = (await call.decode(_REASON)).reason
    return reply(_shown(call, await call.services.steering.control.pause(call.actor, call.params["task_id"], reason)))


async def resume_task(call: Call) -> Reply:
    """Let a task go that was held back; it waits at its old place."""
    await call.decode(_NOTHING)
    return reply(_shown(call, await call.services.steering.control.resume(call.actor, call.params["task_id"])))


async def retry_task(call: Call) -> Reply:
    """Submit a finished task again, as a new task that names the old one."""
    await call.decode(_NOTHING)
    submitted = await call.services.steering.dead_letters.retry(call.actor, call.params["task_id"], call.origin)
    return reply(_shown(call, submitted.task), 201)


async def assign_task(call: Call) -> Reply:
    """Let only one agent take a waiting task."""
    agent = (await call.decode(_ASSIGN)).agent
    return reply(_shown(call, await call.services.steering.control.assign(call.actor, call.params["task_id"], agent)))


async def edit_task(call: Call) -> Reply:
    """Change priority or labels of a task that has not ended."""
    version = call.if_match()
    edit = await call.decode(_EDIT)
    if not version.isdigit():
        raise VersionConflict("If-Match does not name the current version")
    shown = _shown(
        call, await call.services.steering.control.edit(call.actor, call.params["task_id"], edit, int(version))
    )
    return tagged(shown, shown.etag)


async def explain_task(call: Call) -> Reply:
    """Say why a task is not running."""
    return reply(await call.services.tasks.explain(call.actor, call.params["task_id"]))


async def task_logs(call: Call) -> Reply:
    """Return lines of a task's log, waiting for some when asked to."""
    query = call.query(_LOGS)
    if query.wait:
        return await call.until_gone(_logs_within(call, query))
    return reply(await _logs(call, query))


async def _logs_within(call: Call, query: LogsQuery) -> Reply:
    task_id = call.params["task_id"]
    async with await call.services.broadcaster.subscribe(("task.*",), task_id, None, call.actor.tenant) as events:
        page = await _logs(call, query)
        try:
            async with asyncio.timeout(query.wait):
                while not page.lines and not page.final:
                    await anext(events)
                    page = await _logs(call, query)
        except TimeoutError:
            pass
    return reply(page)


async def _logs(call: Call, query: LogsQuery) -> LogPage:
    tasks = call.services.tasks
    # The state first: what was logged before the end is then surely among the lines.
    task = await tasks.one(call.actor, call.params["task_id"])
    lines = [
        NumberedLine(
            number=chunk.first + place,
            at=line.at,
            level=line.level,
            message=line.message,
            fields=line.fields,
            attempt=line.attempt,
        )
        for chunk in await tasks.logs(call.actor, task.id, query.after, query.limit)
        for place, line in enumerate(chunk.lines)
    ]
    following = lines[-1].number + 1 if lines else query.after
    return LogPage(lines=lines, next=following, final=task.final and following >= task.log_lines)


_EXAMPLE: Final = {"type": "echo", "payload": {"text": "hello"}, "priority": "high", "labels": {"team": "a"}}
_PAGE: Final = Query(PageQuery)


async def list_statistics(call: Call) -> Reply:
    """List how many tasks of each type completed and failed, and how long they took."""
    query = call.query(_PAGE)
    return reply(await call.services.history.list(call.actor, cursor=query.cursor, limit=query.limit))


ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/tasks/statistics", handler=list_statistics, summary="List times of task types", tag="tasks",
        query=_PAGE, returns=Page[StatisticView],
    ),
    Endpoint(
        method="POST", path="/tasks", handler=submit_task, summary="Submit a task", tag="tasks", weight="submit", body=_SPEC, query=_WAIT,
        returns=TaskView, status=201, statuses=(200,), example=_EXAMPLE,
    ),
    Endpoint(
        method="POST", path="/tasks/batch", handler=submit_batch, summary="Submit many tasks", tag="tasks", weight="submit", body=_BATCH,
        returns=BatchAnswer, example={"tasks": [_EXAMPLE, {"type": "echo"}]},
    ),
    Endpoint(
        method="POST", path="/tasks/get", handler=read_tasks, summary="Read many tasks", tag="tasks", body=_IDS, returns=Found,
        example={"ids": ["task_1"]},
    ),
    Endpoint(method="GET", path="/tasks", handler=list_tasks, summary="List tasks", tag="tasks", query=_LIST, returns=Page[TaskView]),
    Endpoint(method="GET", path="/tasks/{task_id}", handler=get_task, summary="Get a task", tag="tasks", query=_WAIT, returns=TaskView),
    Endpoint(
        method="PATCH", path="/tasks/{task_id}", handler=edit_task, summary="Edit a task", tag="tasks", body=_EDIT, returns=TaskView,
        example={"priority": 80},
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/cancel", handler=cancel_task, summary="Cancel a task", tag="tasks", body=_REASON,
        returns=TaskView, example={"reason": "wrong input"},
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/children", handler=submit_child, summary="Submit a task for a task", tag="tasks",
        weight="submit", body=_CHILD, returns=TaskView, status=201, statuses=(200,), example={"lease_token": "…", "task": _EXAMPLE},
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/pause", handler=pause_task, summary="Hold a task back", tag="tasks", body=_REASON,
        returns=TaskView, example={"reason": "the supplier is down"},
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/resume", handler=resume_task, summary="Let a task go", tag="tasks", body=_NOTHING,
        returns=TaskView,
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/retry", handler=retry_task, summary="Retry a finished task", tag="tasks", weight="submit",
        body=_NOTHING, returns=TaskView, status=201,
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/assign", handler=assign_task, summary="Assign a task by hand", tag="tasks", body=_ASSIGN,
        returns=TaskView, example={"agent": "worker-1"},
    ),
    Endpoint(
        method="GET", path="/tasks/{task_id}/explain", handler=explain_task, summary="Why is it not running?",
        tag="tasks", returns=Explanation,
    ),
    Endpoint(
        method="GET", path="/tasks/{task_id}/logs", handler=task_logs, summary="Read or follow the log", tag="tasks",
        query=_LOGS, returns=LogPage,
    ),
)  # fmt: skip
