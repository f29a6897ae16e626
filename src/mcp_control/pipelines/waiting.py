"""Stages that wait for what comes from outside: an answer or a signal. They hold no slot. Pure."""

import msgspec
from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.clock import to_datetime
from mcp_control.pipelines.closing import complete
from mcp_control.pipelines.control import as_millis
from mcp_control.pipelines.decision import Missing
from mcp_control.pipelines.draft import Draft
from mcp_control.pipelines.expressions import Raw
from mcp_control.pipelines.input_model import Answer, Approval, Given, Received, Signal, WaitFor
from mcp_control.pipelines.model import StageState
from mcp_control.pipelines.plan import PlannedStage


def begin(draft: Draft, place: int) -> None:
    """Have a stage wait; a signal that came earlier ends that at once. Raises ExpressionError, Missing."""
    planned = draft.plan.stages[place]
    waits = planned.stage.approval or planned.stage.wait_for
    assert waits is not None
    due = None if waits.timeout_seconds is None else draft.now + as_millis(waits.timeout_seconds)
    if planned.stage.approval is not None:
        draft.asked[place] = planned.payload.render(draft.scope())
    draft.stages[place] = replace(
        draft.stages[place], state=StageState.INPUT_REQUIRED, started_at=draft.now, deadline_at=due
    )
    if planned.stage.wait_for is not None:
        _attend(draft, place)


def attend(draft: Draft) -> None:
    """End the stages that got what they wait for, or have waited long enough. Raises Missing."""
    for place in draft.plan.waiting:
        if draft.stages[place].state is StageState.INPUT_REQUIRED:
            try:
                _attend(draft, place)
            except ExpressionError as error:
                draft.fail(place, str(error))
            if draft.stages[place].state is not StageState.INPUT_REQUIRED:
                draft.progressed.add(place)


def _attend(draft: Draft, place: int) -> None:
    stage = draft.plan.stages[place].stage
    late = draft.stages[place].deadline_at is not None and (draft.stages[place].deadline_at or 0) <= draft.now
    if stage.approval is not None:
        _answered(draft, place, stage.approval, late)
    elif stage.wait_for is not None:
        _signalled(draft, place, stage.wait_for, late)


def _answered(draft: Draft, place: int, approval: Approval, late: bool) -> None:
    stage = draft.stages[place]
    given = stage.given
    if given is None:
        if not late:
            return
        if approval.default is None:
            draft.fail(place, "nobody answered in time", "approval-expired")
            return
        given = _by_default(approval, approval.default, draft.now)
    stage = draft.stages[place] = replace(stage, given=None)
    if given.option not in approval.stops:
        complete(draft, place, given.output)
        return
    draft.outputs[stage.id] = given.output
    draft.stages[place] = replace(stage, has_output=True, output=draft.small(given.output))
    draft.fail(place, f"`{given.option}` was chosen", "rejected")


def _by_default(approval: Approval, option: str, now: int) -> Given:
    fields = {
        name: msgspec.Raw(b"null" if param.default is msgspec.UNSET else msgspec.json.encode(param.default))
        for name, param in approval.fields.items()
    }
    answer = Answer(option=option, fields=fields, by="system", at=to_datetime(now), expired=True)
    return Given(msgspec.json.encode(answer), option)


def _signalled(draft: Draft, place: int, wait: WaitFor, late: bool) -> None:
    planned = draft.plan.stages[place]
    for at, signal in enumerate(draft.run.signals):
        if signal.stage is not None or signal.name != wait.signal:
            continue
        output = _received(draft, signal)
        if _fits(draft, planned, output):
            signals = list(draft.run.signals)
            signals[at] = replace(signal, stage=planned.stage.id)
            draft.run = replace(draft.run, signals=signals)
            complete(draft, place, output)
            return
    if not late:
        return
    if wait.default is msgspec.UNSET:
        draft.fail(place, f"the signal `{wait.signal}` did not come in time", "signal-expired")
        return
    body = msgspec.Raw(msgspec.json.encode(wait.default))
    received = Received(name=wait.signal, body=body, by="system", at=to_datetime(draft.now), expired=True)
    complete(draft, place, msgspec.json.encode(received))


def _received(draft: Draft, signal: Signal) -> bytes:
    body = draft.material.signals.get(signal.id)
    if body is None:
        raise Missing(signal=signal.name)
    received = Received(name=signal.name, body=msgspec.Raw(body), id=signal.id, by=signal.by, at=to_datetime(signal.at))
    return msgspec.json.encode(received)


def _fits(draft: Draft, planned: PlannedStage, output: Raw) -> bool:
    if planned.match is None:
        return True
    try:
        return planned.match.value(draft.scope(output=output)) is True
    except ExpressionError:
        return False  # whoever sends signals of another shape must not be able to fail the run
