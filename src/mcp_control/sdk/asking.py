"""What `ctx.ask` does: the answer that came with the attempt, or the end of the attempt with the question."""

from collections.abc import Mapping, Sequence
from typing import Final, Required, TypedDict

from mcp_control.sdk.errors import Permanent
from mcp_control.tasks.ask_model import QUESTIONS_MAX, Answered, Ask, ask_errors

_APPROVE_OR_REJECT: Final = ("approve", "reject")


class AskOptions(TypedDict, total=False):
    """What may be said about a question beside its title.

    key: what it is to the task, which gets one answer to each. message: more about it. options: what may be answered, `approve` and
    `reject` by default. assignees, roles: ids or names of the accounts, and roles, that may answer. timeout: seconds to wait; then
    `default`, one of the options, is the answer, and without it the task fails.
    """

    key: Required[str]
    message: str
    options: Sequence[str]
    assignees: Sequence[str]
    roles: Sequence[str]
    timeout: float
    default: str


class Asking(BaseException):
    """The attempt ends here, with a question. No error: like a cancellation it passes by `except Exception`."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(f"asks: {ask.title}")
        self.ask = ask


def asked(answers: Mapping[str, Answered], title: str, options: AskOptions) -> Answered:
    """Return the answer to a question, where somebody gave it.

    Raises:
        Asking: nobody has yet.
        Permanent: `invalid-question`, something is wrong with it, or the same key stands for another question; `too-many-questions`.
    """
    ask = Ask(
        key=options.get("key", ""),
        title=title,
        message=options.get("message", ""),
        options=[*options.get("options", _APPROVE_OR_REJECT)],
        assignees=[*options.get("assignees", ())],
        roles=[*options.get("roles", ())],
        timeout_seconds=options.get("timeout"),
        default=options.get("default"),
    )
    answer = answers.get(ask.key)
    if answer is not None:
        if answer.title != title or answer.option not in ask.options:
            raise Permanent(
                f"the key `{ask.key}` stands for another question already: {answer.title}", code="invalid-question"
            )
        return answer
    if errors := ask_errors(ask):
        raise Permanent(f"{errors[0].pointer}: {errors[0].detail}", code="invalid-question")
    if len(answers) >= QUESTIONS_MAX:
        raise Permanent(f"a task asks at most {QUESTIONS_MAX} questions", code="too-many-questions")
    raise Asking(ask)


def question_in(error: BaseException) -> Ask | None:
    """Return the question in what ended an attempt: that of a group of tasks of the handler is wrapped."""
    if isinstance(error, Asking):
        return error.ask
    if isinstance(error, BaseExceptionGroup):
        return next((found for each in error.exceptions if (found := question_in(each)) is not None), None)
    return None
