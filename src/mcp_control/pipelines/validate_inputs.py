"""Are the parts of a stage that waits, and what undoes a stage, acceptable? All but their expressions; pure."""

from collections.abc import Iterator
from typing import Final

import msgspec

from mcp_control.kernel.errors import FieldError
from mcp_control.pipelines.definition_model import NO_NEEDS, Stage
from mcp_control.pipelines.input_model import SIGNAL_BYTES_MAX, Approval, WaitFor
from mcp_control.pipelines.signals import SIGNAL_NAME
from mcp_control.tasks.ask_model import question_errors, timeout_errors

FIELDS_MAX: Final = 50


def waiting_errors(stage: Stage, pointer: str) -> Iterator[FieldError]:
    """Yield what is wrong with a stage that waits for an answer or a signal."""
    if stage.approval is not None and stage.wait_for is not None:
        yield _error(
            f"{pointer}/wait_for", "invalid-value", "a stage waits for an answer or for a signal, not for both"
        )
    what = "approval" if stage.approval is not None else "wait_for"
    idle = {
        "uses": stage.uses,
        "with": stage.with_,
        "fan_out": stage.fan_out,
        "retry": stage.retry,
        "timeout": stage.timeout,
        "deadline_seconds": stage.deadline_seconds,
    }
    for name, value in idle.items():
        if value:
            detail = f"a stage with `{what}` has no task, so no `{name}`"
            detail += "; say `timeout_seconds` there" if name in ("timeout", "deadline_seconds") else ""
            yield _error(f"{pointer}/{name}", "invalid-value", detail)
    if stage.requires != NO_NEEDS or stage.version != "*":
        name = "version" if stage.version != "*" else "requires"
        yield _error(f"{pointer}/{name}", "invalid-value", f"a stage with `{what}` has no task, so no `{name}`")
    if stage.approval is not None:
        yield from _approval(stage.approval, f"{pointer}/approval")
    if stage.wait_for is not None:
        yield from _wait_for(stage.wait_for, f"{pointer}/wait_for")


def _approval(asks: Approval, pointer: str) -> Iterator[FieldError]:
    yield from question_errors(asks, pointer)
    for at, option in enumerate(asks.stop_on or ()):
        if option not in asks.options:
            yield _error(f"{pointer}/stop_on/{at}", "unknown-reference", f"`{option:.64}` is no option")
    if len(asks.fields) > FIELDS_MAX:
        yield _error(f"{pointer}/fields", "limit-exceeded", f"at most {FIELDS_MAX} fields")


def _wait_for(wait: WaitFor, pointer: str) -> Iterator[FieldError]:
    if not SIGNAL_NAME.fullmatch(wait.signal):
        detail = "a signal is named with letters, digits, `_`, `-` and `.`, first a letter; at most 64"
        yield _error(f"{pointer}/signal", "invalid-character", detail)
    if wait.default is not msgspec.UNSET:
        if wait.timeout_seconds is None:
            detail = "it is taken after `timeout_seconds`: say how long to wait"
            yield _error(f"{pointer}/default", "invalid-value", detail)
        if len(msgspec.json.encode(wait.default)) > SIGNAL_BYTES_MAX:
            yield _error(f"{pointer}/default", "limit-exceeded", f"at most {SIGNAL_BYTES_MAX >> 10} KiB")
    yield from timeout_errors(wait.timeout_seconds, pointer)


def _error(pointer: str, code: str, detail: str) -> FieldError:
    return FieldError(pointer=pointer, code=code, detail=detail)
