"""Limits: what may run at once or start in a time, per key; and keys that keep tasks from being there twice.

Everything a task must have before it may wait for an agent is a hold, an entity whose id is made of the key and a number. A change that
takes a hold creates that entity, so of two servers that take the same number one is refused: limits are exact without a coordinator.
"""

from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind

LIMITS_MAX: Final = 8
AT_ONCE_MAX: Final = 1000
RATE_SECONDS_MAX: Final = 86_400.0

End = Literal["start", "attempt", "final", "due"]
"""When a hold ends: an agent is given the task · the attempt ends and another may follow · the task is final · its time has come."""


class Rate(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """So many starts in so many seconds.

    Attributes:
        burst: how many may start at once after a pause; `count` unless given. In any time t there are at most
            `burst + t · count / seconds` starts.
    """

    count: int
    seconds: float = 1.0
    burst: int | None = None


class Limit(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A limit that a task brings along; it counts for all tasks of the tenant with the same key.

    Attributes:
        concurrency: so many tasks of the key may be queued, assigned or running at once.
        on_excess: what a task over the rate does: wait (`delay`), or not be accepted (`drop`).
    """

    key: str
    concurrency: int | None = None
    rate: Rate | None = None
    on_excess: Literal["delay", "drop"] = "delay"


class Unique(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A key that only one task of the tenant has at a time.

    Attributes:
        while_: `while` outside of Python. `unfinished`: until the task is final; `queued`: until an agent is given it.
        on_conflict: what a second submission gets: an error, the task that is there, or its place. Only a task that waits is replaced.
    """

    key: str
    while_: Literal["queued", "unfinished"] = msgspec.field(default="unfinished", name="while")
    on_conflict: Literal["reject", "return_existing", "replace"] = "reject"


class Debounce(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """Wait for the last of several submissions of a type with the same key: each brings the payload and begins the wait anew.

    Attributes:
        seconds: how long nothing more must come.
        max_seconds: how long the first submission waits at most.
    """

    key: str
    seconds: float
    max_seconds: float | None = None


class Gate(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A limit as a task has it: its own, or what a rule gave it.

    Attributes:
        rule: name of the rule, whose present number counts; empty for the task's own.
        slots: how many may be at once, 0 where `rate` is the limit.
    """

    key: str
    rule: str = ""
    slots: int = 0
    rate: Rate | None = None


class Hold(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What a task holds.

    Attributes:
        name: of the gate, see `limiting.gate_name`.
        version: of the entity.
        window_ms: of a rate: the number may be taken again that long after the start.
    """

    name: str
    number: int = 0
    ends: End
    version: int = 0
    window_ms: int = 0


class Taken(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A hold as it lies in the store.

    Attributes:
        holder: id of the task; empty when a start has used it up.
        until: when a used one is free again (milliseconds).
    """

    name: str
    number: int
    holder: str = ""
    since: int = 0
    until: int | None = None


class HoldChange(msgspec.Struct, frozen=True, gc=False):
    """What became of a number of a gate by a commit: taken by a task, used by a start, or free again (None).

    `version` is that of the entity after it.
    """

    name: str
    number: int
    taken: Taken | None
    version: int = 0


HOLD_KIND: Final = Kind(
    name="hold",
    fields=(Field("gate"), Field("holder"), Field("until", "int")),
    indexes=(
        Index("hold_gate", ("gate", "id")),
        Index("hold_holder", ("holder", "id")),
        Index("hold_until", ("until", "id")),
    ),
)


class RuleMatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which tasks a rule is for. `type` may hold `*` and `?`; every label named must have that value."""

    type: str = "*"
    labels: dict[str, str] = {}


class LimitSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an operator says of a rule: either `concurrency` or `rate`.

    Attributes:
        key: CEL over `type`, `labels` and `payload`; tasks with the same value share the limit. Where it has no value for a task, the
            rule does not apply to it. Without a key all tasks share the limit.
        concurrency: a number, or CEL over `type` and `labels` that gives one, as in `labels.tier == "premium" ? 10 : 1`.
    """

    match: RuleMatch = RuleMatch()
    key: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    concurrency: int | str | None = None
    rate: Rate | None = None


class LimitRule(msgspec.Struct, frozen=True, kw_only=True):
    """A stored rule."""

    id: str
    version: int
    tenant: str
    name: str
    spec: LimitSpec
    changed_at: int
    changed_by: str


RULE_KIND: Final = Kind(
    name="limit_rule",
    fields=(Field("tenant"), Field("name")),
    indexes=(Index("limit_rule_name", ("name",), unique=True), Index("limit_rule_tenant", ("tenant", "id"))),
)
KINDS: Final = (HOLD_KIND, RULE_KIND)


class LimitUse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a key of a rule is used now. `tasks` are the first that hold it, `since` when the first took it."""

    key: str
    taken: int
    waiting: int
    tasks: list[str] = []
    since: datetime | None = None


class LimitView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A rule as callers see it. `use` names its busiest keys, where one rule is asked for."""

    name: str
    match: RuleMatch = RuleMatch()
    key: str = ""
    concurrency: int | str | None = None
    rate: Rate | None = None
    changed_at: datetime
    changed_by: str
    use: list[LimitUse] = []
