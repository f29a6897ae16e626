"""Routes of `/approvals`, and of the signals of runs: what reaches a run from outside."""

from typing import Final

from mcp_control.api.call import Call, Reply, reply, tagged
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import with_key
from mcp_control.kernel.errors import VersionConflict
from mcp_control.kernel.paging import Page
from mcp_control.pipelines.input_model import AnswerRequest, ApprovalState, ApprovalView, SignalRequest, SignalView


class ApprovalsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold. `mine` are those that wait for the caller."""

    state: ApprovalState | None = None
    run: str | None = None
    mine: bool = False


_LIST: Final = Query(ApprovalsQuery)
_ANSWER: Final = Body(AnswerRequest, envelope=2)
_SIGNAL: Final = Body(SignalRequest, optional=True, envelope=1)


async def list_approvals(call: Call) -> Reply:
    """List questions to people, newest first: the inbox."""
    query = call.query(_LIST)
    return reply(
        await call.services.inputs.list(
            call.actor, state=query.state, run=query.run, mine=query.mine, cursor=query.cursor, limit=query.limit
        )
    )


async def get_approval(call: Call) -> Reply:
    """Return a question."""
    view = await call.services.inputs.get(call.actor, call.params["approval_id"])
    return tagged(view, view.etag)


async def answer_approval(call: Call) -> Reply:
    """Answer a question; its run or task goes on in the same commit. Of several answers one wins."""
    version = call.if_match()
    request = await call.decode(_ANSWER)
    if not version.isdigit():
        raise VersionConflict("If-Match does not name the current version")
    view = await call.services.inputs.answer(call.actor, call.params["approval_id"], request, int(version))
    return tagged(view, view.etag)


async def send_signal(call: Call) -> Reply:
    """Send a signal to a run; one that no stage waits for yet is kept. Repeated with the same key it is the same signal."""
    request = with_key(call, await call.decode(_SIGNAL))
    view, created = await call.services.inputs.signal(
        call.actor, call.params["run_id"], call.params["name"], bytes(request.body), request.idempotency_key
    )
    return reply(view, 201 if created else 200)


async def list_signals(call: Call) -> Reply:
    """List the signals a run got, the first one first."""
    return reply(Page(items=await call.services.inputs.signals(call.actor, call.params["run_id"])))


_ONE: Final = "/approvals/{approval_id}"
_SIGNALS: Final = "/runs/{run_id}/signals"

ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/approvals", handler=list_approvals, summary="List approvals", tag="approvals", query=_LIST,
        returns=Page[ApprovalView],
    ),
    Endpoint(method="GET", path=_ONE, handler=get_approval, summary="Get an approval", tag="approvals", returns=ApprovalView),
    Endpoint(
        method="POST", path=f"{_ONE}/answer", handler=answer_approval, summary="Answer an approval", tag="approvals", weight="submit",
        body=_ANSWER, returns=ApprovalView, example={"option": "approve", "comment": "checked with the customer"},
    ),
    Endpoint(
        method="POST", path=f"{_SIGNALS}/{{name:name}}", handler=send_signal, summary="Send a signal to a run", tag="runs",
        weight="submit", body=_SIGNAL, returns=SignalView, status=201, others={200: SignalView},
        example={"body": {"order": 7, "amount": 20}},
    ),
    Endpoint(
        method="GET", path=_SIGNALS, handler=list_signals, summary="Signals of a run", tag="runs", returns=Page[SignalView],
    ),
)  # fmt: skip
