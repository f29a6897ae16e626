"""Signals: what other programs send to a run, kept with it until a stage takes it. Pure."""

import re
from typing import Final

from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Fact
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import FieldError, IdempotencyMismatch, Invalid
from mcp_control.pipelines.input_model import SIGNALS_MAX, Signal, SignalView
from mcp_control.pipelines.model import Run
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.transitions import allow

SIGNAL_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)


def received(plan: Plan, run: Run, signal: Signal) -> Run:
    """Return a run that got a signal; the very same run where it had got it before.

    Raises:
        InvalidTransition: the run has ended.
        Invalid: no stage of its pipeline waits for a signal of this name, or there are too many.
        IdempotencyMismatch: the key was used for another signal.
    """
    known = repeated(run, signal)
    if known is not None:
        if known.digest != signal.digest:
            raise IdempotencyMismatch("this idempotency key was used for another signal")
        return run
    allow("signal", run)
    names = {waits.signal for stage in plan.spec.spec.stages if (waits := stage.wait_for) is not None}
    if signal.name not in names:
        detail = f"no stage of `{run.pipeline}` waits for this signal; it knows {', '.join(sorted(names)) or 'none'}"
        raise Invalid(detail, errors=[FieldError(pointer="#/name", code="unknown-reference", detail=detail[:500])])
    if len(run.signals) >= SIGNALS_MAX:
        detail = f"a run gets at most {SIGNALS_MAX} signals"
        raise Invalid(detail, errors=[FieldError(pointer="#", code="limit-exceeded", detail=detail)])
    return replace(run, signals=[*run.signals, signal])


def repeated(run: Run, signal: Signal) -> Signal | None:
    """Return the signal that this one repeats: the same sender's, with the same key."""
    if signal.key is None:
        return None
    return next((each for each in run.signals if each.key == signal.key and each.by == signal.by), None)


def signal_fact(run: Run, signal: Signal) -> Fact:
    """Return the fact that a run got a signal."""
    return fact("run.signalled", run.id, signal.by, signal.at, {"signal": signal.name}, tenant=run.tenant, run=run.id)


def signal_view(signal: Signal) -> SignalView:
    """Return a signal as callers see it."""
    return SignalView(id=signal.id, name=signal.name, at=to_datetime(signal.at), by=signal.by, stage=signal.stage)
