"""From a submission to a task: checks and construction, pure."""

import re
from datetime import datetime
from hashlib import sha256
from typing import Final

import msgspec

from mcp_control.agents.matching import parse_range
from mcp_control.kernel.clock import to_millis
from mcp_control.kernel.errors import FieldError, IdempotencyKeyInvalid, Invalid
from mcp_control.kernel.text import label_errors, name_errors, range_errors, text_errors
from mcp_control.tasks.budgets import budget_errors
from mcp_control.tasks.lanes import lane_key
from mcp_control.tasks.limiting import spec_errors
from mcp_control.tasks.model import (
    DEFAULT_RETRY,
    NO_LINKS,
    NO_NEEDS,
    PRIORITIES,
    Links,
    Needs,
    Origin,
    RetryPolicy,
    Task,
    TaskSpec,
    TaskState,
)
from mcp_control.tasks.ranking import ORDER_SHIFT, POINT_MS, rank_of

PAYLOAD_MAX: Final = 1 << 20
TIMEOUT_MAX: Final = 30 * 86_400.0
_AHEAD_MAX_MS: Final = 10 * 366 * 86_400_000
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_NO_DRAWS: Final[list[str]] = []
# Ordered: labels written in another order are the same labels.
_encode: Final = msgspec.msgpack.Encoder(order="deterministic").encode


def check_key(key: str | None) -> None:
    """Raise IdempotencyKeyInvalid unless the key is absent or 1 to 255 printable ASCII characters without blanks."""
    if key is not None and not _KEY.fullmatch(key):
        raise IdempotencyKeyInvalid("an idempotency key has 1 to 255 printable ASCII characters without blanks")


def priority_number(priority: int | str) -> int | None:
    """Return the number a priority means, None where it means none."""
    if isinstance(priority, str):
        return PRIORITIES.get(priority)
    return priority if 0 <= priority <= 100 else None


def share_of(spec: TaskSpec) -> str:
    """Return the key of the share that a submission belongs to."""
    return "" if spec.fairness is None else spec.fairness.key


def retry_errors(pointer: str, retry: RetryPolicy) -> list[FieldError]:
    """Return what is wrong with a retry policy."""
    return [
        *range_errors(f"{pointer}/max_attempts", retry.max_attempts, 1, 100),
        *range_errors(f"{pointer}/first_seconds", retry.first_seconds, 0, 86_400),
        *range_errors(f"{pointer}/factor", retry.factor, 1, 10),
        *range_errors(f"{pointer}/longest_seconds", retry.longest_seconds, 0, 7 * 86_400),
    ]


def needs_errors(pointer: str, needs: Needs) -> list[FieldError]:
    """Return what is wrong with requirements."""
    found = label_errors(f"{pointer}/labels", needs.labels)
    if len(needs.capabilities) > 64:
        found.append(
            FieldError(pointer=f"{pointer}/capabilities", code="limit-exceeded", detail="at most 64 capabilities")
        )
    for name, wanted in list(needs.capabilities.items())[:64]:
        found += name_errors(f"{pointer}/capabilities", name)
        found += version_errors(f"{pointer}/capabilities", wanted)
    if needs.sticky is not None:
        found += text_errors(f"{pointer}/sticky/key", needs.sticky.key, 128)
        if not needs.sticky.key:
            found.append(FieldError(pointer=f"{pointer}/sticky/key", code="out-of-range", detail="must not be empty"))
    if needs.agent is not None:
        found += name_errors(f"{pointer}/agent", needs.agent)
    found += range_errors(f"{pointer}/slots", needs.slots, 1, 10_000)
    resources = needs.resources
    for name, value in (("cpu", resources.cpu), ("memory_mb", resources.memory_mb), ("gpu", resources.gpu)):
        found += range_errors(f"{pointer}/resources/{name}", value, 0, 1e9)
    return found


def version_errors(pointer: str, wanted: str) -> list[FieldError]:
    """Return what is wrong with a version range."""
    try:
        parse_range(wanted)
    except ValueError:
        return [
            FieldError(
                pointer=pointer,
                code="invalid-version",
                detail="a version range is *, 2, 1.4 or comparisons as in >=1.2,<2",
            )
        ]
    return []


def _time_errors(pointer: str, moment: datetime, now: int) -> list[FieldError]:
    if moment.tzinfo is None:
        return [
            FieldError(
                pointer=pointer, code="invalid-timestamp", detail="a timestamp needs a zone, e.g. 2026-11-22T10:00:00Z"
            )
        ]
    # Years 1 and 9999 leave the range of the clock once a zone is applied.
    if not 1971 <= moment.year <= 9000 or to_millis(moment) > now + _AHEAD_MAX_MS:
        return [
            FieldError(pointer=pointer, code="invalid-timestamp", detail="out of the years this clock can wait for")
        ]
    return []


def check(spec: TaskSpec, now: int) -> None:
    """Raise Invalid with everything that is wrong with a submission; IdempotencyKeyInvalid for its key."""
    check_key(spec.idempotency_key)
    found = name_errors("#/type", spec.type)
    if spec.type_version != "*":
        found += version_errors("#/type_version", spec.type_version)
    if priority_number(spec.priority) is None:
        found.append(
            FieldError(pointer="#/priority", code="out-of-range", detail="0 to 100, or critical, high, medium, low")
        )
    if spec.fairness is not None:
        found += name_errors("#/fairness/key", spec.fairness.key, 64) if spec.fairness.key else []
        found += range_errors("#/fairness/weight", spec.fairness.weight, 0.1, 100)
    if spec.labels:
        found += label_errors("#/labels", spec.labels)
    if spec.needs != NO_NEEDS:
        found += needs_errors("#/needs", spec.needs)
    if spec.retry != DEFAULT_RETRY:
        found += retry_errors("#/retry", spec.retry)
    if spec.timeout is not None:
        found += range_errors("#/timeout", spec.timeout, 0.001, TIMEOUT_MAX)
    if spec.budget is not None:
        found += budget_errors("#/budget", spec.budget)
    if spec.run_at is not None:
        found += _time_errors("#/run_at", spec.run_at, now)
    if spec.deadline is not None:
        wrong = _time_errors("#/deadline", spec.deadline, now)
        if not wrong and to_millis(spec.deadline) <= now:
            wrong = [FieldError(pointer="#/deadline", code="out-of-range", detail="must lie in the future")]
        found += wrong
    for pointer, value in (("#/context_id", spec.context_id), ("#/parent_id", spec.parent_id)):
        if value is not None:
            found += text_errors(pointer, value, 128)
    if len(memoryview(spec.payload)) > PAYLOAD_MAX:
        found.append(
            FieldError(
                pointer="#/payload", code="payload-too-large", detail="at most 1 MiB; send large data as an artifact"
            )
        )
    if spec.limits or spec.unique is not None or spec.debounce is not None:
        found += spec_errors(spec)
    if found:
        raise Invalid(found[0].detail, errors=found[:50])


def digest_of(spec: TaskSpec) -> str:
    """Return the SHA-256 of everything a submission says but its key, to tell a repetition from another request."""
    return sha256(_encode(msgspec.structs.replace(spec, idempotency_key=None))).hexdigest()


def new_task(
    spec: TaskSpec,
    *,
    task_id: str,
    tenant: str,
    origin: Origin,
    now: int,
    order: int,
    links: Links = NO_LINKS,
    draws: list[str] = _NO_DRAWS,
    traceparent: str | None = None,
    generation: int = 1,
    expected_ms: int = 0,
    point_ms: int = POINT_MS,
) -> Task:
    """Return the task a checked submission begins as: `queued`, or `scheduled` when `run_at` lies ahead.

    Args:
        order: its place in line; one that is to begin later has that of then.
        expected_ms: how long tasks of its type usually take, 0 where that is not known.
        point_ms: what a point of priority is worth.
    """
    not_before = None if spec.run_at is None else to_millis(spec.run_at)
    waits = not_before is not None and not_before > now
    if not_before is not None and waits:
        order = max(order, not_before << ORDER_SHIFT)
    priority = priority_number(spec.priority) or 0
    deadline_at = None if spec.deadline is None else to_millis(spec.deadline)
    if spec.context_id is not None or spec.parent_id is not None:
        links = msgspec.structs.replace(links, context_id=spec.context_id, parent_id=spec.parent_id)
    return Task(
        id=task_id,
        version=0,
        tenant=tenant,
        type=spec.type,
        type_version=spec.type_version,
        state=TaskState.SCHEDULED if waits else TaskState.QUEUED,
        state_at=now,
        created_at=now,
        reason="not-before" if waits else "",
        priority=priority,
        fairness=spec.fairness,
        lane=lane_key(tenant, spec.type, spec.type_version, spec.needs, priority, share_of(spec)),
        order=order,
        rank=rank_of(order, priority, deadline_at, expected_ms, point_ms),
        generation=generation,
        needs=spec.needs,
        labels=spec.labels,
        retry=spec.retry,
        timeout_ms=None if spec.timeout is None else max(1, round(spec.timeout * 1000)),
        not_before=not_before if waits else None,
        deadline_at=deadline_at,
        idempotency_key=spec.idempotency_key,
        digest="" if spec.idempotency_key is None else digest_of(spec),
        origin=origin,
        links=links,
        draws=draws if spec.budget is None else [task_id, *draws],
        trust=spec.trust,
        traceparent=traceparent,
    )
