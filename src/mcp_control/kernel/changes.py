"""What a store keeps and what it is told to change (architecture, section 3).

A store knows nothing of tasks or runs: it keeps entities, which are bytes with a version and a few index fields, and facts,
which are the events of a change. Components own the typed models and the encoding.

What is made by the hundred thousand is left out of garbage collection (`gc=False`): these values cannot form cycles, and walking over
them cost a quarter of the server's time under load.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

type_of_index = Literal["text", "int"]
IndexValue = str | int | None


class Field(msgspec.Struct, frozen=True, gc=False):
    """An index field of a kind: its name and whether it holds text or a 64-bit integer. Null is always allowed."""

    name: str
    type: type_of_index = "text"


class Index(msgspec.Struct, frozen=True, gc=False):
    """An index over fields of a kind, in this order; `id` may be the last. Rows whose first field is null are left out.

    `shared`: needed only where several servers share the store; a store of one server leaves it out, since each index costs every write.
    """

    name: str
    fields: tuple[str, ...]
    unique: bool = False
    shared: bool = False


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of one kind of entity: its index fields, its indexes and the names of its cold parts.

    A cold part may have many pieces, written `part/piece` (a run keeps the output of each stage as `output/<stage>`).
    """

    name: str
    fields: tuple[Field, ...] = ()
    indexes: tuple[Index, ...] = ()
    cold: tuple[str, ...] = ()


class Entity(msgspec.Struct, frozen=True, gc=False):
    """One stored thing.

    Attributes:
        kind: the name of its `Kind`.
        id: its identity within the kind.
        version: in a `Change`, the version it was read at (0: it must not exist yet); as read, its current version (1 or more).
            A successful write leaves `version + 1`.
        index: values of the kind's index fields; a field that is not named is null.
        hot: the encoded state, rewritten on every change.
        cold: parts written once or rarely (payload, result). In a `Change`, only the parts to write; as read, only the parts asked for.
    """

    kind: str
    id: str
    version: int
    index: Mapping[str, IndexValue]
    hot: bytes
    cold: Mapping[str, bytes] = {}


class Key(msgspec.Struct, frozen=True, gc=False):
    """Names an entity to delete, at the version it was read; None deletes whatever version is there."""

    kind: str
    id: str
    version: int | None = None


class Fact(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An event as it is stored: `noun.verb` in the past tense, CloudEvents names, compact on disk.

    Attributes:
        type: e.g. `task.completed`.
        subject: the id of the thing it happened to.
        tenant: whose it is.
        at: wall time, milliseconds.
        actor: who caused it (an id, or `system`).
        data: JSON object, encoded; small.
        run: the run it belongs to, for filters; empty where none.
    """

    type: str
    subject: str
    tenant: str
    at: int
    actor: str
    data: bytes = b"{}"
    run: str = ""


class StoredFact(msgspec.Struct, frozen=True, gc=False):
    """A fact with its place in the one order of all facts: `seq` grows by one from fact to fact, without gaps."""

    seq: int
    fact: Fact


class Change(msgspec.Struct, frozen=True, gc=False):
    """All or nothing: entities to write, entities to delete, and the facts that came about by it."""

    writes: Sequence[Entity] = ()
    deletes: Sequence[Key] = ()
    facts: Sequence[Fact] = ()


Operator = Literal["eq", "in", "lt", "le", "gt", "ge"]


class Where(msgspec.Struct, frozen=True, gc=False):
    """A condition on an index field (or `id`). `value` is a list for `in`. Nulls never match."""

    field: str
    op: Operator
    value: IndexValue | Sequence[IndexValue]


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Entities of a kind by index fields, in a stated order, keyset-paged.

    Attributes:
        where: all conditions must hold.
        order: an index field to sort by before the id; None sorts by id alone.
        descending: newest or largest first.
        after: the position to go on from: `(value of the order field, id)`, or `(id,)` where order is None.
        limit: rows at most.
        cold: names of the cold parts to load with each entity.
    """

    where: Sequence[Where] = ()
    order: str | None = None
    descending: bool = False
    after: Sequence[IndexValue] | None = None
    limit: int = 100
    cold: Sequence[str] = ()
