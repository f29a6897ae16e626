"""What may still be used of a budget, and what is counted against it: pure rules.

A report says what an attempt has used in all, so telling it again, late or out of order counts once: measure by measure the highest
figure counts, and what is added to a budget is what came on top. Time and attempts are counted by the server.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Entity
from mcp_control.kernel.errors import FieldError
from mcp_control.kernel.text import range_errors
from mcp_control.tasks.budget_model import (
    BUDGET_KIND,
    MEASURES,
    REPORTED,
    Account,
    Amounts,
    Budget,
    BudgetEdit,
    BudgetView,
    Ceiling,
    Over,
    Reported,
    Spent,
    Usage,
)
from mcp_control.tasks.model import Failure, Task

WARNED_AT: Final = 0.8
CODE: Final = "budget-exhausted"
_MOST: Final = 1 << 53
_NOTHING: Final = Usage()
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Account).decode
Counts = Mapping[str, int]


def limits(budget: Budget) -> dict[str, int]:
    """Return what is limited, by measure."""
    found = {name: getattr(budget, name) for name in MEASURES[1:]}
    found["wall_ms"] = None if budget.wall_seconds is None else round(budget.wall_seconds * 1000)
    return {name: found[name] for name in MEASURES if found[name] is not None}


def budget_errors(pointer: str, budget: Budget) -> list[FieldError]:
    """Return what is wrong with a budget."""
    found: list[FieldError] = []
    if budget.wall_seconds is not None:
        found += range_errors(f"{pointer}/wall_seconds", budget.wall_seconds, 0.001, 1e9)
    for name in MEASURES[1:]:
        value = getattr(budget, name)
        if value is not None:
            found += range_errors(f"{pointer}/{name}", value, 1, _MOST)
    if budget.depth is not None:
        found += range_errors(f"{pointer}/depth", budget.depth, 0, 100)
    return found


def merged(definition: Budget | None, request: Budget | None) -> Budget | None:
    """Return the budget of a run: what the request names, for the rest what the definition says."""
    if definition is None or request is None:
        return request or definition
    return Budget(
        **{
            name: getattr(definition, name) if getattr(request, name) is None else getattr(request, name)
            for name in (*MEASURES[1:], "wall_seconds", "depth")
        },
        on_exhausted=definition.on_exhausted if request.on_exhausted == "stop" else request.on_exhausted,
    )


def edited(budget: Budget, edit: BudgetEdit) -> Budget:
    """Return a budget with limits set and raised. What is not limited stays so when something is added to it."""
    if edit.set is not None:
        named = {name: value for name in Budget.__struct_fields__ if (value := getattr(edit.set, name)) is not None}
        budget = replace(budget, **named)
    added = {
        name: getattr(budget, name) + more
        for name in Amounts.__struct_fields__
        if (more := getattr(edit.add, name)) and getattr(budget, name) is not None
    }
    return replace(budget, **added)


def owners(task: Task) -> list[str]:
    """Return whose budgets are charged for a task, the outermost last; the run of a task is always told what it used."""
    run = task.links.run_id
    return [*task.draws, run] if run is not None and run not in task.draws else task.draws


def opening(task: Task, budget: Budget) -> Entity:
    """Return the entity of a new task's own budget."""
    return written(Account(id=task.id, tenant=task.tenant, budget=budget, depth=task.links.depth))


def written(account: Account) -> Entity:
    """Return the entity that writes an account over the version it was read at."""
    after = replace(account, version=account.version + 1)
    return Entity(BUDGET_KIND.name, account.id, account.version, {"tenant": account.tenant}, _encode(after))


def account_in(entity: Entity) -> Account:
    """Return the account in a stored entity."""
    return _decode(entity.hot)


# --- counting -----------------------------------------------------------------------------------------------------


def booked(
    task: Task, told: Spent | None, now: int, *, over: bool = False
) -> tuple[Usage, dict[str, int], dict[str, int]]:
    """Return the usage of a task with everything counted up to now, what that adds to its budgets, and to what is held of them.

    Args:
        told: what its attempt under way says; None says nothing new.
        over: the attempt ends here, so that it holds nothing any more.
    """
    usage = task.usage or _NOTHING
    known = usage.told if usage.attempt == task.attempt else Spent()
    added = {"wall_ms": _time(task, usage.at, now), "attempts": task.attempt - usage.total.get("attempts", 0)}
    latest = known
    if told is not None:
        highest = {name: max(getattr(known, name), getattr(told, name)) for name in REPORTED}
        added.update({name: highest[name] - getattr(known, name) for name in REPORTED})
        newer = told.number > known.number
        latest = Spent(number=max(known.number, told.number), held=told.held if newer else known.held, **highest)
    if over or task.lease is None:
        latest = replace(latest, held={})
    held = {name: change for name in REPORTED if (change := latest.held.get(name, 0) - usage.told.held.get(name, 0))}
    added = {name: more for name, more in added.items() if more}
    return Usage(total=_plus(usage.total, added), attempt=task.attempt, told=latest, at=now), added, held


def _time(task: Task, since: int, now: int) -> int:
    """Return the milliseconds of attempts after a moment. Of attempts before the last 25 nothing is known any more."""
    spans = [(attempt.assigned_at, attempt.ended_at) for attempt in task.attempts]
    if task.lease is not None:
        spans.append((task.lease.since, now))
    return sum(max(0, end - max(begin, since)) for begin, end in spans)


def _plus(counts: Counts, more: Counts) -> dict[str, int]:
    return {name: total for name in MEASURES if (total := counts.get(name, 0) + more.get(name, 0)) > 0}


def charged(account: Account, added: Counts, held: Counts) -> Account:
    """Return an account to which something more was used and held (or given back)."""
    return replace(account, spent=_plus(account.spent, added), held=_plus(account.held, held))


def newly_warned(account: Account) -> list[Over]:
    """Return the limits of which four fifths are used now and were not when it was last told."""
    return [
        Over(owner=account.id, limit=name, used=account.spent.get(name, 0), allowed=allowed)
        for name, allowed in limits(account.budget).items()
        if name not in account.warned and account.spent.get(name, 0) >= WARNED_AT * allowed
    ]


# --- judging ------------------------------------------------------------------------------------------------------


def passed(accounts: Iterable[Account]) -> Over | None:
    """Return the first limit of which more is used than allowed: what is under way must stop."""
    return _first(accounts, 1)


def used_up(accounts: Iterable[Account]) -> Over | None:
    """Return the first limit of which nothing is left: nothing more may begin."""
    return _first(accounts, 0)


def _first(accounts: Iterable[Account], beyond: int) -> Over | None:
    for account in accounts:
        for name, allowed in limits(account.budget).items():
            used = account.spent.get(name, 0)
            if used >= allowed + beyond:
                return Over(
                    owner=account.id, limit=name, used=used, allowed=allowed, on_exhausted=account.budget.on_exhausted
                )
    return None


def holding(told: Spent) -> Spent:
    """Return what an agent says as if it had what it asks for."""
    held = {name: total for name in REPORTED if (total := told.held.get(name, 0) + told.ask.get(name, 0))}
    return replace(told, held=held, ask={})


def fits(accounts: Iterable[Account], asked: Mapping[Reported, int]) -> bool:
    """Say whether what is used and held is within the limits of everything that was asked for."""
    names = [name for name, more in asked.items() if more > 0]
    return all(
        account.spent.get(name, 0) + account.held.get(name, 0) <= allowed
        for account in accounts
        for name, allowed in limits(account.budget).items()
        if name in names
    )


def granted(before: Usage | None, after: Usage, attempt: int, told: Spent) -> bool:
    """Say whether an attempt now holds what it asked for; an answer that got lost is given again."""
    if before is not None and before.attempt == attempt and before.told.number > told.number:
        return False  # it has said something newer, which did not count on this
    return after.told.held == holding(told).held


def too_deep(accounts: Iterable[Account], depth: int) -> Over | None:
    """Return the limit that forbids a task at this depth."""
    for account in accounts:
        allowed = account.budget.depth
        if allowed is not None and depth - account.depth > allowed:
            return Over(owner=account.id, limit="depth", used=depth - account.depth, allowed=allowed)
    return None


def left(accounts: Iterable[Account]) -> dict[str, int]:
    """Return what is neither used nor held of what is limited, by measure; of several budgets the least."""
    found: dict[str, int] = {}
    for account in accounts:
        for name, allowed in limits(account.budget).items():
            rest = max(0, allowed - account.spent.get(name, 0) - account.held.get(name, 0))
            found[name] = min(rest, found.get(name, rest))
    return found


def ceiling(accounts: Iterable[Account], now: int) -> Ceiling | None:
    """Return when the time that is left of these budgets is over for an attempt that is under way."""
    found: Ceiling | None = None
    for account in accounts:
        allowed = limits(account.budget).get("wall_ms")
        if allowed is not None:
            at = now + max(0, allowed - account.spent.get("wall_ms", 0))
            if found is None or at < found.at:
                found = Ceiling(at=at, owner=account.id, allowed=allowed, on_exhausted=account.budget.on_exhausted)
    return found


# --- showing ------------------------------------------------------------------------------------------------------


def shown(counts: Counts) -> dict[str, float]:
    """Return counts as callers see them: time in seconds."""
    return {
        "wall_seconds" if name == "wall_ms" else name: value / 1000 if name == "wall_ms" else value
        for name, value in counts.items()
    }


def amounts(counts: Counts) -> Amounts:
    """Return counts as a value of the API."""
    return Amounts(
        wall_seconds=counts.get("wall_ms", 0) / 1000,
        **{name: counts.get(name, 0) for name in MEASURES[1:]},
    )


def budget_view(account: Account) -> BudgetView:
    """Return a budget as callers see it."""
    over = used_up((account,))
    return BudgetView(
        owner=account.id,
        budget=account.budget,
        used=amounts(account.spent),
        reserved=amounts(account.held),
        left=shown(left((account,))),
        exhausted="" if over is None else public_name(over.limit),
    )


def public_name(limit: str) -> str:
    """Return the name of a limit as callers know it."""
    return "wall_seconds" if limit == "wall_ms" else limit


def sentence(over: Over) -> str:
    """Say which limit is used up."""
    whose = f"the budget of {over.owner}"
    used, allowed = (
        f"{value / 1000:g}" if over.limit == "wall_ms" else str(value) for value in (over.used, over.allowed)
    )
    return f"{whose} is exhausted: {public_name(over.limit)}, used {used}, allowed {allowed}"


def told_of(over: Over) -> dict[str, object]:
    """Return what events and failures say of a limit that is used up."""
    scale = 1000 if over.limit == "wall_ms" else 1
    return {
        "limit": public_name(over.limit),
        "used": over.used / scale if scale > 1 else over.used,
        "allowed": over.allowed / scale if scale > 1 else over.allowed,
        "owner": over.owner,
    }


def failure_of(over: Over) -> Failure:
    """Return the failure of a task whose budget is used up; no repetition will help."""
    return Failure(error_class="permanent", cause="budget", code=CODE, message=sentence(over), data=told_of(over))


def warned(account: Account, news: Sequence[Over]) -> Account:
    """Return an account of which this was told; what was raised since then can be told of again."""
    known = [
        name for name in account.warned if account.spent.get(name, 0) >= WARNED_AT * limits(account.budget).get(name, 0)
    ]
    return replace(account, warned=[*known, *(over.limit for over in news)])


def out_of_time(ceiling: Ceiling) -> Failure:
    """Return the failure of an attempt that has used up the time of a budget."""
    allowed = ceiling.allowed
    return failure_of(Over(owner=ceiling.owner, limit="wall_ms", used=allowed, allowed=allowed))
