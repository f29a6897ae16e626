"""The commands that carry out a plan, in order. Pure.

Entities are guarded by `{_id, v}`; a command that finds fewer than it should tells that an assumption of the plan was wrong.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from mcp_control.kernel.changes import IndexValue
from mcp_control.storage.mongo.batch import Operation, Plan, Shapes
from mcp_control.storage.mongo.documents import Document, Shape, all_parts, part_id, split_cold

_COMMAND_BYTES: Final = 10 << 20  # a command may have 16 MiB
_STATEMENTS: Final = 1000
_LISTS: Final = {"insert": "documents", "update": "updates", "delete": "deletes"}


class Step(msgspec.Struct):
    """A write command, and how many documents it must find; None where any number will do."""

    command: Document
    expected: int | None


def steps(shapes: Shapes, plan: Plan) -> list[Step]:
    """Return the commands of a plan (see `batch.py` for the order)."""
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
        _updates(build, shapes, updates)
        _deletes(build, shapes, deletes)
    for operation in plan.operations:
        _parts(build, shapes[operation.kind], operation)
    return build.steps()


class _Builder:
    """Collects statements by kind of command and collection, in the order these first came."""

    def __init__(self) -> None:
        self._lists: dict[tuple[str, str, bool], list[tuple[Document, int]]] = {}

    def add(self, command: str, collection: str, statement: Document, size: int, *, guarded: bool = True) -> None:
        self._lists.setdefault((command, collection, guarded), []).append((statement, size))

    def steps(self) -> list[Step]:
        found: list[Step] = []
        for (command, collection, guarded), statements in self._lists.items():
            chunk: list[Document] = []
            bytes_ = 0
            for statement, size in statements:
                if chunk and (bytes_ + size > _COMMAND_BYTES or len(chunk) >= _STATEMENTS):
                    found.append(_step(command, collection, chunk, guarded))
                    chunk, bytes_ = [], 0
                chunk.append(statement)
                bytes_ += size
            found.append(_step(command, collection, chunk, guarded))
        return found


def _step(command: str, collection: str, statements: list[Document], guarded: bool) -> Step:
    return Step({command: collection, _LISTS[command]: statements}, len(statements) if guarded else None)


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


def _deletes(build: _Builder, shapes: Shapes, operations: list[Operation]) -> None:
    for operation in operations:
        guarded = operation.base is not None
        guard = {"_id": operation.id, "v": operation.base} if guarded else {"_id": operation.id}
        build.add("delete", shapes[operation.kind].name, {"q": guard, "limit": 1}, 200, guarded=guarded)


def _release(build: _Builder, shapes: Shapes, plan: Plan) -> None:
    for (kind, name), fields in plan.released.items():
        update = {"$unset": {f"i.{field}": "" for field in sorted(fields)}}
        build.add("update", shapes[kind].name, {"q": {"_id": name}, "u": update}, 300, guarded=False)


def _parts(build: _Builder, shape: Shape, operation: Operation) -> None:
    if shape.cold and (operation.version == 0 or operation.fresh):
        build.add("delete", shape.parts, {"q": {"_id": all_parts(operation.id)}, "limit": 0}, 200, guarded=False)
    for name, data in split_cold(operation.cold)[1].items():
        statement = {"q": {"_id": part_id(operation.id, name)}, "u": {"$set": {"b": data}}, "upsert": True}
        build.add("update", shape.parts, statement, len(data) + 200, guarded=False)


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
