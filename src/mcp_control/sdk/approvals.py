"""The inbox as a client reads and answers it, signals to runs, and runs over what another set aside."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mcp_control.kernel.paging import Page
from mcp_control.pipelines.input_model import ApprovalView, SignalView
from mcp_control.pipelines.view_model import RunView
from mcp_control.sdk.calls import Flow, Request, query
from mcp_control.sdk.submission import encode_json, fresh_key
from mcp_control.sdk.transport import Call

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client


def get(approval_id: str) -> Request[ApprovalView]:
    """Read a question."""
    call = Call(path=f"/approvals/{quote(approval_id, safe='')}", repeatable=True)
    return Request(call, lambda reply: reply.json(ApprovalView))


def listed(**filters: object) -> Request[Page[ApprovalView]]:
    """Read a page of questions."""
    call = Call(path="/approvals", params=query(filters), repeatable=True)
    return Request(call, lambda reply: reply.json(Page[ApprovalView]))


def answer(approval_id: str, body: Mapping[str, Any], etag: str | None) -> Flow[ApprovalView]:
    """Answer a question at the version given, or at the one it has."""
    if etag is None:
        etag = (yield get(approval_id)).etag
    call = Call(
        method="POST",
        path=f"/approvals/{quote(approval_id, safe='')}/answer",
        body=encode_json({name: value for name, value in body.items() if value}),
        headers=(("If-Match", f'"{etag}"'),),
    )
    answered: ApprovalView = yield Request(call, lambda reply: reply.json(ApprovalView))
    return answered


def signal(run_id: str, name: str, body: object, key: str | None) -> Request[SignalView]:
    """Send a signal; a fresh key makes the request repeatable."""
    call = Call(
        method="POST",
        path=f"/runs/{quote(run_id, safe='')}/signals/{quote(name, safe='')}",
        body=encode_json({"body": body, "idempotency_key": key or fresh_key()}),
        repeatable=True,
    )
    return Request(call, lambda reply: reply.json(SignalView))


def signals(run_id: str) -> Request[Page[SignalView]]:
    """Read the signals a run got."""
    call = Call(path=f"/runs/{quote(run_id, safe='')}/signals", repeatable=True)
    return Request(call, lambda reply: reply.json(Page[SignalView]))


def rerun_rejected(
    run_id: str, fixed: str | None, params: Mapping[str, Any] | None, key: str | None
) -> Request[RunView]:
    """Start a run over what another set aside; a fresh key makes the request repeatable."""
    call = Call(
        method="POST",
        path=f"/runs/{quote(run_id, safe='')}/rerun-rejected",
        body=encode_json({"fixed": fixed, "params": params or {}, "idempotency_key": key or fresh_key()}),
        repeatable=True,
    )
    return Request(call, lambda reply: reply.json(RunView))


class Approvals:
    """`client.approvals`: the inbox."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def iter(self, **filters: Any) -> Iterator[ApprovalView]:
        """Yield questions, newest first; filters are `state`, `run`, `mine`."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    def get(self, approval_id: str) -> ApprovalView:
        """Read a question."""
        return self._client.do(get(approval_id))

    def answer(
        self,
        approval_id: str,
        option: str,
        *,
        fields: Mapping[str, Any] | None = None,
        comment: str = "",
        etag: str | None = None,
    ) -> ApprovalView:
        """Answer a question with one of its options; with `etag` only as long as it is as it was read.

        Raises:
            Conflicting: it is closed, or changed.
            InvalidRequest: the option or the fields.
        """
        body = {"option": option, "fields": fields, "comment": comment}
        return self._client.drive(answer(approval_id, body, etag))


class AsyncApprovals:
    """`client.approvals` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    def iter(self, **filters: Any) -> AsyncIterator[ApprovalView]:
        """Yield questions, newest first; filters are `state`, `run`, `mine`."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))

    async def get(self, approval_id: str) -> ApprovalView:
        """Read a question."""
        return await self._client.do(get(approval_id))

    async def answer(
        self,
        approval_id: str,
        option: str,
        *,
        fields: Mapping[str, Any] | None = None,
        comment: str = "",
        etag: str | None = None,
    ) -> ApprovalView:
        """Answer a question with one of its options; with `etag` only as long as it is as it was read.

        The errors are those of `Approvals.answer`.
        """
        body = {"option": option, "fields": fields, "comment": comment}
        return await self._client.drive(answer(approval_id, body, etag))
