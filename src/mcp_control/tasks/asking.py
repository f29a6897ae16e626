"""How a task waits for a person and goes on with the answer: the moves of the transition table that questions cause, pure."""

from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.errors import InvalidTransition
from mcp_control.kernel.ids import derived_id
from mcp_control.tasks.ask_model import QUESTIONS_MAX, Answered, Ask, Asked, ask_errors
from mcp_control.tasks.model import Failure, Task, TaskState
from mcp_control.tasks.transitions import answer, check, end_attempt

KIND: Final = "approval"  # questions of tasks lie in the inbox of all questions
EXPIRED: Final = "approval-expired"


def question_id(task_id: str, key: str) -> str:
    """Return the id of a question of a task in the inbox."""
    return derived_id(KIND, task_id, "ask", key)


def refusal(task: Task, ask: Ask | None) -> Failure | None:
    """Return why an attempt may not end by asking this: the task fails for good, since its handler would ask it again."""
    if ask is None:
        return _invalid("invalid-question", "an attempt that ends by asking says what it asks")
    if errors := ask_errors(ask):
        return _invalid("invalid-question", f"{errors[0].pointer}: {errors[0].detail}")
    if ask.key in task.answers:
        return _invalid("invalid-question", f"the question `{ask.key}` has its answer already")
    if len(task.answers) >= QUESTIONS_MAX:
        return _invalid("too-many-questions", f"a task asks at most {QUESTIONS_MAX} questions")
    return None


def _invalid(code: str, message: str) -> Failure:
    return Failure(error_class="permanent", code=code, message=message)


def ask(task: Task, question: Ask, now: int) -> Task:
    """End an attempt with a question to people: no slot is held while they are awaited, and nothing is counted as a failure."""
    check(task, "ask")
    held = replace(
        task,
        state_at=now,
        attempts=end_attempt(task, "asked", now),
        lease=None,
        started_at=None,
        epoch=task.epoch + 1,
        lost=0,
    )
    if task.cancel is not None:
        return replace(
            held,
            state=TaskState.CANCELLED,
            finished_at=now,
            last_lease=task.lease,
            reason="cancelled",
            message=task.cancel.reason,
        )
    seconds = question.timeout_seconds
    due = None if seconds is None else now + max(1, round(seconds * 1000))
    asked = Asked(ask=question, at=now, due_at=due)
    return replace(held, state=TaskState.INPUT_REQUIRED, asked=asked, reason="asked", message=question.title)


def answered(task: Task, key: str, given: Answered, now: int) -> Task:
    """Queue a task again with the answer to its question. Raises InvalidTransition where it does not wait for this one (any more)."""
    asked = task.asked
    if asked is None or asked.ask.key != key or task.state is not TaskState.INPUT_REQUIRED:
        raise InvalidTransition("this question is closed meanwhile", state=task.state.value, allowed=[])
    if asked.due_at is not None and asked.due_at <= now and not given.expired:
        raise InvalidTransition("the time to answer is over", state="expired", allowed=[])
    return replace(answer(task, now), answers={**task.answers, key: given})


def lapse(task: Task, now: int) -> Task:
    """Fail a task whose question nobody answered in time."""
    check(task, "lapse")
    message = f"nobody answered in time: {task.message}"
    failure = Failure(error_class="permanent", cause="policy", code=EXPIRED, message=message)
    return replace(
        task,
        state=TaskState.FAILED,
        state_at=now,
        finished_at=now,
        failure=failure,
        reason=EXPIRED,
        message=message,
    )


def timed_out(task: Task, asked: Asked, now: int) -> Task:
    """Take the default as the answer to a question that nobody answered in time; without one the task fails."""
    option = asked.ask.default
    if option is None:
        return lapse(task, now)
    given = Answered(title=asked.ask.title, option=option, by="system", at=now, expired=True)
    return answered(task, asked.ask.key, given, now)


def awaited(ask: Ask) -> list[str]:
    """Return who is asked: accounts and roles; empty where that is everybody who may answer approvals."""
    return [*ask.assignees, *(f"role {role}" for role in ask.roles)]


def inbox_ids(task: Task) -> list[str]:
    """Return the ids of what a task that has ended has in the inbox, where no run keeps it."""
    if task.links.run_id is not None or not (task.answers or task.asked):
        return []
    keys = [*task.answers, *([] if task.asked is None else [task.asked.ask.key])]
    return [question_id(task.id, key) for key in keys]
