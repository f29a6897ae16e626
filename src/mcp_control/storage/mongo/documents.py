r"""Entities as documents, and queries as filters. Pure.

A kind `task` with cold parts becomes two collections::

    task        {_id, v: version, h: hot bytes, i: {index fields that are not null}, c: {part: bytes}, x: [parts kept outside]}
    task.parts  {_id: "<entity id>\x1f<part>" or "<entity id>\x1f<part>/<piece>", b: bytes}

A small part without pieces lies in the document, since a second document costs more than its bytes; what lies in the document wins over
what lies outside. A value given by a caller stands only where MongoDB takes values: as the operand of $eq, $in, $lt … or in a document to
be stored; never in an expression, and never as the name of a field.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from bson.int64 import Int64

from mcp_control.kernel.changes import Entity, Index, IndexValue, Kind, Query, Where

Document = dict[str, Any]
Filter = dict[str, Any]
Sort = list[tuple[str, int]]

INLINE_BYTES: Final = 4 * 1024
DOCUMENT_BYTES: Final = 15 << 20  # a BSON document may have 16 MiB
SEPARATOR: Final = "\x1f"
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
_INT: Final = range(-(2**63), 2**63)
_OPERATORS: Final = {"eq": "$eq", "lt": "$lt", "le": "$lte", "gt": "$gt", "ge": "$gte"}


class Shape:
    """One kind, with what is asked of its declaration again and again."""

    def __init__(self, kind: Kind) -> None:
        _check(kind)
        self.kind: Final = kind
        self.name: Final = kind.name
        self.parts: Final = f"{kind.name}.parts"
        self.types: Final = {field.name: field.type for field in kind.fields}
        self.cold: Final = frozenset(kind.cold)
        self.uniques: Final = tuple(index for index in kind.indexes if index.unique)

    def unique_values(self, index: Index, id: str, values: Mapping[str, IndexValue]) -> tuple[IndexValue, ...] | None:
        """Return what a unique index holds of an entity; None where a null keeps it out."""
        found = tuple(id if name == "id" else values.get(name) for name in index.fields)
        return None if None in found else found

    def check_index(self, values: Mapping[str, IndexValue]) -> dict[str, IndexValue]:
        """Return the index fields that are not null. Raises ValueError for one that is undeclared or not of its type."""
        found: dict[str, IndexValue] = {}
        for name, value in values.items():
            type_ = self.types.get(name)
            if type_ is None:
                raise ValueError(f"kind {self.name} has no index field {name}")
            if value is None:
                continue
            found[name] = _checked(name, value, type_)
        return found

    def check_part(self, name: str) -> str:
        """Return the part that a name such as `output/x` belongs to. Raises ValueError where it is not declared."""
        part = name.partition("/")[0]
        if part not in self.cold:
            raise ValueError(f"kind {self.name} has no cold part {part}")
        return part

    def path(self, name: str) -> str:
        """Return where a declared field lies in a document. Raises ValueError where it is not declared."""
        if name == "id":
            return "_id"
        if name not in self.types:
            raise ValueError(f"kind {self.name} has no index field {name}")
        return f"i.{name}"


def _check(kind: Kind) -> None:
    fields = {field.name for field in kind.fields}
    names = [kind.name, *(field.name for field in kind.fields), *(index.name for index in kind.indexes), *kind.cold]
    wrong = [name for name in names if not _NAME.fullmatch(name)]
    if wrong or "id" in fields or len(fields) != len(kind.fields):
        raise ValueError(f"kind {kind.name!r}: bad, reserved or repeated name among {names}")
    for index in kind.indexes:
        if not index.fields or not set(index.fields) <= fields | {"id"} or index.fields[0] == "id":
            raise ValueError(f"kind {kind.name!r}: index {index.name!r} over unknown fields {index.fields}")


def _checked(name: str, value: IndexValue, type_: str) -> IndexValue:
    if type_ == "text":
        if not isinstance(value, str):
            raise ValueError(f"{name} is a text")
        value.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
        return value
    if not isinstance(value, int) or value not in _INT:
        raise ValueError(f"{name} is an integer of 64 bits")
    return int(value)


def check_id(shape: Shape, id: str) -> None:
    """Refuse an id that cannot be kept. Raises ValueError."""
    id.encode()
    if SEPARATOR in id and shape.cold:
        raise ValueError("an id cannot hold the character 0x1f")


def part_id(id: str, name: str) -> str:
    """Return the `_id` of a cold part, or of a piece of one, that lies outside its entity's document."""
    return f"{id}{SEPARATOR}{name}"


def part_range(id: str, part: str) -> Filter:
    """Return the condition on `_id` that holds for a part and all its pieces: `/` comes before every character of a name."""
    return {"$gte": f"{id}{SEPARATOR}{part}", "$lt": f"{id}{SEPARATOR}{part}0"}


def all_parts(id: str) -> Filter:
    """Return the condition on `_id` that holds for everything an entity keeps outside its document."""
    return {"$gte": f"{id}{SEPARATOR}", "$lt": f"{id}\x20"}


def split_cold(cold: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the parts that go into the document, and those that go outside."""
    inside = {name: data for name, data in cold.items() if "/" not in name and len(data) <= INLINE_BYTES}
    return inside, {name: data for name, data in cold.items() if name not in inside}


def projection(shape: Shape, cold: Sequence[str]) -> Document:
    """Return which fields to read for an entity with these cold parts. Raises ValueError for a part that is not declared."""
    fields: Document = {"v": 1, "h": 1, "i": 1}
    for name in cold:
        shape.check_part(name)
        fields["x"] = 1
        if "/" not in name:
            fields[f"c.{name}"] = 1
    return fields


def outside(shape: Shape, documents: Iterable[Document], cold: Sequence[str]) -> list[Filter]:
    """Return the filters that together find the cold parts asked for that lie outside these documents."""
    found: list[Filter] = []
    for document in documents:
        kept = document.get("x", ())
        for name in cold:
            if name.partition("/")[0] in kept:
                wanted = part_id(document["_id"], name) if "/" in name else part_range(document["_id"], name)
                found.append({"_id": wanted})
    return found


def entity(shape: Shape, document: Document, pieces: Mapping[str, bytes]) -> Entity:
    """Return what a document says; `pieces` are the parts that lie outside, by name."""
    # Large integers come as a class of the driver's own, which other encoders do not know.
    index = {name: int(value) if value.__class__ is Int64 else value for name, value in document.get("i", {}).items()}
    cold = {**pieces, **document.get("c", {})}
    return Entity(
        shape.name,
        document["_id"],
        int(document["v"]),
        {name: index.get(name) for name in shape.types},
        document["h"],
        cold,
    )


# --- queries ----------------------------------------------------------------------------------------------------------


def conditions(shape: Shape, where: Sequence[Where]) -> list[Filter] | None:
    """Return the filters that must all hold; None where nothing can match. Raises ValueError for a field that was not declared."""
    found: list[Filter] = []
    possible = True
    for condition in where:
        path = shape.path(condition.field)
        value = condition.value
        if condition.op == "in":
            if value is None or isinstance(value, (str, int)):
                raise ValueError(f"`in` on {condition.field} needs a list")
            wanted = [_operand(shape, condition.field, one) for one in value if one is not None]
            possible = possible and bool(wanted)
            found.append({path: {"$in": wanted}})
        elif value is None:
            possible = False
        elif isinstance(value, (str, int)):
            found.append({path: {_OPERATORS[condition.op]: _operand(shape, condition.field, value)}})
        else:
            raise ValueError(f"`{condition.op}` on {condition.field} needs one value")
    return found if possible else None


def phases(shape: Shape, query: Query) -> list[tuple[Filter, Sort]]:
    """Return the finds that answer a query one after the other, each of which an index leads straight through.

    Nulls of the order field come first, last when descending, and are left out of indexes, so they are a find of their own. A page that
    begins within a row of equal values first goes on there. Where a unique index leaves no equal values the id is no part of the order,
    as it is none of that index. Raises ValueError for a field that was not declared.
    """
    base = conditions(shape, query.where)
    order = None if query.order in (None, "id") else query.order
    path = None if order is None else shape.path(order)
    after = query.after
    if after is not None and (not after if order is None else len(after) != 2):
        raise ValueError("the position is (id,)" if order is None else "the position is (value of the order field, id)")
    if base is None:
        return []
    way, beyond = (-1, "$lt") if query.descending else (1, "$gt")
    by_id: Sort = [("_id", way)]
    if path is None or order is None:
        return [(_all(base, [] if after is None else [{"_id": {beyond: after[-1]}}]), by_id)]
    fixed = {where.field for where in query.where if where.op == "eq"}
    alone = any({*index.fields} - fixed == {order} for index in shape.uniques)
    by_value: Sort = [(path, way)] if alone else [(path, way), ("_id", way)]
    nulls = [] if any(where.field == order for where in query.where) else [(_all(base, [{path: None}]), by_id)]
    values = [(_all(base, [{path: {"$exists": True}}]), by_value)]
    if after is None:
        return values + nulls if query.descending else nulls + values
    value, last = after
    if value is None:
        rest = [(_all(base, [{path: None}, {"_id": {beyond: last}}]), by_id)]
        return rest if query.descending else rest + values
    value = _operand(shape, order, value)
    ties = (_all(base, [{path: {"$eq": value}}, {"_id": {beyond: last}}]), by_id)
    further = (_all(base, [{path: {beyond: value}}]), by_value)
    return [ties, further, *nulls] if query.descending else [ties, further]


def _operand(shape: Shape, field: str, value: IndexValue) -> IndexValue:
    return _checked(field, value, "text" if field == "id" else shape.types[field])


def _all(base: list[Filter], more: list[Filter]) -> Filter:
    every = base + more
    if not every:
        return {}
    return every[0] if len(every) == 1 else {"$and": every}
