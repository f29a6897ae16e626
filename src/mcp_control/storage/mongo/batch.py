"""What a batch of changes comes to: one operation per entity, and the outcome of each change. Pure.

Two ways lead there. `assume` reads nothing: it takes for granted that every entity is at the version its change names and that no unique
value is taken, and plans writes that find out when this is not so. `decide` knows what the store holds and plans exactly; it is needed
only when an assumption failed, or where one operation per entity would not show that it did.

Why the order insert, update, delete proves the assumptions of `assume` about unique values: no entity changes its unique values twice in
such a plan, so any change that finds a value taken, in the order the changes came, is refused by MongoDB in that order, too. The holder
was there before (then nothing of the plan has freed the value yet, save an update that came before it), or it is an insert (inserts come
first) or an earlier update (updates keep their order).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mcp_control.kernel.changes import Change, Entity, Fact, IndexValue, Key
from mcp_control.kernel.errors import Conflict, Duplicate, Problem
from mcp_control.storage.mongo.documents import (
    DOCUMENT_BYTES,
    Shape,
    check_id,
    split_cold,
)

Place = tuple[str, str]  # kind and id
Row = tuple[int, Mapping[str, IndexValue]]  # version and index fields that are not null
Value = tuple[str, str, tuple[IndexValue, ...]]  # kind, name of the unique index, values
Shapes = Mapping[str, Shape]

_HEADER: Final = 5
_encode_fact = msgspec.msgpack.Encoder().encode
_decode_facts = msgspec.msgpack.Decoder(list[Fact]).decode


def pack(bodies: Sequence[bytes], count: int) -> bytes:
    """Return encoded facts, one after the other, as one MessagePack array, so that arrays can be joined without decoding them."""
    return b"".join((b"\xdd", count.to_bytes(4), *bodies))


def body(packed: bytes) -> bytes:
    """Return what `pack` put together, without its header."""
    return packed[_HEADER:]


def unpack(packed: bytes) -> list[Fact]:
    """Return the facts of a packed array."""
    return _decode_facts(packed)


class Prepared(msgspec.Struct, gc=False):
    """A change that was checked: what its facts look like stored, and how large it is.

    Attributes:
        facts: the facts, encoded one after the other.
        at: moment of the newest fact.
        size: bytes, roughly.
    """

    change: Change
    facts: bytes
    at: int
    size: int


class Operation(msgspec.Struct):
    """What one entity comes to.

    Attributes:
        base: the version it must have; 0 where it must not be there; None where any will do.
        version: the version it gets; 0 where it is deleted.
        fresh: whether it takes the place of one that was deleted.
    """

    kind: str
    id: str
    base: int | None
    version: int
    index: Mapping[str, IndexValue]
    hot: bytes
    cold: dict[str, bytes]
    fresh: bool = False


class Plan(msgspec.Struct):
    """What to write, and what to answer.

    Attributes:
        released: unique values that other entities of the plan take, to be given up first: places and names of fields.
        exact: whether the plan was made by `decide`.
    """

    outcomes: list[Problem | None]
    operations: list[Operation]
    facts: list[bytes]
    count: int
    at: int
    exact: bool = False
    released: dict[Place, set[str]] = {}


# --- checking ---------------------------------------------------------------------------------------------------------


def prepare(shapes: Shapes, change: Change) -> Prepared:
    """Check a change by itself. Raises ValueError (or OverflowError) where it could not be stored."""
    places: set[Place] = set()
    size = 0
    for write in change.writes:
        shape = shape_of(shapes, write.kind)
        check_id(shape, write.id)
        shape.check_index(write.index)
        inside, outside = split_cold(write.cold)
        for name, data in write.cold.items():
            shape.check_part(name)
            name.encode()
            size += len(data)
        if max(len(write.hot) + sum(map(len, inside.values())), *map(len, outside.values()), 0) > DOCUMENT_BYTES:
            raise ValueError(f"{write.kind} {write.id} is larger than a document may be")
        size += len(write.hot) + 500
        places.add((write.kind, write.id))
    for key in change.deletes:
        check_id(shape_of(shapes, key.kind), key.id)
        places.add((key.kind, key.id))
    if len(places) != len(change.writes) + len(change.deletes):
        raise ValueError("a change names an entity more than once")
    facts = b"".join(map(_encode_fact, change.facts))
    return Prepared(change, facts, max((fact.at for fact in change.facts), default=0), size + len(facts))


def shape_of(shapes: Shapes, kind: str) -> Shape:
    """Return the shape of a kind. Raises ValueError where it was not declared."""
    shape = shapes.get(kind)
    if shape is None:
        raise ValueError(f"kind {kind} was not declared when the store was opened")
    return shape


# --- the quick way ----------------------------------------------------------------------------------------------------


def assume(shapes: Shapes, batch: Sequence[Prepared]) -> Plan | None:
    """Plan a batch as though all its changes were right; None where only `decide` can tell."""
    operations: dict[Place, Operation] = {}
    uniques = _Uniques(shapes)
    outcomes: list[Problem | None] = []
    facts: list[bytes] = []
    count = at = 0
    for item in batch:
        change = item.change
        problem = _refusal(change, operations)
        outcomes.append(problem)
        if problem is not None:
            continue
        for key in change.deletes:
            if not _delete(operations, key):
                return None
        for write in change.writes:
            operation = _write(operations, write)
            if operation is None or not uniques.take(operation):
                return None
        if change.facts:
            facts.append(item.facts)
            count += len(change.facts)
            at = max(at, item.at)
    return Plan(outcomes, list(operations.values()), facts, count, at)


def _refusal(change: Change, operations: Mapping[Place, Operation]) -> Problem | None:
    """Return the conflict of a change with those before it."""
    for key in change.deletes:
        known = operations.get((key.kind, key.id))
        if known is None:
            continue
        if key.version is not None and (known.version != key.version or known.version == 0):
            return _conflict(key)
    for write in change.writes:
        known = operations.get((write.kind, write.id))
        if write.version < 0 or (known is not None and known.version != write.version):
            return _conflict(write)
    return None


def _delete(operations: dict[Place, Operation], key: Key) -> bool:
    """Add a delete; false where one operation cannot say it."""
    known = operations.get((key.kind, key.id))
    if known is None:
        if key.version is not None and not 0 < key.version < 2**63:
            return False
        operations[key.kind, key.id] = Operation(key.kind, key.id, key.version, 0, {}, b"", {})
        return True
    if known.version == 0:
        return True
    if known.base == 0:
        return False
    known.version, known.index, known.hot, known.cold = 0, {}, b"", {}
    return True


def _write(operations: dict[Place, Operation], write: Entity) -> Operation | None:
    known = operations.get((write.kind, write.id))
    if known is None:
        if write.version >= 2**63 - 1:
            return None
        made = Operation(
            write.kind, write.id, write.version, write.version + 1, write.index, write.hot, dict(write.cold)
        )
        operations[write.kind, write.id] = made
        return made
    if known.version == 0:
        return None  # made anew after a delete
    known.version += 1
    known.index, known.hot = write.index, write.hot
    known.cold.update(write.cold)
    return known


class _Uniques:
    """Which unique values the entities of a plan end up with."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._taken: dict[Value, str] = {}
        self._of: dict[tuple[str, str, str], tuple[IndexValue, ...] | None] = {}

    def take(self, operation: Operation) -> bool:
        """Note the values of a write; false where an entity changes them within the plan, or two take the same."""
        shape = self._shapes[operation.kind]
        for index in shape.uniques:
            values = shape.unique_values(index, operation.id, operation.index)
            if self._of.setdefault((shape.name, index.name, operation.id), values) != values:
                return False
            if (
                values is not None
                and self._taken.setdefault((shape.name, index.name, values), operation.id) != operation.id
            ):
                return False
        return True


# --- the exact way ----------------------------------------------------------------------------------------------------


def questions(shapes: Shapes, batch: Sequence[Prepared]) -> tuple[dict[str, set[str]], set[Value]]:
    """Return what `decide` must know: the entities that are named, by kind, and the unique values that are taken."""
    named: dict[str, set[str]] = {}
    values: set[Value] = set()
    for item in batch:
        for key in item.change.deletes:
            named.setdefault(key.kind, set()).add(key.id)
        for write in item.change.writes:
            named.setdefault(write.kind, set()).add(write.id)
            values.update(_values(shapes[write.kind], write.id, write.index))
    return named, values


def decide(shapes: Shapes, batch: Sequence[Prepared], rows: Mapping[Place, Row], holders: Mapping[Value, str]) -> Plan:
    """Plan a batch from what the store holds.

    Args:
        rows: every entity that is named and there.
        holders: for every unique value that is taken and that somebody holds, the id of that one.
    """
    state = _State(shapes, rows, holders)
    outcomes: list[Problem | None] = []
    facts: list[bytes] = []
    count = at = 0
    for item in batch:
        problem = state.apply(item.change)
        outcomes.append(problem)
        if problem is None and item.change.facts:
            facts.append(item.facts)
            count += len(item.change.facts)
            at = max(at, item.at)
    operations = [operation for operation in state.operations.values() if operation.base or operation.version]
    return Plan(outcomes, operations, facts, count, at, True, state.released())


class _State:
    """What the store would hold after the changes so far."""

    def __init__(self, shapes: Shapes, rows: Mapping[Place, Row], holders: Mapping[Value, str]) -> None:
        self.operations: dict[Place, Operation] = {}
        self._shapes = shapes
        self._before = rows
        self._now: dict[Place, Row] = dict(rows)
        self._held: dict[Value, str] = dict(holders)
        for (kind, name), (_, index) in rows.items():
            self._held.update(dict.fromkeys(_values(shapes[kind], name, index), name))

    def apply(self, change: Change) -> Problem | None:
        """Apply a change, or return why it cannot be."""
        freed: set[Value] = set()
        named: list[Entity | Key] = [*change.deletes, *change.writes]
        for item in named:
            version, index = self._now.get((item.kind, item.id), (0, {}))
            if item.version is not None and (item.version != version or (isinstance(item, Key) and version == 0)):
                return _conflict(item)
            freed.update(_values(self._shapes[item.kind], item.id, index))
        taken: dict[Value, str] = {}
        for write in change.writes:
            for value in _values(self._shapes[write.kind], write.id, write.index):
                holder = taken.setdefault(value, write.id)
                if holder == write.id and value not in freed:
                    holder = self._held.get(value, write.id)
                if holder != write.id:
                    return Duplicate(f"{write.kind} already has this {value[1]}", index=value[1], existing=holder)
        for value in freed:
            self._held.pop(value, None)
        self._held.update(taken)
        for key in change.deletes:
            self._delete(key)
        for write in change.writes:
            self._write(write)
        return None

    def _delete(self, key: Key) -> None:
        if self._now.pop((key.kind, key.id), None) is None:
            return
        operation = self._operation(key.kind, key.id)
        operation.version, operation.index, operation.hot, operation.cold = 0, {}, b"", {}
        operation.fresh = operation.base != 0

    def _write(self, write: Entity) -> None:
        operation = self._operation(write.kind, write.id)
        operation.version = write.version + 1
        operation.index, operation.hot = write.index, write.hot
        operation.cold.update(write.cold)
        self._now[write.kind, write.id] = operation.version, write.index

    def _operation(self, kind: str, id: str) -> Operation:
        found = self.operations.get((kind, id))
        if found is None:
            base = self._before.get((kind, id), (0, {}))[0]
            found = self.operations[kind, id] = Operation(kind, id, base, base, {}, b"", {})
        return found

    def released(self) -> dict[Place, set[str]]:
        """Return the values that an entity gives up and another takes: without a step between, one would meet the other."""
        found: dict[Place, set[str]] = {}
        for place, operation in self.operations.items():
            if not operation.base or not operation.version:
                continue
            for value in _values(self._shapes[operation.kind], operation.id, self._before[place][1]):
                if self._held.get(value, operation.id) != operation.id:
                    index = next(one for one in self._shapes[operation.kind].uniques if one.name == value[1])
                    found.setdefault(place, set()).update(name for name in index.fields if name != "id")
        return found


def _values(shape: Shape, id: str, index: Mapping[str, IndexValue]) -> list[Value]:
    """Return the unique values an entity with these index fields holds."""
    found = ((one.name, shape.unique_values(one, id, index)) for one in shape.uniques)
    return [(shape.name, name, values) for name, values in found if values is not None]


def _conflict(item: Entity | Key) -> Conflict:
    return Conflict(f"{item.kind} {item.id} was changed by somebody else", kind=item.kind, id=item.id)
