"""What may be done with a group, and what follows from how its members are. Pure."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.errors import FieldError, InvalidTransition
from mcp_control.tasks.group_model import Callbacks, Event, GroupState, TaskGroup
from mcp_control.tasks.model import FINAL_STATES, Request, TaskSpec, TaskState

G = GroupState
GROUP_TRANSITIONS: Final[Mapping[str, Mapping[GroupState, tuple[GroupState, ...]]]] = MappingProxyType(
    {
        "seal": {G.OPEN: (G.SEALED,)},
        "cancel": {G.OPEN: (G.CANCELLING,), G.SEALED: (G.CANCELLING,)},
        "finish": {G.SEALED: (G.COMPLETED, G.FAILED), G.CANCELLING: (G.CANCELLED,)},
        "retry": {G.FAILED: (G.SEALED,), G.CANCELLED: (G.SEALED,)},
    }
)
"""verb -> state it starts from -> states it may end in. A group begins `open` or `sealed`."""

UNFINISHED: Final = tuple(state for state in TaskState if state not in FINAL_STATES)
SPOILED: Final = tuple(state for state in TaskState if state in FINAL_STATES and state is not TaskState.COMPLETED)
"""How members end that spoil the group: neither under way nor completed."""
EVENTS: Final[tuple[Event, ...]] = ("completed", "first_failure", "ended")


class Seen(msgspec.Struct, frozen=True):
    """What is seen of the members of a group.

    Attributes:
        unfinished: some have not ended.
        spoiled: the first that ended other than completed; empty where there is none.
        busy: its members are just being cancelled or tried again.
    """

    unfinished: bool
    spoiled: str
    busy: bool = False


class Step(msgspec.Struct, frozen=True):
    """What follows: the group as it becomes, the events that happened to it, and whether it has ended."""

    after: TaskGroup
    events: Sequence[Event]
    ends: bool


def allowed(state: GroupState) -> list[str]:
    """Return the verbs that lead on from a state, in alphabetical order."""
    return sorted(verb for verb, rows in GROUP_TRANSITIONS.items() if state in rows)


def _check(group: TaskGroup, verb: str) -> None:
    if group.state not in GROUP_TRANSITIONS[verb]:
        raise InvalidTransition(
            f"a group that is {group.state.value} cannot {verb}", state=group.state.value, allowed=allowed(group.state)
        )


def grown(group: TaskGroup, count: int, now: int, *, inside: bool) -> TaskGroup:
    """Return the group with more members.

    Args:
        inside: they are added by a member that has not ended.

    Raises:
        InvalidTransition: it takes no more.
    """
    if group.state is not G.OPEN and not (inside and group.state is G.SEALED):
        raise InvalidTransition(
            f"a group that is {group.state.value} takes no more tasks",
            state=group.state.value,
            allowed=allowed(group.state),
        )
    return replace(group, total=group.total + count, changed_at=max(now, group.changed_at))


def sealed(group: TaskGroup, now: int) -> TaskGroup:
    """Say that no more comes from outside."""
    _check(group, "seal")
    return replace(group, state=G.SEALED, state_at=now)


def cancelling(group: TaskGroup, request: Request, operation: str) -> TaskGroup:
    """Ask for the end of all members."""
    _check(group, "cancel")
    return replace(group, state=G.CANCELLING, state_at=request.at, cancel=request, operation=operation)


def retried(group: TaskGroup, now: int, operation: str) -> TaskGroup:
    """Begin a group again whose spoiled members are tried again: it ends anew when they have."""
    _check(group, "retry")
    return replace(
        group,
        state=G.SEALED,
        state_at=now,
        round=group.round + 1,
        first_failure="",
        operation=operation,
        cancel=None,
        counts={},
        finished_at=None,
    )


def step(group: TaskGroup, seen: Seen, now: int) -> Step | None:
    """Return what follows from how the members are, None where nothing does."""
    if group.final or seen.busy:
        return None
    after, events = group, list[Event]()
    ends = group.state is not G.OPEN and not seen.unfinished
    if seen.spoiled and not group.first_failure and group.state is not G.CANCELLING:
        after = replace(after, first_failure=seen.spoiled)
        events.append("first_failure")
    if ends:
        if group.state is G.CANCELLING:
            state = G.CANCELLED
        else:
            state = G.FAILED if after.first_failure else G.COMPLETED
        after = replace(after, state=state, state_at=now, finished_at=now)
        if state is G.COMPLETED:
            events.append("completed")
        events.append("ended")
    return Step(after, events, ends) if events else None


def member_errors(pointer: str, spec: TaskSpec) -> list[FieldError]:
    """Return what a member of a group, or its callback, may not say beside what no task may."""
    found: list[FieldError] = []
    detail = "not in a group: it is accepted as a whole, with one idempotency key"
    for name, given in (
        ("idempotency_key", spec.idempotency_key),
        ("unique", spec.unique),
        ("debounce", spec.debounce),
    ):
        if given is not None:
            found.append(FieldError(pointer=f"{pointer}/{name}", code="invalid-value", detail=detail))
    for place, limit in enumerate(spec.limits):
        if limit.on_excess == "drop":
            found.append(FieldError(pointer=f"{pointer}/limits/{place}/on_excess", code="invalid-value", detail=detail))
    return found


def callback_errors(on: Callbacks) -> list[FieldError]:
    """Return what callbacks may not say beside what no member may: nobody knows when they will be made."""
    found: list[FieldError] = []
    for event, spec in callbacks(on):
        found += member_errors(f"#/on/{event}", spec)
        for name, given in (("run_at", spec.run_at), ("deadline", spec.deadline), ("parent_id", spec.parent_id)):
            if given is not None:
                detail = "not for a callback: it is made when the group is where it waits for"
                found.append(FieldError(pointer=f"#/on/{event}/{name}", code="invalid-value", detail=detail))
    return found


def callbacks(on: Callbacks) -> list[tuple[Event, TaskSpec]]:
    """Return the callbacks that are given, with their events."""
    given: tuple[tuple[Event, TaskSpec | None], ...] = (
        ("completed", on.completed),
        ("first_failure", on.first_failure),
        ("ended", on.ended),
    )
    return [(event, spec) for event, spec in given if spec is not None]
