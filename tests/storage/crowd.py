"""What a server left in its store, many times over, and what its queries cost there: on MongoDB and in SQLite."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import apsw
import msgspec
import pymongo

from mcp_control.kernel.changes import Index, IndexValue, Kind
from mcp_control.storage.mongo.schema import index_name
from mcp_control.tasks.model import TASK_KIND
from mcp_control.testing.loading import load_mongo, load_sqlite

Document = dict[str, Any]
_ID: Final = re.compile(r"[a-z]+_[0-9a-v]{36}")
_OTHERS: Final = 20_000
_HOT: Final = b"x" * 100


class Cost(msgspec.Struct, frozen=True):
    """What a query did.

    Attributes:
        what: the query, for people.
        returned: rows it gave, or counted, or could have given had there been more.
        examined: rows it looked at.
        faults: scans of a whole collection and sorts in memory.
    """

    what: str
    returned: int
    examined: int
    faults: tuple[str, ...] = ()


def copies(
    kind: Kind, id: str, index: Mapping[str, IndexValue], count: int
) -> Iterator[tuple[str, dict[str, IndexValue]]]:
    """Yield index fields as other rows of the same kind would have them, so that two conditions together are met by few rows.

    Ids, unique names and moments differ in each. Of the rest (state, type, tenant …) each row keeps one value and differs in the others:
    a query with two conditions that is led by an index for one of them looks at a large part of all rows.
    """
    unique = {item.fields[0] for item in kind.indexes if item.unique}
    plain = [
        name
        for name, value in index.items()
        if isinstance(value, str) and name not in unique and not _ID.fullmatch(value)
    ]
    for number in range(count):
        kept = plain[number % len(plain)] if plain else ""

        def other(name: str, value: IndexValue, number: int = number, kept: str = kept) -> IndexValue:
            if isinstance(value, str):
                return value if name == kept else f"{value}~" if name in plain else f"{value}~{number}"
            return value if value is None else value + number

        yield f"{id}~{number}", {name: other(name, value) for name, value in index.items()}


def _most(kind: Kind, tasks: int) -> int:
    """Return how many rows there shall be of a kind: of tasks as many as wanted, of others a bounded number."""
    return tasks if kind is TASK_KIND else min(tasks, _OTHERS)


class MongoCrowd:
    """The database of a server that has stopped, and what mongod wrote down of its commands.

    Args:
        database: whose profile is on, see `watch`.
    """

    _NOT: Final = ("system.profile", "store.meta")  # `store.meta` holds a document for each kind

    def __init__(self, database: "pymongo.database.Database[Document]") -> None:
        self._database = database

    def watch(self) -> None:
        """Let mongod write down every command from now on."""
        self._database.create_collection("system.profile", capped=True, size=256 << 20)
        self._database.command("profile", 2)

    def fill(self, kinds: Sequence[Kind], tasks: int) -> None:
        """Make at least so many tasks, and up to 20,000 of each other kind there is one of. Indexes are built at the end."""
        self._database.command("profile", 0)
        for kind in kinds:
            found = [*self._database[kind.name].find({}, {"c": 0, "x": 0}).limit(100)]
            if found:
                each = _most(kind, tasks) // len(found)
                rows = (row for one in found for row in copies(kind, one["_id"], one.get("i", {}), each))
                load_mongo(self._database, kind, ((copy, index, _HOT) for copy, index in rows))

    def without(self, kind: Kind, index: Index) -> None:
        """Drop an index."""
        self._database[kind.name].drop_index(index_name(index))

    def costs(self) -> Iterator[Cost]:
        """Run everything again that was asked, and say what it cost."""
        seen: dict[str, int] = {}
        asked: dict[str, Document] = {}
        for entry in self._database["system.profile"].find({"op": {"$in": ["query", "command", "update", "remove"]}}):
            if (command := _command(entry)) is not None:
                asked.setdefault(str(command), command)
        for command in asked.values():
            if command[next(iter(command))] in self._NOT:
                continue
            shape = _shape(command)
            seen[shape] = seen.get(shape, 0) + 1
            if seen[shape] <= 3:
                yield self._cost(command)

    def _cost(self, command: Document) -> Cost:
        told = self._database.command("explain", command, verbosity="executionStats")
        plans = [*_found(told, "winningPlan")]
        stages = [str(stage) for plan in plans for stage in _found(plan, "stage")]
        stats = next(each for each in _found(told, "executionStats") if isinstance(each, dict))
        anything = command.get("filter") == {} and "sort" not in command and "limit" in command
        faults = tuple(each for each in stages if each == "SORT" or (each == "COLLSCAN" and not anything))
        most = command.get("limit") or max([each.get("$limit", 0) for each in command.get("pipeline", [])], default=0)
        examined = max(stats["totalDocsExamined"], stats["totalKeysExamined"])
        return Cost(str(command)[:600], max(stats["nReturned"], most), examined, faults)


def _command(entry: Document) -> Document | None:
    collection = entry["ns"].partition(".")[2]
    said = entry.get("command", {})
    match entry["op"]:
        case "update":
            return {"update": collection, "updates": [_only(said, "q", "u", "multi", "upsert", "c")]}
        case "remove":
            return {"delete": collection, "deletes": [_only(said, "q", "limit")]}
        case _ if "find" in said:
            return _only(said, "find", "filter", "sort", "limit", "projection", "skip", "singleBatch", "hint")
        case _ if "aggregate" in said and "$collStats" not in str(said["pipeline"]):
            return {**_only(said, "aggregate", "pipeline", "hint"), "cursor": {}}
        case _ if "findAndModify" in said:
            return _only(said, "findAndModify", "query", "update", "remove", "sort", "upsert")
        case _ if "count" in said or "distinct" in said:
            return _only(said, "count", "distinct", "key", "query", "limit")
    return None


def _only(said: Document, *names: str) -> Document:
    return {name: said[name] for name in said if name in names}


def _shape(command: object) -> str:
    """Return a command without its values."""
    if isinstance(command, dict):
        first = next(iter(command.items()), ("", ""))
        named = str(first[1]) if first[0] in ("find", "aggregate", "update", "delete", "findAndModify") else ""
        return "{" + named + ",".join(f"{name}:{_shape(value)}" for name, value in command.items()) + "}"
    if isinstance(command, list):
        return "[" + ",".join(sorted({_shape(each) for each in command})) + "]"
    return ""


def _found(told: object, name: str) -> Iterator[Any]:
    """Yield what is found under a name, however deep; plans that were not chosen are left out."""
    if isinstance(told, dict):
        for key, value in told.items():
            if key == name:
                yield value
            if key != "rejectedPlans":
                yield from _found(value, name)
    elif isinstance(told, list):
        for each in told:
            yield from _found(each, name)


class SqliteCrowd:
    """The file of a server that has stopped, and the SELECTs that it ran."""

    _STEPS: Final = 25  # of SQLite's machine for one row that is looked at

    def __init__(self) -> None:
        self._asked: dict[str, dict[str, Sequence[Any]]] = {}
        self._connection: apsw.Connection | None = None

    def __enter__(self) -> "SqliteCrowd":
        """Take note of what new connections run."""
        apsw.connection_hooks.append(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        """Take no more note, and close the file."""
        self._enough()
        if self._connection is not None:
            self._connection.close()

    def _enough(self) -> None:
        if self._hook in apsw.connection_hooks:
            apsw.connection_hooks.remove(self._hook)

    def _hook(self, connection: apsw.Connection) -> None:
        connection.set_exec_trace(self._note)

    def _note(self, _: object, sql: str, bindings: Any) -> bool:
        if sql.startswith("SELECT"):
            values = tuple(bindings or ())
            self._asked.setdefault(sql, {}).setdefault(str(values), values)
        return True

    def fill(self, path: str, kinds: Iterable[Kind], tasks: int) -> None:
        """Make at least so many tasks, and up to 20,000 of each other kind there is one of. Indexes are built at the end."""
        self._enough()
        self._connection = connection = apsw.Connection(path)
        for kind in kinds:
            columns = [field.name for field in kind.fields]
            names = "".join(f', "{name}"' for name in columns)
            found = connection.execute(f'SELECT id{names} FROM "{kind.name}" LIMIT 100').fetchall()
            if found:
                each = _most(kind, tasks) // len(found)
                rows = (
                    row
                    for original, *values in found
                    for row in copies(kind, original, dict(zip(columns, values, strict=True)), each)
                )
                load_sqlite(connection, kind, ((copy, index, _HOT) for copy, index in rows))

    def without(self, kind: Kind, index: Index) -> None:
        """Drop an index."""
        assert self._connection is not None
        self._connection.execute(f'DROP INDEX "{kind.name}:{index.name}"')

    def costs(self) -> Iterator[Cost]:
        """Run everything again that was asked, and say what it cost."""
        connection = self._connection
        assert connection is not None
        told: list[dict[str, Any]] = []
        connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, told.append)
        for sql, examples in self._asked.items():
            for values in [*examples.values()][:3]:
                told.clear()
                rows = connection.execute(sql, values).fetchall()
                status = told[-1]["stmt_status"]
                counted = rows[0][0] if sql.startswith("SELECT count(*)") else len(rows)
                plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
                yield Cost(
                    f"{sql} {values!r} {plan}"[:600],
                    counted if isinstance(counted, int) else 0,
                    status["SQLITE_STMTSTATUS_VM_STEP"] // self._STEPS,
                    ("SORT",) if status["SQLITE_STMTSTATUS_SORT"] else (),
                )
