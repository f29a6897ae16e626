"""Every request of the API, as data: what to send and what type the answer has. The clients only carry them out."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import msgspec

from mcp_control.agents.model import AgentView
from mcp_control.artifacts.model import ArtifactView
from mcp_control.events.model import Event
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.model import RUN_FINAL
from mcp_control.pipelines.view_model import RunExplanation, RunView, StageExplanation
from mcp_control.sdk.errors import ApiProblem, WaitTimeout, problem_from
from mcp_control.sdk.submission import batch_body, encode_json
from mcp_control.sdk.transport import Call, Reply
from mcp_control.tasks.budget_model import BudgetEdit, BudgetView, SpendAnswer, Spent
from mcp_control.tasks.model import FINAL_STATES, LogLine, TaskSpec
from mcp_control.tasks.view_model import Explanation, StatisticView, TaskView

T = TypeVar("T")
LONG_POLL_SECONDS: Final = 30.0
SERVER_WAIT_LIMIT: Final = 60.0


class Request(msgspec.Struct, Generic[T], frozen=True):
    """A call and how to read its answer."""

    call: Call
    read: Callable[[Reply], T]


Flow = Generator[Request[T], T, T]


class LogPage(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a task; `next` is the number to go on from, `final` says that none will come after these."""

    lines: list[LogLine]
    next: int
    final: bool = False


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """Where an artifact's bytes are on the server's machine; no path where it has none."""

    path: str | None = None
    sha256: str
    size: int


class EnrolmentToken(msgspec.Struct, frozen=True, kw_only=True):
    """A one-time token for an agent."""

    token: str
    expires_at: str


class EventPage(msgspec.Struct, frozen=True, kw_only=True):
    """Events after a cursor, and the cursor after them."""

    items: list[Event]
    next: str | None = None


class _BatchItem(msgspec.Struct, frozen=True):
    id: str = ""
    state: str = ""
    problem: msgspec.Raw = msgspec.Raw(b"")


class _Batch(msgspec.Struct, frozen=True):
    items: list[_BatchItem]


def _get(type: Any, path: str, params: Mapping[str, object] | None = None, timeout: float = 30.0) -> Request[Any]:
    return Request(Call(path=path, params=query(params or {}), timeout=timeout), lambda reply: reply.json(type))


def _post(type: Any, path: str, body: object = None, *, repeatable: bool = False, **params: object) -> Request[Any]:
    call = Call(
        method="POST",
        path=path,
        params=query(params),
        body=b"{}" if body is None else encode_json(body),
        repeatable=repeatable,
    )
    return Request(call, lambda reply: reply.json(type))


def query(params: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Return query parameters: None is left out, a list repeats its name, a mapping gives `key:value`, true and false are lower-case."""
    found: list[tuple[str, str]] = []
    for name, value in params.items():
        if value is None:
            continue
        values: Iterable[object]
        if isinstance(value, Mapping):
            values = [f"{key}:{item}" for key, item in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            values = value
        else:
            values = [value]
        found.extend((name, str(item).lower() if isinstance(item, bool) else str(item)) for item in values)
    return tuple(found)


def _seg(text: str) -> str:
    return quote(text, safe="")


# --- tasks ---


def submit(spec: TaskSpec, wait: float | None = None) -> Request[TaskView]:
    """Submit one task; with `wait`, answer when it is final or after so many seconds."""
    seconds = None if wait is None else min(wait, SERVER_WAIT_LIMIT)
    call = Call(
        method="POST",
        path="/tasks",
        params=query({"wait": seconds}),
        body=encode_json(spec),
        repeatable=spec.idempotency_key is not None,
        timeout=30.0 + (seconds or 0.0),
    )
    return Request(call, lambda reply: reply.json(TaskView))


def submit_batch(encoded: Sequence[bytes]) -> Request[list[str | ApiProblem]]:
    """Submit encoded specs, all with idempotency keys; the answer has an id or a problem for each, in order."""
    call = Call(method="POST", path="/tasks/batch", body=batch_body(encoded), repeatable=True, timeout=60.0)
    return Request(call, _read_batch)


def _read_batch(reply: Reply) -> list[str | ApiProblem]:
    batch: _Batch = reply.json(_Batch)
    return [item.id or problem_from(_status(item.problem), bytes(item.problem)) for item in batch.items]


def _status(problem: msgspec.Raw) -> int:
    status = msgspec.json.decode(problem).get("status", 422)
    return status if isinstance(status, int) else 422


def get_task(task_id: str, wait: float | None = None) -> Request[TaskView]:
    """Read a task, payload and result included; with `wait`, when it is final or after so many seconds."""
    return _get(TaskView, f"/tasks/{_seg(task_id)}", {"wait": wait}, 30.0 + (wait or 0.0))


def get_tasks(task_ids: Sequence[str]) -> Request[list[TaskView | None]]:
    """Read up to 1,000 tasks with their results; None for unknown ones."""
    call = Call(method="POST", path="/tasks/get", body=encode_json({"ids": list(task_ids)}), repeatable=True)
    return Request(call, lambda reply: reply.json(dict[str, list[TaskView | None]])["items"])


def list_tasks(**filters: object) -> Request[Page[TaskView]]:
    """Read a page of tasks."""
    return _get(Page[TaskView], "/tasks", filters)


def task_verb(task_id: str, verb: str, **body: object) -> Request[TaskView]:
    """Cancel, pause, resume, retry or assign a task."""
    return _post(
        TaskView,
        f"/tasks/{_seg(task_id)}/{verb}",
        {k: v for k, v in body.items() if v is not None},
        repeatable=verb in ("cancel", "pause", "resume"),
    )


def report_usage(task_id: str, lease_token: str, spent: Spent) -> Request[SpendAnswer]:
    """Tell what an attempt has used in all, and hold what it asks for; repeating it changes nothing."""
    body = {"lease_token": lease_token, "spent": spent}
    return _post(SpendAnswer, f"/tasks/{_seg(task_id)}/usage", body, repeatable=True)


def get_budget(owner: str) -> Request[BudgetView]:
    """Read the budget of a task or run."""
    return _get(BudgetView, f"/{_noun(owner)}/{_seg(owner)}/budget")


def edit_budget(owner: str, edit: BudgetEdit) -> Request[BudgetView]:
    """Set or raise limits of a task or run."""
    call = Call(method="PATCH", path=f"/{_noun(owner)}/{_seg(owner)}/budget", body=encode_json(edit))
    return Request(call, lambda reply: reply.json(BudgetView))


def refuse_budget(task_id: str) -> Request[TaskView]:
    """Say no to a task that asked for more."""
    return _post(TaskView, f"/tasks/{_seg(task_id)}/budget/refuse")


def _noun(owner: str) -> str:
    return "runs" if owner.startswith("run_") else "tasks"


def explain(task_id: str) -> Request[Explanation]:
    """Say why a task is not running."""
    return _get(Explanation, f"/tasks/{_seg(task_id)}/explain")


def logs(task_id: str, after: int = 0, limit: int | None = None, wait: float | None = None) -> Request[LogPage]:
    """Read log lines from number `after` on; with `wait`, when there are some, or none will come."""
    return _get(
        LogPage, f"/tasks/{_seg(task_id)}/logs", {"after": after, "limit": limit, "wait": wait}, 30.0 + (wait or 0.0)
    )


# --- runs ---


def get_run(run_id: str, wait: float | None = None) -> Request[RunView]:
    """Read a run; with `wait`, when it is final or after so many seconds."""
    return _get(RunView, f"/runs/{_seg(run_id)}", {"wait": wait}, 30.0 + (wait or 0.0))


def list_runs(**filters: object) -> Request[Page[RunView]]:
    """Read a page of runs."""
    return _get(Page[RunView], "/runs", filters)


def run_verb(run_id: str, verb: str, **body: object) -> Request[RunView]:
    """Pause, resume, cancel or retry a run."""
    return _post(
        RunView,
        f"/runs/{_seg(run_id)}/{verb}",
        {k: v for k, v in body.items() if v is not None},
        repeatable=verb != "retry",
    )


def run_tasks(run_id: str, **filters: object) -> Request[Page[TaskView]]:
    """Read a page of a run's tasks."""
    return _get(Page[TaskView], f"/runs/{_seg(run_id)}/tasks", filters)


def run_artifacts(run_id: str, **filters: object) -> Request[Page[ArtifactView]]:
    """Read a page of a run's artifacts."""
    return _get(Page[ArtifactView], f"/runs/{_seg(run_id)}/artifacts", filters)


def explain_run(run_id: str) -> Request[RunExplanation]:
    """Ask why a run is not further."""
    return _get(RunExplanation, f"/runs/{_seg(run_id)}/explain")


def explain_stage(run_id: str, stage: str) -> Request[StageExplanation]:
    """Ask why a stage is not further."""
    return _get(StageExplanation, f"/runs/{_seg(run_id)}/stages/{_seg(stage)}/explain")


def stage_output(run_id: str, stage: str) -> Request[Any]:
    """Read the output of a stage."""
    return _get(Any, f"/runs/{_seg(run_id)}/stages/{_seg(stage)}/output")


# --- artifacts ---


def upload_call(
    fields: Mapping[str, object], lease_token: str | None = None, digest: str | None = None, *, repeatable: bool = False
) -> Call:
    """Return the call of an upload; its body is a stream. `digest` is a Content-Digest header (RFC 9530).

    `repeatable`: the stream can be had again. The server keeps equal bytes once, so sending them twice is harmless.
    """
    headers = [("Content-Type", "application/octet-stream")]
    if lease_token:
        headers.append(("X-Lease-Token", lease_token))
    if digest:
        headers.append(("Content-Digest", digest))
    return Call(
        method="POST",
        path="/artifacts",
        params=query(fields),
        headers=tuple(headers),
        timeout=300.0,
        repeatable=repeatable,
    )


def get_artifact(artifact_id: str) -> Request[ArtifactView]:
    """Read what is known of an artifact."""
    return _get(ArtifactView, f"/artifacts/{_seg(artifact_id)}")


def list_artifacts(**filters: object) -> Request[Page[ArtifactView]]:
    """Read a page of artifacts."""
    return _get(Page[ArtifactView], "/artifacts", filters)


def artifact_location(artifact_id: str) -> Request[Location]:
    """Ask where the bytes are on the server's machine."""
    return _get(Location, f"/artifacts/{_seg(artifact_id)}/location")


def content_call(artifact_id: str, offset: int) -> Call:
    """Return the call that streams an artifact's bytes from `offset` on."""
    headers = (("Accept-Encoding", "identity"), *([("Range", f"bytes={offset}-")] if offset else []))
    return Call(path=f"/artifacts/{_seg(artifact_id)}/content", headers=headers, timeout=60.0)


def delete_artifact(artifact_id: str) -> Request[None]:
    """Delete an artifact."""
    return Request(Call(method="DELETE", path=f"/artifacts/{_seg(artifact_id)}"), lambda reply: None)


# --- agents, events, system ---


def get_agent(name: str) -> Request[AgentView]:
    """Read an agent by id or name."""
    return _get(AgentView, f"/agents/{_seg(name)}")


def list_agents(**filters: object) -> Request[Page[AgentView]]:
    """Read a page of agents."""
    return _get(Page[AgentView], "/agents", filters)


def agent_verb(name: str, verb: str, note: str | None = None) -> Request[AgentView]:
    """Drain, resume, quarantine or retire an agent."""
    return _post(AgentView, f"/agents/{_seg(name)}/{verb}", {"note": note} if note else {}, repeatable=True)


def enrolment_token(**fields: object) -> Request[EnrolmentToken]:
    """Make a one-time token for an agent."""
    return _post(EnrolmentToken, "/agents/enrolment-tokens", {k: v for k, v in fields.items() if v is not None})


def events_page(**filters: object) -> Request[EventPage]:
    """Read events after a cursor."""
    return _get(EventPage, "/events", filters)


def events_call(types: Sequence[str], subject: str | None, run: str | None, after: str | None) -> Call:
    """Return the call of an event stream (SSE)."""
    headers = [("Accept", "text/event-stream")]
    if after:
        headers.append(("Last-Event-ID", after))
    params = query({"type": list(types), "subject": subject, "run": run})
    return Call(path="/events", params=params, headers=tuple(headers), timeout=60.0)


def statistics(**filters: object) -> Request[Page[StatisticView]]:
    """Read a page of what is known of task types."""
    return _get(Page[StatisticView], "/tasks/statistics", filters)


def status() -> Request[dict[str, Any]]:
    """Read the server's state."""
    return _get(dict[str, Any], "/status")


# --- flows: several requests, driven by either client ---


def task_until_final(
    task_id: str, timeout: float | None, clock: Callable[[], float], known: TaskView | None = None
) -> Flow[TaskView]:
    """Wait for the end of a task. Raises WaitTimeout."""
    return _until_final(
        lambda wait: get_task(task_id, wait),
        lambda view: view.state in FINAL_STATES,
        timeout,
        clock,
        known,
        f"task {task_id}",
    )


def run_until_final(run_id: str, timeout: float | None, clock: Callable[[], float]) -> Flow[RunView]:
    """Wait for the end of a run. Raises WaitTimeout."""
    return _until_final(
        lambda wait: get_run(run_id, wait), lambda view: view.state in RUN_FINAL, timeout, clock, None, f"run {run_id}"
    )


def _until_final(
    ask: Callable[[float], Request[T]],
    final: Callable[[T], bool],
    timeout: float | None,
    clock: Callable[[], float],
    known: T | None,
    what: str,
) -> Flow[T]:
    if known is not None and final(known):
        return known
    ends_at = None if timeout is None else clock() + timeout
    while True:
        left = LONG_POLL_SECONDS if ends_at is None else ends_at - clock()
        view = yield ask(max(0.0, min(left, LONG_POLL_SECONDS)))
        if final(view):
            return view
        if ends_at is not None and clock() >= ends_at:
            raise WaitTimeout(f"{what} has not ended after {timeout:g} seconds")
