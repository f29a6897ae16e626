"""The request by which a handler submits a task for the one it works on."""

from typing import TYPE_CHECKING
from urllib.parse import quote

from mcp_control.sdk.calls import Request
from mcp_control.sdk.submission import encode_json, make_spec
from mcp_control.sdk.transport import Call
from mcp_control.tasks.view_model import TaskView

if TYPE_CHECKING:
    from mcp_control.sdk.submission import SubmitOptions


def submit(parent_id: str, lease_token: str, type: str, payload: object, options: "SubmitOptions") -> Request[TaskView]:
    """Submit a child of a task under the lease that holds it."""
    body = encode_json({"lease_token": lease_token, "task": make_spec(type, payload, options)})
    call = Call(method="POST", path=f"/tasks/{quote(parent_id, safe='')}/children", body=body, repeatable=True)
    return Request(call, lambda reply: reply.json(TaskView))
