"""Everything the SDK raises, and what a handler raises to say how its attempt ended.

SdkError
├── Unreachable        no answer: refused, reset, timed out
├── ApiProblem         the server's problem document (RFC 9457)
│   ├── AccessDenied (401, 403)  Missing (404, 410)  Conflicting (409, 412, 428)
│   ├── InvalidRequest (400, 413, 415, 422)  NotNow (429, 503)
├── TaskFailed         a task ended in another state than `completed`
├── RunFailed          a run ended in another state than `completed`
├── WaitTimeout        it has not ended in the time given; nothing was cancelled
├── DigestMismatch     a downloaded artifact does not have the bytes it should have
└── TaskAborted        raised inside handlers
    ├── Temporary  Permanent  Critical    the attempt failed, with this error class
    │   └── Unavailable                    Temporary: later, at no cost
    └── Cancelled                          the attempt stopped because it was told to
"""

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from mcp_control.pipelines.view_model import RunView
    from mcp_control.tasks.model import ErrorClass, Failure
from mcp_control.tasks.view_model import TaskView


class SdkError(Exception):
    """The base of everything the SDK raises."""


class Unreachable(SdkError):
    """The server gave no answer; whether the request took effect is unknown unless it carried an idempotency key."""


class ProblemDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The members of a problem document that the SDK reads."""

    code: str = "unknown"
    title: str = ""
    status: int = 0
    detail: str = ""
    instance: str = ""
    retryable: bool = False
    errors: list[dict[str, Any]] = []
    task_id: str = ""


class ApiProblem(SdkError):
    """The server refused a request.

    Attributes:
        code: stable code, e.g. `lease-superseded`.
        status: HTTP status.
        detail: one sentence for a person.
        request_id: names the request in the server's log.
        retryable: whether repeating the request as it is may succeed.
        retry_after: seconds to wait before that, None where the server did not say.
        errors: what is wrong, place by place (`pointer`, `code`, `detail`).
        task_id: the task it is about, where the server named one.
    """

    def __init__(self, document: ProblemDocument, request_id: str = "", retry_after: float | None = None) -> None:
        self.code = document.code
        self.status = document.status
        self.detail = document.detail or document.title
        self.request_id = request_id or document.instance.removeprefix("urn:request:")
        self.retryable = document.retryable
        self.retry_after = retry_after
        self.errors = document.errors
        self.task_id = document.task_id
        places = "".join(
            f"\n  {e.get('pointer', '')}: {e.get('detail', '')} [{e.get('code', '')}]" for e in self.errors
        )
        request = f" (request {self.request_id})" if self.request_id else ""
        super().__init__(f"{self.status} {self.code}: {self.detail}{request}{places}")


class AccessDenied(ApiProblem):
    """The credential is missing, not accepted, or may not do this (401, 403)."""


class Missing(ApiProblem):
    """There is no such thing, or no longer (404, 410)."""


class Conflicting(ApiProblem):
    """The request does not fit the state the thing is in (409, 412, 428)."""


class InvalidRequest(ApiProblem):
    """The request was not understood or not valid (400, 413, 415, 422)."""


class NotNow(ApiProblem):
    """The server asks for patience (429, 503)."""


_BY_STATUS: dict[int, type[ApiProblem]] = {
    401: AccessDenied,
    403: AccessDenied,
    404: Missing,
    410: Missing,
    409: Conflicting,
    412: Conflicting,
    428: Conflicting,
    400: InvalidRequest,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: NotNow,
    503: NotNow,
}


def problem_from(status: int, body: bytes, request_id: str = "", retry_after: float | None = None) -> ApiProblem:
    """Return the exception for an error answer; one without a problem document gets the code `http-<status>`."""
    try:
        document = msgspec.json.decode(body, type=ProblemDocument)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        document = ProblemDocument(code=f"http-{status}", detail=body[:200].decode("utf-8", "replace"))
    if document.status != status:
        document = msgspec.structs.replace(document, status=status)
    return _BY_STATUS.get(status, ApiProblem)(document, request_id, retry_after)


class TaskFailed(SdkError):
    """A task ended `failed`, `cancelled`, `expired` or `rejected`. The message carries the agent's traceback where there is one."""

    def __init__(self, task: "TaskView") -> None:
        self.task = task
        self.failure: Failure | None = task.failure
        code = self.failure.code if self.failure else task.reason
        message = self.failure.message if self.failure else task.message
        remote = (
            f"\n\nTraceback on the agent:\n{self.failure.traceback}" if self.failure and self.failure.traceback else ""
        )
        super().__init__(f"task {task.id} ({task.type}) is {task.state}: {code}: {message}{remote}")


class RunFailed(SdkError):
    """A run ended `failed` or `cancelled`; `run` has its stages and the reason."""

    def __init__(self, run: "RunView") -> None:
        self.run = run
        super().__init__(f"run {run.id} of {run.pipeline} is {run.state}: {run.reason}: {run.message}")


class WaitTimeout(SdkError, TimeoutError):
    """What was waited for has not ended in the time given. It goes on; nothing was cancelled."""


class DigestMismatch(SdkError):
    """The bytes of a downloaded artifact do not have its SHA-256; nothing was left at the target path."""


class TaskAborted(SdkError):
    """The base of what a handler raises to end its attempt."""

    error_class: "ErrorClass" = "temporary"
    code: str = "error"

    def __init__(self, message: str = "", *, code: str | None = None, data: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.data = data


class Temporary(TaskAborted):
    """It may work next time; the task is tried again under its retry policy."""


class Unavailable(Temporary):
    """What the handler needs is not to be had for a while, as while a breaker is open.

    The task is tried again after `retry_after` seconds, and the attempt costs none of the task's. Where only one is allowed, it fails.
    """

    code = "unavailable"

    def __init__(
        self,
        message: str = "",
        *,
        retry_after: float,
        code: str | None = None,
        data: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message, code=code, data=data)
        self.retry_after = retry_after


class Permanent(TaskAborted):
    """It will never work with this input; the task fails at once."""

    error_class = "permanent"


class Critical(TaskAborted):
    """Something is badly wrong beyond this task; it fails at once and people should look."""

    error_class = "critical"


class Cancelled(TaskAborted):
    """The attempt was told to stop: cancelled, or its lease is over. Raised by `Context.check()`."""

    code = "cancelled"
