"""Routes of `/operations`: one verb for all tasks that fulfil conditions."""

from typing import Final

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.query import PageQuery, Query, WaitQuery
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import Nothing
from mcp_control.kernel.paging import Page
from mcp_control.tasks.operation_model import OperationRequest, OperationView, Preview
from mcp_control.tasks.operation_records import view_operation

_REQUEST: Final = Body(OperationRequest)
_NOTHING: Final = Body(Nothing, optional=True)
_PAGE: Final = Query(PageQuery)
_WAIT: Final = Query(WaitQuery)


async def start_operation(call: Call) -> Reply:
    """Do something with all tasks that fulfil conditions; with `dry_run` only say how many there are.

    Durable when this answers, and carried on whatever server dies. With `wait`, the answer comes when it is complete or the time is over.
    """
    wait = call.query(_WAIT).wait
    request = await call.decode(_REQUEST)
    operations = call.services.steering.operations
    if request.dry_run:
        return reply(await operations.preview(call.actor, request))
    operation = await operations.start(call.actor, request)
    if wait:
        operation = await call.until_gone(operations.wait(call.actor, operation.id, wait))
    return reply(view_operation(operation), 201)


async def list_operations(call: Call) -> Reply:
    """List operations, newest first."""
    query = call.query(_PAGE)
    return reply(await call.services.steering.operations.list(call.actor, cursor=query.cursor, limit=query.limit))


async def get_operation(call: Call) -> Reply:
    """Say how far an operation is, waiting for its end when asked to."""
    wait = call.query(_WAIT).wait
    operations, operation_id = call.services.steering.operations, call.params["operation_id"]
    if wait:
        return reply(view_operation(await call.until_gone(operations.wait(call.actor, operation_id, wait))))
    return reply(view_operation(await operations.get(call.actor, operation_id)))


async def cancel_operation(call: Call) -> Reply:
    """Do it with no more tasks; what was done stays done."""
    await call.decode(_NOTHING)
    return reply(
        view_operation(await call.services.steering.operations.cancel(call.actor, call.params["operation_id"]))
    )


ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/operations", handler=start_operation, summary="Do something with many tasks", tag="operations",
        body=_REQUEST, query=_WAIT, returns=OperationView, status=201, others={200: Preview},
        example={"verb": "cancel", "where": {"type": "echo", "state": ["queued"]}, "expected_at_most": 100, "reason": "wrong input"},
    ),
    Endpoint(
        method="GET", path="/operations", handler=list_operations, summary="List operations", tag="operations", query=_PAGE,
        returns=Page[OperationView],
    ),
    Endpoint(
        method="GET", path="/operations/{operation_id}", handler=get_operation, summary="Get an operation", tag="operations",
        query=_WAIT, returns=OperationView,
    ),
    Endpoint(
        method="POST", path="/operations/{operation_id}/cancel", handler=cancel_operation, summary="Stop an operation",
        tag="operations", body=_NOTHING, returns=OperationView,
    ),
)  # fmt: skip
