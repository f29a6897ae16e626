# ruff: noqa: S608  identifiers are checked against _NAME when a kind is declared; values are bound
"""Tables made from the declarations of kinds, and their migration.

A kind `task` with a cold part `payload` becomes two tables::

    "task"         row INTEGER PRIMARY KEY, id TEXT UNIQUE, version, <index fields>, hot BLOB
    "task.payload" (row, piece) PRIMARY KEY, bytes BLOB

Cold rows carry the number of their entity's row: no id a second time, and an insert is an append. `piece` is empty for the part itself.
The hot table has row numbers: with states of a few hundred bytes it writes about a third fewer pages than one `WITHOUT ROWID`
(docs/decisions/0001-group-commit.md).
The store's own tables have a dot in front of their names, which no kind can have. Identifiers come from declarations alone and are
checked; values are always bound.
"""

import re
from collections.abc import Sequence
from typing import Final

import apsw
import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.kernel.errors import StoreUnavailable

APPLICATION_ID: Final = 0x4D435043  # "MCPC"
LAYOUT: Final = 1  # PRAGMA user_version; counts changes of the store's own tables
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
_RESERVED: Final = frozenset({"row", "id", "version", "hot", "bytes"})
_COLUMN_TYPES: Final = {"text": "TEXT", "int": "INTEGER"}

_LAYOUT_SQL: Final = (
    'CREATE TABLE ".meta"(key TEXT PRIMARY KEY, value ANY) STRICT',
    'CREATE TABLE ".facts"(last_seq INTEGER PRIMARY KEY, first_seq INTEGER NOT NULL, newest_at INTEGER NOT NULL, data BLOB NOT NULL)'
    " STRICT",
)


class Table:
    """The SQL of one kind, built once."""

    def __init__(self, kind: Kind) -> None:
        _check(kind)
        self.kind = kind
        self.name = kind.name
        self.columns: Final = tuple(field.name for field in kind.fields)
        self.names: Final = frozenset(self.columns)
        self.uniques: Final = tuple(index for index in kind.indexes if index.unique)
        self.unique_at: Final = tuple(
            sorted({self.columns.index(name) for index in self.uniques for name in index.fields if name != "id"})
        )
        self.shapes: set[tuple[str, ...]] = set()  # names given as index fields that were found to be declared
        columns = "".join(f', "{name}"' for name in self.columns)
        marks = ", ?" * len(self.columns)
        self.state_sql: Final = f'SELECT row, version{columns} FROM "{self.name}" WHERE id = ?'
        self.insert_sql: Final = f'INSERT INTO "{self.name}"(id, version, hot{columns}) VALUES(?, 1, ?{marks})'
        self.delete_sql: Final = (
            f'DELETE FROM "{self.name}" WHERE row = ?',
            *(f'DELETE FROM "{self.name}.{part}" WHERE row = ?' for part in kind.cold),
        )
        self.select_sql: Final = f'SELECT row, id, version, hot{columns} FROM "{self.name}"'
        self.cold_write_sql: Final = {
            part: f'INSERT INTO "{self.name}.{part}" VALUES(?, ?, ?) ON CONFLICT DO UPDATE SET bytes = excluded.bytes'
            for part in kind.cold
        }
        self.cold_piece_sql: Final = {
            part: f'SELECT bytes FROM "{self.name}.{part}" WHERE row = ? AND piece = ?' for part in kind.cold
        }
        self.cold_all_sql: Final = {
            part: f'SELECT piece, bytes FROM "{self.name}.{part}" WHERE row = ?' for part in kind.cold
        }
        self.unique_sql: Final = tuple(
            (index, f'SELECT id FROM "{self.name}" WHERE ' + " AND ".join(f'"{name}" = ?' for name in index.fields))
            for index in self.uniques
        )
        self._updates: dict[tuple[int, ...], str] = {}

    def check_shape(self, shape: tuple[str, ...]) -> None:
        """Remember that these are index fields of the kind. Raises ValueError where one is not."""
        if not self.names.issuperset(shape):
            raise ValueError(f"kind {self.name} has no index field {sorted(set(shape) - self.names)}")
        self.shapes.add(shape)

    def update_sql(self, changed: tuple[int, ...]) -> str:
        """Return the UPDATE that sets version, hot and these columns; values in that order, then the row number.

        Columns that keep their value are left out: SQLite rewrites the entry of every index whose column is named in SET.
        """
        sql = self._updates.get(changed)
        if sql is None:
            columns = "".join(f', "{self.columns[at]}" = ?' for at in changed)
            sql = self._updates[changed] = f'UPDATE "{self.name}" SET version = ?, hot = ?{columns} WHERE row = ?'
        return sql


def _check(kind: Kind) -> None:
    fields = {field.name for field in kind.fields}
    names = [kind.name, *(field.name for field in kind.fields), *(index.name for index in kind.indexes), *kind.cold]
    wrong = [name for name in names if not _NAME.fullmatch(name)]
    if wrong or fields & _RESERVED or len(fields) != len(kind.fields):
        raise ValueError(f"kind {kind.name!r}: bad, reserved or repeated name among {names}")
    for index in kind.indexes:
        if not index.fields or not set(index.fields) <= fields | {"id"} or index.fields[0] == "id":
            raise ValueError(f"kind {kind.name!r}: index {index.name!r} over unknown fields {index.fields}")


def migrate(connection: apsw.Connection, kinds: Sequence[Kind]) -> None:
    """Bring the tables to the declarations, in one transaction; does nothing where they are there already.

    A new field is null in old rows until they are written again. Kinds that are no longer declared are left alone.

    Raises:
        StoreUnavailable: a newer server wrote this file, a field changed its type, or old rows break a new unique index.
    """
    layout = int(connection.pragma("user_version"))
    if layout > LAYOUT:
        raise StoreUnavailable(
            f"the database was written by a newer version (layout {layout}, this one knows {LAYOUT}); upgrade the server"
        )
    connection.execute("BEGIN IMMEDIATE")
    try:
        if layout == 0:
            for sql in _LAYOUT_SQL:
                connection.execute(sql)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {LAYOUT}")
        for kind in kinds:
            _migrate_kind(connection, kind)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _migrate_kind(connection: apsw.Connection, kind: Kind) -> None:
    key = f"kind:{kind.name}"
    found = connection.execute('SELECT value FROM ".meta" WHERE key = ?', (key,)).fetchone()
    old = msgspec.json.decode(found[0], type=Kind) if found else None
    if old == kind:
        return
    if old is None:
        columns = "".join(f", {_column(field)}" for field in kind.fields)
        connection.execute(
            f'CREATE TABLE "{kind.name}"(row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, version INTEGER NOT NULL{columns}, '
            "hot BLOB NOT NULL) STRICT"
        )
        old = Kind(name=kind.name, fields=kind.fields)
    gone = [index for index in old.indexes if index not in kind.indexes]
    for index in gone:
        if index.shared:
            continue
        connection.execute(f'DROP INDEX "{kind.name}:{index.name}"')
    _migrate_fields(connection, old, kind)
    for part in set(old.cold).difference(kind.cold):
        connection.execute(
            f'DROP TABLE "{kind.name}.{part}"'
        )  # else its rows would join entities that get the same row number later
    for part in set(kind.cold).difference(old.cold):
        connection.execute(
            f'CREATE TABLE "{kind.name}.{part}"(row INTEGER, piece TEXT, bytes BLOB NOT NULL, PRIMARY KEY(row, piece)) '
            "STRICT, WITHOUT ROWID"
        )
    for index in kind.indexes:
        if index not in old.indexes and not index.shared:
            _create_index(connection, kind, index)
    connection.execute('INSERT OR REPLACE INTO ".meta" VALUES(?, ?)', (key, msgspec.json.encode(kind).decode()))


def _migrate_fields(connection: apsw.Connection, old: Kind, kind: Kind) -> None:
    before = {field.name: field for field in old.fields}
    after = {field.name: field for field in kind.fields}
    for name, field in after.items():
        if name not in before:
            connection.execute(f'ALTER TABLE "{kind.name}" ADD COLUMN {_column(field)}')
        elif before[name].type != field.type:
            raise StoreUnavailable(
                f"field {name} of {kind.name} was {before[name].type} and is declared {field.type}; give it a new name"
            )
    for name in before.keys() - after.keys():
        connection.execute(f'ALTER TABLE "{kind.name}" DROP COLUMN "{name}"')


def _create_index(connection: apsw.Connection, kind: Kind, index: Index) -> None:
    columns = ", ".join(f'"{name}"' for name in index.fields)
    unique = "UNIQUE " if index.unique else ""
    try:
        connection.execute(
            f'CREATE {unique}INDEX "{kind.name}:{index.name}" ON "{kind.name}"({columns}) WHERE "{index.fields[0]}" IS NOT NULL'
        )
    except apsw.ConstraintError:
        raise StoreUnavailable(f"stored {kind.name} rows break the new unique index {index.name}") from None


def _column(field: Field) -> str:
    return f'"{field.name}" {_COLUMN_TYPES[field.type]}'
