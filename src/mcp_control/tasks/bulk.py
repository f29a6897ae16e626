"""What operations do with one task: whom a verb is for, and what it asks of it. Pure."""

from collections.abc import Callable

from msgspec.structs import replace

from mcp_control.agents.model import Agent
from mcp_control.kernel.errors import Unroutable
from mcp_control.tasks.ledger import Decide, Move
from mcp_control.tasks.model import FINAL_STATES, HELD_STATES, Task, TaskState
from mcp_control.tasks.operation_model import Operation, OperationRequest, Verb
from mcp_control.tasks.selection import Selection
from mcp_control.tasks.verbs import cancelling, editing, pausing, reassigning, resuming

_OPEN = [state for state in TaskState if state not in FINAL_STATES]
_STATES: dict[Verb, list[TaskState]] = {
    "retry": [state for state in TaskState if state in FINAL_STATES],
    "replay": [TaskState.FAILED],
    "discard": [TaskState.FAILED],
    "reassign": [state for state in _OPEN if state not in HELD_STATES],
}


def narrowed(verb: Verb, wanted: Selection) -> Selection:
    """Return the conditions with the states that the verb can do something with, of those that were asked for."""
    possible = _STATES.get(verb, _OPEN)
    states = [state for state in possible if state in wanted.state] if wanted.state else possible
    return replace(wanted, state=states)


def is_dead_letter(task: Task) -> bool:
    """Say whether a task is in the dead-letter set: failed for good, neither tried again as a new task nor discarded."""
    return task.state is TaskState.FAILED and not task.retried_as and task.discarded is None


def meant(request: OperationRequest | Operation, task: Task) -> bool:
    """Say whether the verb is for this task, which fulfils the conditions: it leaves alone what is already as it is to be."""
    match request.verb:
        case "cancel":
            return not task.final and task.cancel is None
        case "pause":
            return not task.final and task.hold is None
        case "resume":
            return not task.final and task.hold is not None
        case "reprioritize":
            return not task.final and task.priority != request.priority
        case "reassign":
            return not task.final and task.state not in HELD_STATES and task.needs.agent != request.agent
        case "retry":
            return task.final
        case "replay" | "discard":
            return is_dead_letter(task)


def deciding(operation: Operation, agent: Agent | None, now: int, rank: Callable[[Task], int]) -> Decide:
    """Return what an operation asks of a task that is still there. Asked again after a crash, it leaves what it did before.

    Args:
        agent: the one to reassign to; None where it is gone.
        rank: of a task with its new priority.
    """
    by = operation.created_by
    match operation.verb:
        case "cancel":
            verb = cancelling(by, operation.reason, now)
        case "pause":
            verb = pausing(by, operation.reason, now)
        case "resume":
            verb = resuming(by, now)
        case "reprioritize":
            verb = editing(by, None, operation.priority, None, now, rank)
        case "reassign":
            if agent is None:
                raise Unroutable("the agent is gone")
            verb = reassigning(by, agent, now)
        case _:
            raise AssertionError(operation.verb)

    def decide(task: Task) -> Move | None:
        if operation.verb == "cancel" and task.cancel is not None:
            return None
        if operation.verb == "reassign" and task.needs.agent == operation.agent:
            return None
        return verb(task)

    return decide
