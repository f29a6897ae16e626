"""The commands that carry out a plan, in order. Pure.

Entities are guarded by `{_id, v}`; a command that finds fewer than it should tells that an assumption of the plan was wrong.

Where a plan updates many entities of a kind, their documents are read first and put anew, in the same transaction, whose snapshot then
guards them: to MongoDB an update of a document with nine indexes costs three times as much as to delete and insert it (`bench`).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from mcp_control.kernel.changes import IndexValue
from mcp_control.storage.mongo.batch import Operation, Place, Plan, Shapes
from mcp_control.storage.mongo.documents import Document, Shape, all_parts, part_id, split_cold

_COMMAND_BYTES: Final = 10 << 20  # a command may have 16 MiB
_STATEMENTS: Final = 1000
_LISTS: Final = {"insert": "documents", "update": "updates", "delete": "deletes"}
_MANY: Final = 8  # updates for which it pays to read documents first
NOT_READ: Final = {"h": 0}


class Step(msgspec.Struct):
    """A write command, and how many documents it must find; None where any number will do."""

    command: Document
    expected: int | None


def many_updates(plan: Plan) -> dict[str, list[str]]:
    """Return the ids of the entities, by kind, whose documents should be read before `steps`: without `NOT_READ`, in the transaction."""
    found: dict[str, list[str]] = {}
    if not plan.exact:
        for operation in plan.operations:
            if operation.version and operation.base:
                found.setdefault(operation.kind, []).append(operation.id)
    return {kind: ids for kind, ids in found.items() if len(ids) >= _MANY}


def steps(shapes: Shapes, plan: Plan, before: Mapping[Place, Document]) -> list[Step]:
    """Return the commands of a plan (see `batch.py` for the order); `before` has the documents that were read for `many_updates`."""
    build = _Builder()
    deletes = [operation for operation in plan.operations if operation.version == 0]
    inserts = [operation for operation in plan.operations if operation.base == 0]
    updates = [operation for operation in plan.operations if operation.version and operation.base]
    if plan.exact:
        _deletes(build, shapes, deletes)
        _release(build, shapes, plan)
        _updates(build, shapes, updates)
        _inserts(build, shapes, inserts)
    else:
        _inserts(build, shapes, inserts)
        _updates(build, shapes, _replaced(build, shapes, updates, before))
        _deletes(build, shapes, deletes)
    for operation in plan.operations:
        _parts(build, shapes[operation.kind], operation)
    return build.steps()


class _Builder:
    """Collects statements by kind of command and collection, in the order these first came."""

    def __init__(self) -> None:
        self._lists: dict[tuple[str, str, str], list[tuple[Document, int, int | None]]] = {}

    def add(
        self, command: str, collection: str, statement: Document, size: int, *, finds: int | None = 1, part: str = ""
    ) -> None:
        """Add a statement that must find so many documents, None: any number. Those of another `part` go into other commands."""
        part = part or ("" if finds else "unguarded")
        self._lists.setdefault((command, collection, part), []).append((statement, size, finds))

    def steps(self) -> list[Step]:
        found: list[Step] = []
        for (command, collection, _), statements in self._lists.items():
            chunk: list[Document] = []
            bytes_ = 0
            expected: int | None = 0
            for statement, size, finds in statements:
                if chunk and (bytes_ + size > _COMMAND_BYTES or len(chunk) >= _STATEMENTS):
                    found.append(Step({command: collection, _LISTS[command]: chunk}, expected))
                    chunk, bytes_, expected = [], 0, 0
                chunk.append(statement)
                bytes_ += size
                expected = None if expected is None or finds is None else expected + finds
            found.append(Step({command: collection, _LISTS[command]: chunk}, expected))
        return found


def _inserts(build: _Builder, shapes: Shapes, operations: list[Operation]) -> None:
    for operation in operations:
        document, size = _document(operation)
        build.add("insert", shapes[operation.kind].name, document, size)


def _updates(build: _Builder, shapes: Shapes, operations: list[Operation]) -> None:
    for operation in operations:
        guard = {"_id": operation.id, "v": operation.base}
        if operation.fresh:
            update, size = _document(operation)
        else:
            update, size = _update(operation)
        build.add("update", shapes[operation.kind].name, {"q": guard, "u": update}, size)


def _replaced(
    build: _Builder, shapes: Shapes, operations: list[Operation], before: Mapping[Place, Document]
) -> list[Operation]:
    """Put those anew whose documents were read, and return the others.

    Among these are those that were not at their version, which an update will not find, and those whose unique values change: several
    such at once must meet each other in their order.
    """
    others: list[Operation] = []
    anew: dict[str, list[tuple[Operation, Document]]] = {}
    for operation in operations:
        found = before.get((operation.kind, operation.id))
        if found is None or found["v"] != operation.base or _retakes(shapes[operation.kind], operation, found):
            others.append(operation)
        else:
            anew.setdefault(operation.kind, []).append((operation, found))
    for kind, pairs in anew.items():
        name = shapes[kind].name
        gone = {"q": {"_id": {"$in": [operation.id for operation, _ in pairs]}}, "limit": 0}
        build.add("delete", name, gone, 100 * len(pairs), finds=len(pairs), part="anew")
        for operation, found in pairs:
            document, size = _document(operation)
            outside = split_cold(operation.cold)[1]
            inside = {part: data for part, data in found.get("c", {}).items() if part not in outside}
            size += sum(map(len, inside.values()))
            inside.update(document.get("c", ()))
            if inside:
                document["c"] = inside
            if kept := {*found.get("x", ()), *document.get("x", ())}:
                document["x"] = sorted(kept)
            build.add("insert", name, document, size, part="anew")
    return others


def _retakes(shape: Shape, operation: Operation, found: Document) -> bool:
    """Say whether an operation changes what a unique index holds of an entity."""
    before = found.get("i", {})
    return any(
        shape.unique_values(index, operation.id, operation.index) != shape.unique_values(index, operation.id, before)
        for index in shape.uniques
    )


def _deletes(build: _Builder, shapes: Shapes, operations: list[Operation]) -> None:
    for operation in operations:
        guarded = operation.base is not None
        guard = {"_id": operation.id, "v": operation.base} if guarded else {"_id": operation.id}
        build.add("delete", shapes[operation.kind].name, {"q": guard, "limit": 1}, 200, finds=1 if guarded else None)


def _release(build: _Builder, shapes: Shapes, plan: Plan) -> None:
    for (kind, name), fields in plan.released.items():
        update = {"$unset": {f"i.{field}": "" for field in sorted(fields)}}
        build.add("update", shapes[kind].name, {"q": {"_id": name}, "u": update}, 300, finds=None)


def _parts(build: _Builder, shape: Shape, operation: Operation) -> None:
    if shape.cold and (operation.version == 0 or operation.fresh):
        build.add("delete", shape.parts, {"q": {"_id": all_parts(operation.id)}, "limit": 0}, 200, finds=None)
    inside, outside = split_cold(operation.cold)
    for name, data in inside.items():
        if (
            not data and operation.version > 1 and not operation.fresh
        ):  # emptied: what lay outside must not stay for nothing
            build.add("delete", shape.parts, {"q": {"_id": part_id(operation.id, name)}, "limit": 1}, 200, finds=None)
    for name, data in outside.items():
        statement = {"q": {"_id": part_id(operation.id, name)}, "u": {"$set": {"b": data}}, "upsert": True}
        build.add("update", shape.parts, statement, len(data) + 200, finds=None)


def _document(operation: Operation) -> tuple[Document, int]:
    """Return the whole document of an entity, and its rough size."""
    inside, outside = split_cold(operation.cold)
    document: Document = {"_id": operation.id, "v": operation.version, "h": operation.hot, "i": _index(operation.index)}
    if inside:
        document["c"] = inside
    if outside:
        document["x"] = sorted({name.partition("/")[0] for name in outside})
    return document, len(operation.hot) + sum(map(len, inside.values())) + 500


def _update(operation: Operation) -> tuple[Document, int]:
    """Return the update that leaves the parts it does not name, and its rough size."""
    inside, outside = split_cold(operation.cold)
    values: Document = {"v": operation.version, "h": operation.hot, "i": _index(operation.index)}
    for name, data in inside.items():
        values[f"c.{name}"] = data
    update: Document = {"$set": values}
    if outside:
        update["$addToSet"] = {"x": {"$each": sorted({name.partition("/")[0] for name in outside})}}
        gone = {f"c.{name}": "" for name in outside if "/" not in name}
        if gone:
            update["$unset"] = gone
    return update, len(operation.hot) + sum(map(len, inside.values())) + 500


def _index(values: Mapping[str, IndexValue]) -> Document:
    """Return the fields that are not null; `bool` is an integer to Python and not to MongoDB."""
    return {
        name: int(value) if value.__class__ is bool else value for name, value in values.items() if value is not None
    }
