"""The rules of limits, pure: what a task must hold, which number it takes, and when it lets go.

A limit of n at once is n numbered slots. A rate is numbered too: each of its `burst` numbers may be used again `burst · seconds / count`
after the start that used it, so no window of that length sees more than `burst` starts, and any time t at most `burst + t · rate`.
"""

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Entity, IndexValue, Key
from mcp_control.kernel.errors import FieldError
from mcp_control.kernel.ids import make_id
from mcp_control.kernel.text import range_errors, text_errors
from mcp_control.tasks.limit_model import (
    AT_ONCE_MAX,
    HOLD_KIND,
    LIMITS_MAX,
    RATE_SECONDS_MAX,
    Debounce,
    End,
    Gate,
    Hold,
    HoldChange,
    Limit,
    Rate,
    Taken,
    Unique,
)
from mcp_control.tasks.model import FINAL_STATES, HELD_STATES, Task, TaskSpec, TaskState

KEY_MAX: Final = 128
PATIENCE: Final = 8
"""After so many moves from gate to gate a task keeps what it gets on the way, in the order of the names: nobody overtakes it for ever."""

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Taken).decode
_WITHIN_ATTEMPT: Final = frozenset({TaskState.BLOCKED, TaskState.QUEUED, *HELD_STATES})


def gate_name(tenant: str, gate: Gate) -> str:
    """Return the name under which all tasks with this limit meet."""
    return "\x1f".join((tenant, "rate" if gate.rate else "slot", gate.rule, gate.key))


def key_name(tenant: str, spec: TaskSpec) -> str:
    """Return the name of what a submission may be there for only once: its singleton or its debounce key."""
    if spec.unique is not None:
        return "\x1f".join((tenant, "unique", "", spec.unique.key))
    assert spec.debounce is not None
    return "\x1f".join((tenant, "debounce", spec.type, spec.debounce.key))


def hold_id(name: str, number: int) -> str:
    """Return the id of the entity that stands for a number of a gate."""
    return make_id("hold", 0, blake2b(f"{name}\x1f{number}".encode(), digest_size=16).digest())


def burst_of(rate: Rate) -> int:
    """Return how many starts a rate allows at once."""
    return rate.count if rate.burst is None else rate.burst


def window_ms(rate: Rate) -> int:
    """Return after how many milliseconds a number of a rate may be used again."""
    return max(1, -int(-burst_of(rate) * rate.seconds * 1000 // rate.count))


def room_of(gate: Gate) -> int:
    """Return how many numbers a gate has."""
    return gate.slots if gate.rate is None else burst_of(gate.rate)


def new_hold(name: str, gate: Gate, number: int, version: int = 0) -> Hold:
    """Return the hold on a number of a gate. `version` is that of the entity, 0 where there is none yet."""
    if gate.rate is None:
        return Hold(name=name, number=number, ends="attempt", version=version)
    return Hold(name=name, number=number, ends="start", version=version, window_ms=window_ms(gate.rate))


def key_hold(name: str, spec: TaskSpec) -> Hold:
    """Return the hold of a singleton or debounced task on its key."""
    ends: End = "due"
    if spec.unique is not None:
        ends = "final" if spec.unique.while_ == "unfinished" else "start"
    return Hold(name=name, ends=ends)


def own_gates(limits: Sequence[Limit]) -> list[Gate]:
    """Return the limits a task brings along, each as what it must pass."""
    found: list[Gate] = []
    for limit in limits:
        if limit.concurrency is not None:
            found.append(Gate(key=limit.key, slots=limit.concurrency))
        if limit.rate is not None:
            found.append(Gate(key=limit.key, rate=limit.rate))
    return found


def limits_of(gates: Sequence[Gate]) -> list[Limit]:
    """Return what a task would be submitted with to have these limits of its own again; those of rules are left out."""
    return [Limit(key=gate.key, concurrency=gate.slots or None, rate=gate.rate) for gate in gates if not gate.rule]


def missing(task: Task, passable: Collection[str] = ()) -> list[tuple[str, Gate]]:
    """Return name and gate of what a task still has to pass, in the order of the names. `passable` need not be held."""
    held = {hold.name for hold in task.holds}
    named = ((gate_name(task.tenant, gate), gate) for gate in task.gates)
    return sorted(
        ((name, gate) for name, gate in named if name not in held and name not in passable), key=lambda pair: pair[0]
    )


def first_gate(task: Task) -> tuple[str, Gate]:
    """Return where a task with limits waits first; one that holds everything already is let through there."""
    return (missing(task) or [(gate_name(task.tenant, task.gates[0]), task.gates[0])])[0]


def free_number(taken: Mapping[int, Taken], room: int, now: int) -> int | None:
    """Return the lowest number that is free, None while as many as there may be are in use."""
    used = sum(1 for one in taken.values() if not is_free(one, now))
    if used >= room:
        return None
    return next((number for number in range(room) if (one := taken.get(number)) is None or is_free(one, now)), None)


def is_free(taken: Taken, now: int) -> bool:
    """Say whether a number that was used by a start may be used again."""
    return not taken.holder and (taken.until is None or taken.until <= now)


def next_free(taken: Mapping[int, Taken], now: int) -> int | None:
    """Return when time alone frees a number (milliseconds); None where it does not."""
    return min((one.until for one in taken.values() if not one.holder and one.until and one.until > now), default=None)


def is_over(hold: Hold, task: Task) -> bool:
    """Say whether a task in this state has let go of a hold."""
    if hold.ends == "attempt":
        return task.state not in _WITHIN_ATTEMPT
    if hold.ends == "start":
        return task.state in HELD_STATES or task.state in FINAL_STATES
    if hold.ends == "final":
        return task.state in FINAL_STATES
    return task.state is not TaskState.SCHEDULED


def settled(task: Task, fresh: int) -> tuple[Task, list[Entity], list[Key], list[HoldChange]]:
    """Return a task that is about to be written without the holds it has let go of, and what that makes of the entities.

    Args:
        fresh: how many of its holds, the last ones, are taken in this very change.

    Returns:
        The task, entities to write, entities to delete, and what becomes of the numbers.
    """
    kept: list[Hold] = []
    writes: list[Entity] = []
    deletes: list[Key] = []
    changes: list[HoldChange] = []
    new_from = len(task.holds) - fresh
    for place, hold in enumerate(task.holds):
        taken: Taken | None = None
        if not is_over(hold, task):
            if place < new_from:
                kept.append(hold)
                continue
            kept.append(replace(hold, version=hold.version + 1))
            taken = Taken(name=hold.name, number=hold.number, holder=task.id, since=task.state_at)
        elif hold.window_ms and task.state in HELD_STATES:
            taken = Taken(name=hold.name, number=hold.number, until=task.state_at + hold.window_ms)
        if taken is not None:
            writes.append(_written(hold, taken))
        elif place < new_from:
            deletes.append(Key(HOLD_KIND.name, hold_id(hold.name, hold.number)))
        changes.append(HoldChange(hold.name, hold.number, taken, hold.version + 1))
    return replace(task, holds=kept), writes, deletes, changes


def _written(hold: Hold, taken: Taken) -> Entity:
    index: dict[str, IndexValue] = {"gate": hold.name, "holder": taken.holder or None, "until": taken.until}
    return Entity(HOLD_KIND.name, hold_id(hold.name, hold.number), hold.version, index, _encode(taken))


def read_taken(entity: Entity) -> Taken:
    """Return the hold in a stored entity."""
    return _decode(entity.hot)


def waiting_message(gate: Gate) -> tuple[str, str]:
    """Return reason and sentence of a task that waits at this gate."""
    of = f"{gate.key or 'all'} of the rule {gate.rule}" if gate.rule else gate.key
    if gate.rate is None:
        return "limit-full", f"waits for a slot of {of} ({gate.slots} at once)"
    return "rate-limited", f"waits for the rate of {of} ({gate.rate.count} in {gate.rate.seconds:g} s)"


def wait_at_first(task: Task, now: int) -> Task:
    """Block a task that has limits and waits for none of them yet."""
    name, gate = first_gate(task)
    reason, message = waiting_message(gate)
    return replace(task, state=TaskState.BLOCKED, state_at=now, waits_at=name, passed=0, reason=reason, message=message)


def spec_errors(spec: TaskSpec) -> list[FieldError]:
    """Return what is wrong with the limits, the singleton and the debounce key of a submission."""
    found: list[FieldError] = []
    if len(spec.limits) > LIMITS_MAX:
        found.append(FieldError(pointer="#/limits", code="limit-exceeded", detail=f"at most {LIMITS_MAX} limits"))
    seen: set[tuple[str, bool]] = set()
    for place, limit in enumerate(spec.limits[:LIMITS_MAX]):
        pointer = f"#/limits/{place}"
        found += _key_errors(f"{pointer}/key", limit.key)
        if limit.concurrency is None and limit.rate is None:
            found.append(
                FieldError(pointer=pointer, code="missing-field", detail="a limit has a concurrency, a rate or both")
            )
        if limit.concurrency is not None:
            found += range_errors(f"{pointer}/concurrency", limit.concurrency, 1, AT_ONCE_MAX)
        if limit.rate is not None:
            found += rate_errors(f"{pointer}/rate", limit.rate)
        elif limit.on_excess == "drop":
            found.append(
                FieldError(pointer=f"{pointer}/on_excess", code="invalid-value", detail="only a rate can drop")
            )
        for kind in ([True] if limit.rate else []) + ([False] if limit.concurrency else []):
            if (limit.key, kind) in seen:
                found.append(
                    FieldError(pointer=f"{pointer}/key", code="invalid-value", detail="this key is limited twice")
                )
            seen.add((limit.key, kind))
    if spec.unique is not None:
        found += _unique_errors(spec, spec.unique)
    if spec.debounce is not None:
        found += _debounce_errors(spec, spec.debounce)
    return found


def rate_errors(pointer: str, rate: Rate) -> list[FieldError]:
    """Return what is wrong with a rate."""
    found = range_errors(f"{pointer}/count", rate.count, 1, AT_ONCE_MAX)
    found += range_errors(f"{pointer}/seconds", rate.seconds, 0.001, RATE_SECONDS_MAX)
    if rate.burst is not None:
        found += range_errors(f"{pointer}/burst", rate.burst, 1, AT_ONCE_MAX)
    return found


def _key_errors(pointer: str, key: str) -> list[FieldError]:
    if not key:
        return [FieldError(pointer=pointer, code="out-of-range", detail="must not be empty")]
    return text_errors(pointer, key, KEY_MAX)


def _unique_errors(spec: TaskSpec, unique: Unique) -> list[FieldError]:
    found = _key_errors("#/unique/key", unique.key)
    if spec.debounce is not None:
        found.append(
            FieldError(pointer="#/unique", code="invalid-value", detail="a task is unique or debounced, not both")
        )
    return found


def _debounce_errors(spec: TaskSpec, debounce: Debounce) -> list[FieldError]:
    found = _key_errors("#/debounce/key", debounce.key)
    found += range_errors("#/debounce/seconds", debounce.seconds, 0.001, RATE_SECONDS_MAX)
    if debounce.max_seconds is not None:
        found += range_errors("#/debounce/max_seconds", debounce.max_seconds, debounce.seconds, RATE_SECONDS_MAX)
    for name, value in (("run_at", spec.run_at), ("idempotency_key", spec.idempotency_key)):
        if value is not None:
            detail = f"a debounced task has no {name}"
            found.append(FieldError(pointer=f"#/{name}", code="invalid-value", detail=detail))
    return found
