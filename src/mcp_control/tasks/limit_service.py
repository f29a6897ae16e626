"""LimitManager: the verbs for rules of limits that every door calls, and what keeps limits going."""

import builtins
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.background import Background
from mcp_control.kernel.changes import Change, Fact, Key, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict, FieldError, Invalid, NotFound, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.kernel.text import label_errors, name_errors, range_errors
from mcp_control.monitoring.metrics import Metrics
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import LANE_END, Store
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.keyed import KeyedSubmission
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.limit_expressions import LimitExpression
from mcp_control.tasks.limit_model import AT_ONCE_MAX, HOLD_KIND, RULE_KIND, LimitRule, LimitSpec, LimitUse, LimitView
from mcp_control.tasks.limit_rules import (
    CONCURRENCY_ROOTS,
    KEY_ROOTS,
    RULES_MAX,
    Rules,
    concerns,
    read_rule,
    write_rule,
)
from mcp_control.tasks.limiting import is_free, rate_errors, read_taken
from mcp_control.tasks.limits import Limits
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.settling import Settler

_log = structlog.get_logger(__name__)
_TRIES: Final = 10
_HOLDS: Final = 5000
_KEYS_SHOWN: Final = 20
_TASKS_SHOWN: Final = 10
_WAITING_MAX: Final = 10_000
_SWEEP_SECONDS: Final = 0.5
_TIDY_SECONDS: Final = 60.0
Once = Callable[[int], Awaitable[object]]


class LimitManager:
    """Keeps the rules, and lets tasks through their limits.

    Attributes:
        limits: what lets them through.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        tasks: TaskOrchestrator,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._rules = Rules(store)
        self.limits = Limits(store, clock, ids, ledger, self._rules)
        self.limits.attach(settler.handing, dispatcher)
        tasks.keyed = KeyedSubmission(store, clock, ledger, settler, dispatcher, self.limits)
        metrics.watch_total("leaked_holds", "holds whose task had ended without them", lambda: self.limits.leaked)
        self._background = Background("limits")

    async def start(self) -> None:
        """Learn the rules, and begin to let tasks through."""
        await self._rules.load()
        self._background.begin(self.limits.run())

    async def stop(self) -> None:
        """End what runs in the background."""
        await self._background.close()

    def loops(self) -> builtins.list[tuple[str, float, Once]]:
        """Return name, pace in seconds and what to do on one server: what nobody heard of, and what should not be there."""
        return [("limits", _SWEEP_SECONDS, self.limits.sweep), ("limits-tidy", _TIDY_SECONDS, self.limits.tidy)]

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear that a rule was changed, by whatever server. Called with all facts, on the loop."""
        if concerns(facts):
            self._background.begin(self._changed())

    async def _changed(self) -> None:
        """Take in the rules as they are now, and look at everything that waits."""
        try:
            await self._rules.load()
            await self.limits.revisit()
        except Problem as problem:  # the next sweep finds what waits, and the next pass that misses a rule loads them
            _log.warning("limits.rules_unavailable", code=problem.code)

    async def set(self, actor: Actor, name: str, spec: LimitSpec) -> LimitView:
        """Make a rule what the spec says, whether it is there or not; it counts at once for what waits and for what comes.

        A lower number ends nothing that runs. A new rule concerns tasks submitted from now on.

        Raises:
            Invalid: something is wrong with it, or there are too many rules.
        """
        allow(actor, "limits.set", name)
        _check(name, spec)
        for _ in range(_TRIES):
            now = self._clock.now()
            known = await self._named(actor.tenant, name)
            if known is not None and known.spec == spec:
                return _view(known)
            if (
                known is None
                and await self._store.count(RULE_KIND.name, [Where("name", "gt", "")], RULES_MAX) >= RULES_MAX
            ):
                raise Invalid(f"at most {RULES_MAX} rules")
            rule = LimitRule(
                id=self._ids.new("limit") if known is None else known.id,
                version=0 if known is None else known.version,
                tenant=actor.tenant,
                name=name,
                spec=spec,
                changed_at=now,
                changed_by=actor.id,
            )
            told = self._fact("limit.set", rule, actor, now)
            (problem,) = await self._store.commit([Change([write_rule(rule)], (), [told])])
            if problem is None:
                await self._changed()
                return _view(rule)
            if not isinstance(problem, Conflict):
                raise problem
        raise Conflict("too many changes of this rule at once")

    async def remove(self, actor: Actor, name: str) -> None:
        """Remove a rule; what waited for it goes on. Raises NotFound."""
        allow(actor, "limits.remove", name)
        rule = await self._one(actor, name)
        told = self._fact("limit.removed", rule, actor, self._clock.now())
        (problem,) = await self._store.commit([Change((), [Key(RULE_KIND.name, rule.id)], [told])])
        if problem is not None:
            raise problem
        await self._changed()

    async def get(self, actor: Actor, name: str) -> LimitView:
        """Return a rule with its busiest keys. Raises NotFound."""
        allow(actor, "limits.get", name)
        rule = await self._one(actor, name)
        return replace(_view(rule), use=await self._use(rule))

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[LimitView]:
        """Return a page of rules, by name."""
        allow(actor, "limits.list")
        after = None if cursor is None else decode_cursor("limits", cursor, 2)
        where = [
            Where("name", "ge", actor.tenant + LANE_END),
            Where("name", "lt", actor.tenant + chr(ord(LANE_END) + 1)),
        ]
        rows = await self._store.find(RULE_KIND.name, Query(where=where, order="name", after=after, limit=limit + 1))
        shown = rows[:limit]
        return Page(
            items=[_view(read_rule(row)) for row in shown],
            next_cursor=encode_cursor("limits", [shown[-1].index["name"], shown[-1].id]) if len(rows) > limit else None,
        )

    async def _use(self, rule: LimitRule) -> builtins.list[LimitUse]:
        kind = "slot" if rule.spec.rate is None else "rate"
        prefix = LANE_END.join((rule.tenant, kind, rule.name)) + LANE_END
        now = self._clock.now()
        query = Query(
            where=[Where("gate", "ge", prefix), Where("gate", "lt", _end(prefix))], order="gate", limit=_HOLDS
        )
        taken = [read_taken(row) for row in await self._store.find(HOLD_KIND.name, query)]
        taken = [one for one in taken if not is_free(one, now)]
        found: list[LimitUse] = []
        for name, count in Counter(one.name for one in taken).most_common(_KEYS_SHOWN):
            holders = sorted((one for one in taken if one.name == name and one.holder), key=lambda one: one.since)
            where = [Where("gate", "ge", name + LANE_END), Where("gate", "lt", _end(name + LANE_END))]
            found.append(
                LimitUse(
                    key=name.removeprefix(prefix),
                    taken=count,
                    waiting=await self._store.count("task", where, _WAITING_MAX),
                    tasks=[one.holder for one in holders[:_TASKS_SHOWN]],
                    since=to_datetime(holders[0].since) if holders else None,
                )
            )
        return found

    async def _named(self, tenant: str, name: str) -> LimitRule | None:
        query = Query(where=[Where("name", "eq", tenant + LANE_END + name)], limit=1)
        rows = await self._store.find(RULE_KIND.name, query)
        return read_rule(rows[0]) if rows else None

    async def _one(self, actor: Actor, name: str) -> LimitRule:
        rule = await self._named(actor.tenant, name)
        if rule is None:
            raise NotFound("no such limit")
        return rule

    def _fact(self, kind: str, rule: LimitRule, actor: Actor, now: int) -> Fact:
        return fact(kind, rule.name, actor.id, now, rule.spec, tenant=rule.tenant)


def _end(prefix: str) -> str:
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _check(name: str, spec: LimitSpec) -> None:
    """Raise Invalid with everything that is wrong with a rule."""
    found = name_errors("#/name", name, 63) + label_errors("#/match/labels", spec.match.labels)
    if not 1 <= len(spec.match.type) <= 128:
        found.append(FieldError(pointer="#/match/type", code="out-of-range", detail="1 to 128 characters"))
    if (spec.concurrency is None) == (spec.rate is None):
        found.append(
            FieldError(pointer="#", code="missing-field", detail="a limit has one of `concurrency` and `rate`")
        )
    if spec.rate is not None:
        found += rate_errors("#/rate", spec.rate)
    if isinstance(spec.concurrency, int):
        found += range_errors("#/concurrency", spec.concurrency, 1, AT_ONCE_MAX)
    elif spec.concurrency is not None:
        found += _expression_errors("#/concurrency", spec.concurrency, CONCURRENCY_ROOTS)
    if spec.key:
        found += _expression_errors("#/key", spec.key, KEY_ROOTS)
    if found:
        raise Invalid(found[0].detail, errors=found)


def _expression_errors(pointer: str, source: str, roots: Sequence[str]) -> list[FieldError]:
    try:
        LimitExpression(source, roots)
    except ExpressionError as error:
        return [FieldError(pointer=pointer, code="expression-invalid", detail=str(error))]
    return []


def _view(rule: LimitRule) -> LimitView:
    spec = rule.spec
    return LimitView(
        name=rule.name,
        match=spec.match,
        key=spec.key,
        concurrency=spec.concurrency,
        rate=spec.rate,
        changed_at=to_datetime(rule.changed_at),
        changed_by=rule.changed_by,
    )
