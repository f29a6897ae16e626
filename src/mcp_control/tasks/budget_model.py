"""Budgets: what a task, or all tasks of a run, may use, and what they have used."""

from typing import Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT

Reported = Literal["calls", "tokens", "money_micros"]
OnExhausted = Literal["stop", "pause", "ask"]
MEASURES: Final = ("wall_ms", "attempts", "calls", "tokens", "money_micros")
"""What is counted: milliseconds of attempts added up, attempts given out, and what agents tell of calls, tokens and money."""
REPORTED: Final = ("calls", "tokens", "money_micros")
MICROS: Final = 1_000_000


class Budget(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What may be used at most; what is not named is not limited.

    Attributes:
        wall_seconds: seconds of attempts, added up over all attempts and all tasks that draw from it.
        attempts: attempts given out, whatever became of them.
        calls, tokens: as agents report them.
        money_micros: millionths of the currency you count in, as agents report them.
        depth: how many levels of tasks may be below its owner; 0 is none.
        on_exhausted: `stop` ends the task `failed`; `pause` frees its slot and waits until somebody raises the budget; `ask` does the
            same and puts a question that can be answered with no.
    """

    wall_seconds: float | None = None
    attempts: int | None = None
    calls: int | None = None
    tokens: int | None = None
    money_micros: int | None = None
    depth: int | None = None
    on_exhausted: OnExhausted = "stop"


class Amounts(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """Something of everything that is counted."""

    wall_seconds: float = 0.0
    attempts: int = 0
    calls: int = 0
    tokens: int = 0
    money_micros: int = 0


class Spent(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What an attempt has used so far, in all: telling it again, or late, changes nothing.

    Attributes:
        number: raised with every telling of an attempt; of what is held, the highest number counts.
        held: what it has reserved beyond what it has used.
        ask: what it wants to reserve beyond that.
    """

    number: int = 0
    calls: int = 0
    tokens: int = 0
    money_micros: int = 0
    held: dict[Reported, int] = {}
    ask: dict[Reported, int] = {}


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What a task has used, as it was last written to its budgets.

    Attributes:
        total: by measure, over all attempts.
        attempt: the attempt that `told` is about; told: what it said last, measure by measure the highest.
        at: wall milliseconds up to which the time of attempts is in `total`.
        left: of what is limited, what was left then.
    """

    total: dict[str, int] = {}
    attempt: int = 0
    told: Spent = Spent()
    at: int = 0
    left: dict[str, int] = {}


class Ceiling(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """When the attempt under way has used up the time that is left in a budget, and what is then to be said."""

    at: int
    owner: str
    allowed: int
    on_exhausted: OnExhausted


class Account(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The stored budget of a task or run, and what was used of it. Its id is that of its owner.

    Attributes:
        depth: how deep the owner itself is.
        spent, held: by measure; what all tasks that draw from it have used, and what they have reserved beyond that.
        warned: measures of which four fifths are used and that was told.
    """

    id: str
    version: int = 0
    tenant: str = DEFAULT_TENANT
    budget: Budget = Budget()
    depth: int = 0
    spent: dict[str, int] = {}
    held: dict[str, int] = {}
    warned: list[str] = []
    schema: int = 1


class Over(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Which limit of whose budget is used up."""

    owner: str
    limit: str
    used: int
    allowed: int
    on_exhausted: OnExhausted = "stop"


class BudgetEdit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A change of limits: `set` replaces those it names, `add` is added to limits that are there."""

    set: Budget | None = None
    add: Amounts = Amounts()


class BudgetView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A budget as callers see it.

    Attributes:
        left: of what is limited: what is neither used nor reserved.
        exhausted: the first limit that is used up; empty while none is.
    """

    owner: str
    budget: Budget
    used: Amounts
    reserved: Amounts = Amounts()
    left: dict[str, float]
    exhausted: str = ""


class SpendAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a report of usage: whether what was to be held is held, and what is left of what is limited."""

    granted: bool
    left: dict[str, float] = {}


BUDGET_KIND: Final = Kind(name="budget", fields=(Field("tenant"),), indexes=(Index("budget_tenant", ("tenant", "id")),))
