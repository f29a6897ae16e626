"""Which states of runs, stages, and what belongs to them lead to which, and from which states of a run each verb is allowed."""

from collections.abc import Mapping
from typing import Final

from mcp_control.kernel.errors import InvalidTransition
from mcp_control.pipelines.input_model import ApprovalState, CompensationState
from mcp_control.pipelines.model import Run, RunState, StageState

R = RunState
S = StageState
A = ApprovalState
C = CompensationState

RUN_TRANSITIONS: Final[Mapping[RunState, frozenset[RunState]]] = {
    R.PENDING: frozenset({R.RUNNING, R.INPUT_REQUIRED, R.PAUSED, R.COMPLETED, R.FAILED, R.CANCELLED}),
    R.RUNNING: frozenset({R.INPUT_REQUIRED, R.PAUSED, R.COMPLETED, R.FAILED, R.CANCELLED}),
    R.INPUT_REQUIRED: frozenset({R.RUNNING, R.PAUSED, R.COMPLETED, R.FAILED, R.CANCELLED}),
    R.PAUSED: frozenset({R.RUNNING, R.INPUT_REQUIRED, R.COMPLETED, R.FAILED, R.CANCELLED}),
    R.COMPLETED: frozenset(),
    R.FAILED: frozenset({R.RUNNING}),  # retry
    R.CANCELLED: frozenset({R.RUNNING}),  # retry
}

STAGE_TRANSITIONS: Final[Mapping[StageState, frozenset[StageState]]] = {
    S.PENDING: frozenset({S.READY, S.RUNNING, S.INPUT_REQUIRED, S.COMPLETED, S.FAILED, S.SKIPPED, S.CANCELLED}),
    S.READY: frozenset({S.RUNNING, S.INPUT_REQUIRED, S.COMPLETED, S.FAILED, S.SKIPPED, S.CANCELLED}),
    S.INPUT_REQUIRED: frozenset({S.COMPLETED, S.FAILED, S.SKIPPED, S.CANCELLED}),
    S.RUNNING: frozenset({S.COMPLETED, S.FAILED, S.CANCELLED}),
    S.COMPLETED: frozenset({S.PENDING}),  # retry of a run from this stage or one before it
    S.FAILED: frozenset({S.PENDING}),
    S.SKIPPED: frozenset({S.PENDING}),
    S.CANCELLED: frozenset({S.PENDING}),
}

APPROVAL_TRANSITIONS: Final[Mapping[str, Mapping[ApprovalState, frozenset[ApprovalState]]]] = {
    "answer": {A.PENDING: frozenset({A.ANSWERED})},
    "expire": {A.PENDING: frozenset({A.EXPIRED})},
    "withdraw": {A.PENDING: frozenset({A.WITHDRAWN})},
}

COMPENSATION_TRANSITIONS: Final[Mapping[str, Mapping[CompensationState, frozenset[CompensationState]]]] = {
    "start": {C.PENDING: frozenset({C.RUNNING})},
    "complete": {C.RUNNING: frozenset({C.COMPLETED})},
    "fail": {C.PENDING: frozenset({C.FAILED}), C.RUNNING: frozenset({C.FAILED})},
}

SCHEDULE_TRANSITIONS: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "pause": {"active": frozenset({"paused"}), "finished": frozenset({"paused"})},
    "resume": {"paused": frozenset({"active", "finished"})},
    "finish": {"active": frozenset({"finished"})},
    "edit": {"finished": frozenset({"active"})},
    "backfill": {"finished": frozenset({"active"})},
}

_OPEN: Final = frozenset({R.PENDING, R.RUNNING, R.INPUT_REQUIRED, R.PAUSED})

VERBS: Final[Mapping[str, frozenset[RunState]]] = {
    "pause": _OPEN,
    "resume": _OPEN,
    "cancel": _OPEN,
    "signal": _OPEN,
    "retry": frozenset({R.FAILED, R.CANCELLED}),
    "rerun_rejected": frozenset({R.COMPLETED, R.FAILED, R.CANCELLED}),
}


def allow(verb: str, run: Run) -> None:
    """Raise InvalidTransition unless the verb is allowed in the state the run is in."""
    allowed = VERBS[verb]
    if run.state not in allowed:
        states = sorted(state.value for state in allowed)
        raise InvalidTransition(
            f"cannot {verb} a run that is {run.state.value}; it would have to be {' or '.join(states)}",
            state=run.state.value,
            allowed=sorted(name for name, states in VERBS.items() if run.state in states),
        )
