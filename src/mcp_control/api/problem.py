"""Problem documents (RFC 9457): the one wire form of every error."""

from typing import Final

import msgspec

from mcp_control.kernel.errors import FieldError, Invalid, InvalidPipeline, Problem

MEDIA_TYPE: Final = b"application/problem+json"
URN: Final = "urn:mcp-control:problem:"
MAX_ERRORS: Final = 50
_RESERVED: Final = frozenset({"type", "title", "status", "detail", "code", "instance", "retryable", "errors"})
_encode: Final = msgspec.json.Encoder(enc_hook=str).encode


class Internal(Problem):
    """A bug of the server. The log has the rest, under the request id."""

    code, status, title = "internal", 500, "Internal error"


class ProblemDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as callers see it; some problems have further members that their code explains."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str
    retryable: bool
    errors: list[FieldError] = []


def code_of(problem: Problem) -> str:
    """Return the stable code: for invalid input, that of its first error."""
    if problem.errors and isinstance(problem, (Invalid, InvalidPipeline)):
        return problem.errors[0].code
    return problem.code


def document(problem: Problem, request_id: str) -> dict[str, object]:
    """Return the problem document as a JSON-able object."""
    code = code_of(problem)
    body: dict[str, object] = {
        "type": URN + code,
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": code,
        "instance": f"urn:request:{request_id}",
        "retryable": problem.retryable,
    }
    if problem.errors:
        body["errors"] = problem.errors[:MAX_ERRORS]
    body |= {name: value for name, value in problem.data.items() if name not in _RESERVED}
    return body


def problem_bytes(problem: Problem, request_id: str) -> bytes:
    """Return the encoded problem document."""
    return _encode(document(problem, request_id))


def problem_headers(problem: Problem) -> list[tuple[bytes, bytes]]:
    """Return the headers a problem brings with it: when to come back, how to authenticate, whether the connection ends."""
    headers = [(b"content-type", MEDIA_TYPE)]
    if problem.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(problem.retry_after))))
    elif problem.status in (429, 503):
        headers.append((b"retry-after", b"1"))
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if problem.status in (408, 413):
        headers.append((b"connection", b"close"))
    return headers
