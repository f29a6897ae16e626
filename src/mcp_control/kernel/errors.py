"""Every error the product tells its callers, in one tree; each has a stable code that programs may rely on.

    Problem
    ├── cannot be parsed (400)  MalformedJson TooDeep DuplicateKey UnknownParameter InvalidCursor TokenInUrl IdempotencyKeyInvalid
    ├── who and may (401, 403)  Unauthenticated InvalidToken Forbidden AgentSuspended PasswordChangeRequired
    ├── not there (404, 405, 406, 410)  NotFound MethodNotAllowed NotAcceptable CursorExpired
    ├── conflicts (409, 412, 428)  Conflict Duplicate LeaseSuperseded AlreadyTerminal InvalidTransition InProgress NameTaken
    │                              PipelineInUse SelectionTooLarge VersionConflict PreconditionRequired BudgetExhausted
    │                              PayloadRemoved
    ├── size and type (408, 413, 415)  BodyTimeout PayloadTooLarge UnsupportedMediaType
    ├── parsed but invalid (422)  Invalid IdempotencyMismatch Unroutable InvalidPipeline InvalidSchedule GateFailed
    └── not now (429, 503)  RateLimited Overloaded StorageFull StoreUnavailable OutcomeUnknown

The wire form is a problem document (RFC 9457); `api/problem.py` writes it. A 4xx changed nothing. `OutcomeUnknown` means what it
says: the caller repeats with the same idempotency key.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec


class FieldError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing wrong with one place of the input. `pointer` is a JSON pointer with a leading `#` (RFC 6901).

    `line` and `column`, from 1, are told where the input was a text that people write.
    """

    pointer: str
    code: str
    detail: str
    line: int | None = None
    column: int | None = None


class Problem(Exception):
    """The base of all errors a caller may see."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str | None = None,
        *,
        errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
        **data: object,
    ) -> None:
        """Keep what a handler or reader needs.

        Args:
            detail: one sentence for a person, without any secret or submitted value that may be one.
            errors: what is wrong, place by place.
            retry_after: seconds after which a repetition makes sense.
            data: further members of the problem document, e.g. `state="completed"`.
        """
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.errors = tuple(errors)
        self.retry_after = retry_after
        self.data = data


class MalformedJson(Problem):
    """The body is not the JSON text that RFC 8259 and the limits of this product allow."""

    code, status, title = "malformed-json", 400, "Malformed JSON"


class TooDeep(Problem):
    """JSON nested deeper than 32 levels."""

    code, status, title = "too-deep", 400, "JSON is nested too deeply"


class DuplicateKey(Problem):
    """An object names a key twice where that could hide something."""

    code, status, title = "duplicate-key", 400, "Duplicate key"


class UnknownParameter(Problem):
    """A query parameter, filter or sort order that the route does not know."""

    code, status, title = "unknown-parameter", 400, "Unknown parameter"


class InvalidCursor(Problem):
    """A cursor that this route did not hand out."""

    code, status, title = "invalid-cursor", 400, "Invalid cursor"


class TokenInUrl(Problem):
    """A credential in the query string, where logs and histories would keep it."""

    code, status, title = "token-in-url", 400, "Credential in the URL"


class IdempotencyKeyInvalid(Problem):
    """An idempotency key that is empty, longer than 255 characters or not printable."""

    code, status, title = "idempotency-key-invalid", 400, "Invalid idempotency key"


class Unauthenticated(Problem):
    """No credential was given."""

    code, status, title = "unauthenticated", 401, "Authentication required"


class InvalidToken(Problem):
    """The credential is unknown, expired, revoked or of the wrong kind; the answer never says which."""

    code, status, title = "invalid-token", 401, "Invalid credential"


class Forbidden(Problem):
    """The actor is known and may not do this."""

    code, status, title = "forbidden", 403, "Forbidden"


class AgentSuspended(Problem):
    """The agent is retired or quarantined and gets no work."""

    code, status, title = "agent-suspended", 403, "Agent suspended"


class PasswordChangeRequired(Problem):
    """The first password was meant for one use; a new one must be set before anything else."""

    code, status, title = "password-change-required", 403, "Password change required"


class NotFound(Problem):
    """There is no such thing, or not for this actor; both read the same."""

    code, status, title = "not-found", 404, "Not found"


class MethodNotAllowed(Problem):
    """The path exists, the method does not."""

    code, status, title = "method-not-allowed", 405, "Method not allowed"


class NotAcceptable(Problem):
    """None of the media types the caller accepts is one this route writes."""

    code, status, title = "not-acceptable", 406, "Not acceptable"


class BodyTimeout(Problem):
    """The request body stalled."""

    code, status, title, retryable = "request-timeout", 408, "Request timeout", True


class Conflict(Problem):
    """Somebody else changed the thing first. Raised by stores; services reload and decide again."""

    code, status, title, retryable = "conflict", 409, "Conflict", True


class Duplicate(Conflict):
    """A unique index already holds this value; `index` and `existing` (the id that holds it) are in `data`."""

    code, status, title, retryable = "duplicate", 409, "Already exists", False


class NameTaken(Problem):
    """The name belongs to another identity."""

    code, status, title = "name-taken", 409, "Name taken"


class NotUnique(Problem):
    """Another task has the key that only one may have at a time; `existing` in `data` is its id."""

    code, status, title = "not-unique", 409, "A task with this key is there already"


class LeaseSuperseded(Problem):
    """The lease this call presents is not the live one; nothing was changed."""

    code, status, title = "lease-superseded", 409, "Lease superseded"


class AlreadyTerminal(Problem):
    """The task already has its final result, and it differs from this one."""

    code, status, title = "already-terminal", 409, "Already finished"


class InvalidTransition(Problem):
    """The thing is in a state from which this verb does not lead on; `state` and `allowed` are in `data`."""

    code, status, title = "invalid-transition", 409, "Invalid transition"


class PipelineInUse(Problem):
    """A run that has not ended, or a schedule, uses this pipeline or version; `runs` and `schedules` in `data` name some of them."""

    code, status, title = "pipeline-in-use", 409, "Pipeline in use"


class BudgetExhausted(Problem):
    """A limit of a budget is used up; `limit`, `used`, `allowed` and `owner` (the task or run whose budget it is) are in `data`."""

    code, status, title = "budget-exhausted", 409, "Budget exhausted"


class PayloadRemoved(Problem):
    """The payload of this finished task is not kept any more; `removed_at` in `data` says since when."""

    code, status, title = "payload-removed", 409, "Payload removed"


class SelectionTooLarge(Problem):
    """More tasks match than the caller expected; `expected_at_most` in `data` repeats the number, `first` names some."""

    code, status, title = "selection-too-large", 409, "More tasks match than expected"


class InProgress(Problem):
    """The first request with this idempotency key is still running."""

    code, status, title, retryable = "in-progress", 409, "Request in progress", True


class CursorExpired(Problem):
    """The events after this cursor are no longer kept; read the current state and start anew."""

    code, status, title = "cursor-expired", 410, "Cursor expired"


class VersionConflict(Problem):
    """`If-Match` names an older version than the current one."""

    code, status, title = "version-conflict", 412, "Version conflict"


class PayloadTooLarge(Problem):
    """The body or the result is over its limit."""

    code, status, title = "payload-too-large", 413, "Payload too large"


class UnsupportedMediaType(Problem):
    """The route reads another media type, or does not decode this content encoding."""

    code, status, title = "unsupported-media-type", 415, "Unsupported media type"


class Invalid(Problem):
    """The input was parsed and is invalid. The code is that of its first error: `wrong-type`, `unknown-field`, `out-of-range` …"""

    code, status, title = "invalid", 422, "Invalid input"


class IdempotencyMismatch(Problem):
    """The idempotency key was used before with another request."""

    code, status, title = "idempotency-mismatch", 422, "Idempotency key reused"


class Unroutable(Problem):
    """No registered agent can ever take this task, and the caller asked to be told at submit."""

    code, status, title = "unroutable", 422, "No agent can take this task"


class InvalidPipeline(Problem):
    """The definition cannot be accepted; the first error's code says why (`dag-cycle`, `dag-unknown-node` …)."""

    code, status, title = "invalid-pipeline", 422, "Invalid pipeline"


class InvalidSchedule(Problem):
    """No moment can be found at which the schedule would fire: the time, the zone or the interval is none, or it lies in the past."""

    code, status, title = "invalid-schedule", 422, "Invalid schedule"


class PreconditionRequired(Problem):
    """An edit needs `If-Match` with the version it was based on."""

    code, status, title = "precondition-required", 428, "Precondition required"


class RateLimited(Problem):
    """Too many requests from this caller."""

    code, status, title, retryable = "rate-limited", 429, "Too many requests", True


class Throttled(Problem):
    """The task is over a rate that drops what is too much; it was not accepted. `key` in `data` names the rate."""

    code, status, title = "throttled", 429, "Over the rate, dropped"


class Overloaded(Problem):
    """The server sheds new work to keep what it has accepted moving."""

    code, status, title, retryable = "overloaded", 503, "Overloaded", True


class StorageFull(Problem):
    """The disk is full: reads work, writes do not until there is space."""

    code, status, title, retryable = "storage-full", 503, "Storage full", True


class StoreUnavailable(Problem):
    """The store cannot be reached; nothing was changed."""

    code, status, title, retryable = "store-unavailable", 503, "Store unavailable", True


class OutcomeUnknown(Problem):
    """The store did not confirm: the change may have happened. Repeat with the same idempotency key, or read."""

    code, status, title, retryable = "outcome-unknown", 503, "Outcome unknown", True


def field_error(pointer: str, code: str, detail: str) -> Invalid:
    """Return the error for one wrong place of the input."""
    return Invalid(detail, errors=(FieldError(pointer=pointer, code=code, detail=detail),))
