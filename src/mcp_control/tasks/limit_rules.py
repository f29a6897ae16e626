"""The rules of limits that operators set, as every server has them in memory."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.changes import Entity, Query, StoredFact
from mcp_control.storage.ports import Store
from mcp_control.tasks.limit_expressions import LimitExpression
from mcp_control.tasks.limit_model import AT_ONCE_MAX, RULE_KIND, Gate, LimitRule
from mcp_control.tasks.limiting import KEY_MAX, gate_name
from mcp_control.tasks.model import Task, TaskSpec

_log = structlog.get_logger(__name__)
RULES_MAX: Final = 500
KEY_ROOTS: Final = ("type", "labels", "payload")
CONCURRENCY_ROOTS: Final = ("type", "labels")
_CHANGES: Final = frozenset({"limit.set", "limit.removed"})
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(LimitRule).decode


class _Ready:
    """A rule that is ready for use."""

    __slots__ = ("_concurrency", "_key", "_type", "rule")

    def __init__(self, rule: LimitRule) -> None:
        spec = rule.spec
        self.rule = rule
        self._type = re.compile(translate(spec.match.type))
        self._key = LimitExpression(spec.key, KEY_ROOTS) if spec.key else None
        self._concurrency = (
            LimitExpression(spec.concurrency, CONCURRENCY_ROOTS) if isinstance(spec.concurrency, str) else None
        )

    def gate(self, tenant: str, spec: TaskSpec) -> Gate | None:
        """Return what the rule makes of a submission, None where it is not for it."""
        rule = self.rule
        if rule.tenant != tenant or not self._type.fullmatch(spec.type):
            return None
        if any(spec.labels.get(name) != value for name, value in rule.spec.match.labels.items()):
            return None
        key = ""
        if self._key is not None:
            try:
                key = self._key.text({"type": spec.type, "labels": spec.labels}, bytes(spec.payload))[:KEY_MAX]
            except ExpressionError:
                return None
            if not key:
                return None
        return self.now(Gate(key=key, rule=rule.name, rate=rule.spec.rate), spec.type, spec.labels)

    def now(self, gate: Gate, task_type: str, labels: Mapping[str, str]) -> Gate | None:
        """Return a gate with the numbers that count now; None where the rule gives none."""
        spec = self.rule.spec
        if spec.rate is not None:
            return replace(gate, rate=spec.rate, slots=0)
        if self._concurrency is None:
            return replace(gate, slots=int(spec.concurrency or 1), rate=None)
        try:
            slots = self._concurrency.number({"type": task_type, "labels": labels})
        except ExpressionError:
            return None
        return replace(gate, slots=min(max(slots, 1), AT_ONCE_MAX), rate=None)


class Rules:
    """The rules there are. `load` reads them anew; every server does when it hears of a change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ready: dict[tuple[str, str], _Ready] = {}

    @property
    def there(self) -> bool:
        """Whether there is any rule."""
        return bool(self._ready)

    async def load(self) -> None:
        """Read the rules."""
        ready: dict[tuple[str, str], _Ready] = {}
        for entity in await self._store.find(RULE_KIND.name, Query(limit=RULES_MAX)):
            rule = read_rule(entity)
            try:
                ready[(rule.tenant, rule.name)] = _Ready(rule)
            except ExpressionError as error:
                _log.error("limits.rule_unusable", rule=rule.name, error=str(error))
        self._ready = ready

    def know(self, task: Task) -> bool:
        """Say whether the rules a task has limits of are known here."""
        return all(not gate.rule or (task.tenant, gate.rule) in self._ready for gate in task.gates)

    def applying(self, tenant: str, spec: TaskSpec) -> list[Gate]:
        """Return what the rules make of a submission."""
        found = (ready.gate(tenant, spec) for ready in self._ready.values())
        return [gate for gate in found if gate is not None]

    def present(self, task: Task) -> tuple[set[str], dict[str, Gate]]:
        """Return the gates of a task that do not count any more, and those of rules with the numbers that count now."""
        lifted: set[str] = set()
        present: dict[str, Gate] = {}
        for gate in task.gates:
            if not gate.rule:
                continue
            name = gate_name(task.tenant, gate)
            ready = self._ready.get((task.tenant, gate.rule))
            now = None if ready is None else ready.now(gate, task.type, task.labels)
            if now is None or gate_name(task.tenant, now) != name:
                lifted.add(name)
            else:
                present[name] = now
        return lifted, present


def read_rule(entity: Entity) -> LimitRule:
    """Return the rule in a stored entity."""
    return replace(_decode(entity.hot), version=entity.version)


def write_rule(rule: LimitRule) -> Entity:
    """Return the entity that writes a rule over the version it was read at."""
    index = {"tenant": rule.tenant, "name": f"{rule.tenant}\x1f{rule.name}"}
    return Entity(RULE_KIND.name, rule.id, rule.version, index, _encode(rule))


def concerns(facts: Sequence[StoredFact]) -> bool:
    """Say whether one of these facts changed a rule."""
    return any(stored.fact.type in _CHANGES for stored in facts)
