"""Questions of tasks in the inbox of questions to people. Pure."""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Entity, Fact
from mcp_control.kernel.clock import to_datetime, to_millis
from mcp_control.pipelines.approvals import question_fact, write_question
from mcp_control.pipelines.input_model import Answer, Approval, Given, Question
from mcp_control.pipelines.transitions import APPROVAL_TRANSITIONS
from mcp_control.tasks.ask_model import Answered, Asked
from mcp_control.tasks.asking import EXPIRED, question_id
from mcp_control.tasks.model import Task, TaskState

_read_answer: Final = msgspec.json.Decoder(Answer).decode


def settled(task: Task, actor: str) -> tuple[Task, list[Entity], list[Fact]]:
    """Return a task that is about to be written with its question as it then lies in the inbox, and what that writes and tells.

    A question is asked with the change that lets the task wait, and closed with the one that ends that, whatever ends it.
    """
    asked = task.asked
    assert asked is not None
    waits = task.state is TaskState.INPUT_REQUIRED
    if asked.stored == (1 if waits else 2):
        return task, [], []
    question = _question(task, asked)
    kept: Asked | None = replace(asked, stored=asked.stored + 1)
    if not waits:
        answer = task.answers.get(asked.ask.key)
        if answer is not None:
            kept = None
            actor = answer.by
            question = replace(question, output=_output(answer))
            verb = "expire" if answer.expired else "answer"
        else:
            verb = "expire" if task.reason == EXPIRED else "withdraw"
        (state,) = APPROVAL_TRANSITIONS[verb][question.state]
        question = replace(question, state=state)
    return replace(task, asked=kept), [write_question(question)], [question_fact(question, actor, task.state_at)]


def _question(task: Task, asked: Asked) -> Question:
    ask = asked.ask
    return Question(
        id=question_id(task.id, ask.key),
        version=asked.stored,
        tenant=task.tenant,
        task_id=task.id,
        ask_key=ask.key,
        run_id=task.links.run_id or "",
        stage=task.links.stage or "",
        asks=Approval(
            title=ask.title,
            message=ask.message,
            options=ask.options,
            assignees=ask.assignees,
            roles=ask.roles,
            timeout_seconds=ask.timeout_seconds,
            default=ask.default,
        ),
        title=ask.title,
        message=ask.message,
        asked_at=asked.at,
        due_at=asked.due_at,
    )


def _output(given: Answered) -> bytes:
    answer = Answer(
        option=given.option, comment=given.comment, by=given.by, at=to_datetime(given.at), expired=given.expired
    )
    return msgspec.json.encode(answer)


def answer_of(question: Question, given: Given) -> Answered:
    """Return an answer as the task keeps it that asked."""
    answer = _read_answer(given.output)
    return Answered(
        title=question.title, option=answer.option, comment=answer.comment, by=answer.by, at=to_millis(answer.at)
    )
