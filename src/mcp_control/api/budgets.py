"""Routes of budgets: what tasks and runs may use, what they have used, and what agents report of it."""

from typing import Final

import msgspec

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.routing import Endpoint
from mcp_control.api.tasks import Nothing
from mcp_control.tasks.budget_model import Amounts, BudgetEdit, BudgetView, SpendAnswer, Spent
from mcp_control.tasks.records import view
from mcp_control.tasks.view_model import TaskView


class UsageReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the attempt under this lease has used so far in all, and what it wants to hold beyond that."""

    lease_token: str
    spent: Spent


_EDIT: Final = Body(BudgetEdit)
_USAGE: Final = Body(UsageReport)
_NOTHING: Final = Body(Nothing, optional=True)


async def get_budget(call: Call) -> Reply:
    """Return the budget of a task and what was used of it, by itself and by what was done for it."""
    return await _shown(call, call.params["task_id"])


async def get_run_budget(call: Call) -> Reply:
    """Return the budget of a run and what all its tasks used of it."""
    return await _shown(call, call.params["run_id"])


async def edit_budget(call: Call) -> Reply:
    """Set or raise limits of a task; what waits for them goes on."""
    return await _edited(call, call.params["task_id"])


async def edit_run_budget(call: Call) -> Reply:
    """Set or raise limits of a run; what waits for them goes on."""
    return await _edited(call, call.params["run_id"])


async def _shown(call: Call, owner: str) -> Reply:
    return reply(await call.services.spending.view(call.actor, owner))


async def _edited(call: Call, owner: str) -> Reply:
    edit = await call.decode(_EDIT)
    return reply(await call.services.spending.edit(call.actor, owner, edit))


async def refuse_budget(call: Call) -> Reply:
    """Say no to a task that asked for more: it fails."""
    await call.decode(_NOTHING)
    task = await call.services.spending.refuse_more(call.actor, call.params["task_id"])
    return reply(view(task, call.services.clock.now()))


async def report_usage(call: Call) -> Reply:
    """Record what an attempt has used, and hold what it asks for if there is so much left."""
    report = await call.decode(_USAGE)
    answer = await call.services.spending.spend(call.actor, call.params["task_id"], report.lease_token, report.spent)
    return reply(answer)


_RAISED: Final = BudgetEdit(add=Amounts(tokens=1000))
_REPORTED: Final = {"lease_token": "…", "spent": {"number": 3, "calls": 2, "tokens": 1200, "ask": {"tokens": 500}}}

ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/tasks/{task_id}/budget", handler=get_budget, summary="Get the budget of a task", tag="tasks",
        returns=BudgetView,
    ),
    Endpoint(
        method="PATCH", path="/tasks/{task_id}/budget", handler=edit_budget, summary="Raise the budget of a task", tag="tasks",
        body=_EDIT, returns=BudgetView, example=msgspec.to_builtins(_RAISED),
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/budget/refuse", handler=refuse_budget, summary="Refuse a task more", tag="tasks",
        body=_NOTHING, returns=TaskView,
    ),
    Endpoint(
        method="POST", path="/tasks/{task_id}/usage", handler=report_usage, summary="Report usage", tag="tasks", weight="keep",
        body=_USAGE, returns=SpendAnswer, example=_REPORTED,
    ),
    Endpoint(
        method="GET", path="/runs/{run_id}/budget", handler=get_run_budget, summary="Get the budget of a run", tag="runs",
        returns=BudgetView,
    ),
    Endpoint(
        method="PATCH", path="/runs/{run_id}/budget", handler=edit_run_budget, summary="Raise the budget of a run", tag="runs",
        body=_EDIT, returns=BudgetView, example=msgspec.to_builtins(_RAISED),
    ),
)  # fmt: skip
