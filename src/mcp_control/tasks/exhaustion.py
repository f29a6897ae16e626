"""What becomes of a task whose budget is used up, and of one whose budget was raised: decisions on the task as it is. Pure."""

from typing import Any

from mcp_control.kernel.changes import Fact
from mcp_control.kernel.errors import BudgetExhausted
from mcp_control.tasks import budgets
from mcp_control.tasks.budget_model import Over
from mcp_control.tasks.ledger import Decide, Move
from mcp_control.tasks.model import HELD_STATES, Task, TaskState
from mcp_control.tasks.records import task_fact
from mcp_control.tasks.transitions import answer, exhaust


def exhausting(over: Over, actor: str, now: int, *, stop: bool | None = None) -> Decide:
    """Keep a task from going on whose budget is used up, as the budget says; `stop` overrules it."""
    failure = budgets.failure_of(over)

    def decide(task: Task) -> Move | None:
        if task.final or not (task.state in HELD_STATES or task.waits or task.state is TaskState.INPUT_REQUIRED):
            return None
        ends = over.on_exhausted == "stop" if stop is None else stop
        if task.state is TaskState.INPUT_REQUIRED and not ends:
            return None
        after = exhaust(task, failure, now, stop=ends)
        return Move(after, exhausted_facts(task, after, actor, now))

    return decide


def exhausted_facts(before: Task, after: Task, actor: str, now: int) -> list[Fact]:
    """Return the facts of a task that was kept from going on by a budget."""
    data = after.failure.data if after.failure is not None and after.failure.data is not None else {}
    agent = {} if before.lease is None else {"agent_id": before.lease.agent_id}
    kind = f"task.{after.state.value}" if after.final else "task.input_required"
    return [
        task_fact("task.budget_exhausted", after, actor, now, **agent, **data),
        task_fact(kind, after, actor, now, **agent),
    ]


def answering(actor: str, now: int) -> Decide:
    """Queue a task again that waits for its budget."""

    def decide(task: Task) -> Move | None:
        if task.state is not TaskState.INPUT_REQUIRED or task.reason != budgets.CODE:
            return None
        after = answer(task, now)
        return Move(after, [task_fact(f"task.{after.state.value}", after, actor, now)])

    return decide


def problem_of(over: Over) -> BudgetExhausted:
    """Return the problem that says so."""
    told: dict[str, Any] = budgets.told_of(over)
    return BudgetExhausted(budgets.sentence(over), **told)
