"""Questions that a handler asks people while it works: as agents put them, as tasks keep them, as handlers get the answer."""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import msgspec

from mcp_control.kernel.errors import FieldError
from mcp_control.kernel.text import name_errors, range_errors, text_errors

QUESTIONS_MAX: Final = 20
TITLE_MAX: Final = 500
MESSAGE_MAX: Final = 4000
_KEY_MAX: Final = 64
_OPTIONS_MAX: Final = 20
_PEOPLE_MAX: Final = 100
_TIMEOUT_MAX: Final = 366 * 86_400.0


class Ask(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A question to people.

    Attributes:
        key: what it is to its task, which gets one answer to each.
        title, message: what is asked.
        options: what may be answered.
        assignees, roles: ids or names of the accounts, and roles, that may answer; everybody who may answer approvals where both are empty.
        timeout_seconds: how long to wait; then `default`, an option, is the answer, and without one the task fails.
    """

    key: str
    title: str
    message: str = ""
    options: list[str] = msgspec.field(default_factory=lambda: ["approve", "reject"])
    assignees: list[str] = []
    roles: list[str] = []
    timeout_seconds: float | None = None
    default: str | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The newest question of a task. `stored` counts how often it was written to the inbox: 1 is open there, 2 closed unanswered."""

    ask: Ask
    at: int
    due_at: int | None = None
    stored: int = 0


class Answered(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """An answer as the handler gets it.

    Attributes:
        title: what was asked.
        option: the one chosen.
        comment: a word that came with it.
        by: id of the account that answered, `system` for the default.
        at: wall milliseconds.
        expired: nobody answered in time; this is the default.
    """

    title: str
    option: str
    comment: str = ""
    by: str
    at: int
    expired: bool = False


class Asks(Protocol):
    """What every question to people has, whoever asks it."""

    @property
    def title(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...
    @property
    def assignees(self) -> Sequence[str]: ...
    @property
    def roles(self) -> Sequence[str]: ...
    @property
    def timeout_seconds(self) -> float | None: ...
    @property
    def default(self) -> str | None: ...


def ask_errors(ask: Ask) -> list[FieldError]:
    """Return what is wrong with the question of a task."""
    return [*name_errors("#/key", ask.key, _KEY_MAX), *question_errors(ask, "#")]


def question_errors(asks: Asks, pointer: str) -> Iterator[FieldError]:
    """Yield what is wrong with a question to people."""
    if not asks.title.strip():
        yield _error(f"{pointer}/title", "out-of-range", "a title says what is asked")
    yield from text_errors(f"{pointer}/title", asks.title, TITLE_MAX)
    yield from text_errors(f"{pointer}/message", asks.message.replace("\n", " "), MESSAGE_MAX)
    if not 1 <= len(asks.options) <= _OPTIONS_MAX:
        yield _error(f"{pointer}/options", "out-of-range", f"1 to {_OPTIONS_MAX} options")
    for at, option in enumerate(asks.options):
        yield from name_errors(f"{pointer}/options/{at}", option, 64)
        if option in asks.options[:at]:
            yield _error(f"{pointer}/options/{at}", "invalid-value", f"`{option:.64}` is there twice")
    if asks.default is not None and asks.default not in asks.options:
        yield _error(f"{pointer}/default", "unknown-reference", f"`{asks.default:.64}` is no option")
    if asks.default is not None and asks.timeout_seconds is None:
        yield _error(f"{pointer}/default", "invalid-value", "it is taken after `timeout_seconds`: say how long to wait")
    for name, people in (("assignees", asks.assignees), ("roles", asks.roles)):
        if len(people) > _PEOPLE_MAX:
            yield _error(f"{pointer}/{name}", "limit-exceeded", f"at most {_PEOPLE_MAX}")
        for at, one in enumerate(people[:_PEOPLE_MAX]):
            yield from name_errors(f"{pointer}/{name}/{at}", one, 128)
    yield from timeout_errors(asks.timeout_seconds, pointer)


def timeout_errors(seconds: float | None, pointer: str) -> Iterator[FieldError]:
    """Yield what is wrong with how long people or programs are waited for."""
    if seconds is not None:
        yield from range_errors(f"{pointer}/timeout_seconds", seconds, 0.001, _TIMEOUT_MAX)


def _error(pointer: str, code: str, detail: str) -> FieldError:
    return FieldError(pointer=pointer, code=code, detail=detail)
