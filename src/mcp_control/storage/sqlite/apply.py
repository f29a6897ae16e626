"""Applying one Change inside the open transaction: check everything by reading, then write.

Guards are checked by point reads before the first write, so a change that conflicts has written nothing, and the read tells which
index columns change, so that an UPDATE touches no other index. Only a unique index can then refuse a statement. One such statement is
put first; where there are two or more, or deletes that may free the value, the change runs in a SAVEPOINT.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import apsw

from mcp_control.kernel.changes import Change, Entity, IndexValue, Key
from mcp_control.kernel.errors import Conflict, Duplicate, Problem
from mcp_control.storage.sqlite.schema import Table


class _Write(NamedTuple):
    """A write whose guard holds: row is None for an insert; `changed` names the index columns to set, with their values."""

    table: Table
    entity: Entity
    row: int | None
    changed: tuple[str, ...]
    values: tuple[IndexValue, ...]


class Applier:
    """Applies changes through one connection, in a transaction that somebody else opens and ends."""

    __slots__ = ("_execute", "_last_row", "_tables")

    def __init__(self, connection: apsw.Connection, tables: Mapping[str, Table]) -> None:
        self._execute: Callable[..., Any] = connection.cursor().execute
        self._last_row = connection.last_insert_rowid
        self._tables = tables

    def apply(self, change: Change) -> Problem | None:
        """Apply all of the change or nothing of it; deletes come before writes. Facts are not touched here.

        Returns:
            None, or the Conflict or Duplicate that kept it from being applied.

        Raises:
            ValueError: an undeclared kind, field or part, or one entity twice. Nothing of the change was applied.
        """
        deletes: list[tuple[Table, int]] = []
        for key in change.deletes:
            found = self._find_delete(key)
            if isinstance(found, Problem):
                return found
            deletes.append(found)
        writes: list[_Write] = []
        risky = 0  # writes that a unique index could refuse
        for entity in change.writes:
            write = self._find_write(entity)
            if isinstance(write, Problem):
                return write
            if write.table.uniques and not write.table.unique_columns.isdisjoint(write.changed):
                risky += 1
                writes.insert(0, write)
            else:
                writes.append(write)
        if len(writes) + len(deletes) > 1:
            _refuse_repeated(change)
        if risky == 0 or (risky == 1 and not deletes):
            return self._write(deletes, writes)
        self._execute("SAVEPOINT change")
        problem = self._write(deletes, writes)
        if problem is not None:
            self._execute("ROLLBACK TO change")
        self._execute("RELEASE change")
        return problem

    def _find_delete(self, key: Key) -> tuple[Table, int] | Problem:
        table = self._table(key.kind)
        rows = self._execute(table.state_sql, (key.id,)).fetchall()
        found = rows[0] if rows else None
        if found is None or (key.version is not None and found[1] != key.version):
            if found is None and key.version is None:
                return table, 0  # nothing there to delete, which is what was asked for
            return _conflict(key.kind, key.id)
        return table, found[0]

    def _find_write(self, entity: Entity) -> _Write | Problem:
        table = self._table(entity.kind)
        index = entity.index
        if not index.keys() <= table.names:
            raise ValueError(f"kind {entity.kind} has no index field {sorted(index.keys() - table.names)}")
        for name in entity.cold:
            if name.partition("/")[0] not in table.cold_write_sql:
                raise ValueError(f"kind {entity.kind} has no cold part {name}")
        rows = self._execute(table.state_sql, (entity.id,)).fetchall()
        get = index.get
        if not rows:
            if entity.version != 0:
                return _conflict(entity.kind, entity.id)
            return _Write(table, entity, None, table.columns, tuple([get(name) for name in table.columns]))
        found = rows[0]
        if entity.version != found[1]:
            return _conflict(entity.kind, entity.id)
        changed = []
        values = []
        at = 2
        for name in table.columns:
            value = get(name)
            if value != found[at]:
                changed.append(name)
                values.append(value)
            at += 1
        return _Write(table, entity, found[0], tuple(changed), tuple(values))

    def _write(self, deletes: list[tuple[Table, int]], writes: list[_Write]) -> Problem | None:
        execute = self._execute
        for table, gone in deletes:
            for sql in table.delete_sql:
                execute(sql, (gone,))
        for table, entity, found, changed, values in writes:
            row = found
            try:
                if row is None:
                    execute(table.insert_sql, (entity.id, entity.hot, *values))
                    row = self._last_row()
                else:
                    execute(table.update_sql(changed), (entity.version + 1, entity.hot, *values, row))
            except apsw.ConstraintError:
                return self._duplicate(table, entity)
            for name, data in entity.cold.items():
                part, _, piece = name.partition("/")
                execute(table.cold_write_sql[part], (row, piece, data))
        return None

    def _duplicate(self, table: Table, entity: Entity) -> Problem:
        for index, sql in table.unique_sql:
            values = [entity.id if name == "id" else entity.index.get(name) for name in index.fields]
            for (existing,) in self._execute(sql, values).fetchall():
                if existing != entity.id:
                    return Duplicate(f"{table.name} already has this {index.name}", index=index.name, existing=existing)
        raise AssertionError("a constraint failed that is not a declared unique index")

    def _table(self, kind: str) -> Table:
        table = self._tables.get(kind)
        if table is None:
            raise ValueError(f"kind {kind} was not declared when the store was opened")
        return table


def _conflict(kind: str, identifier: str) -> Conflict:
    return Conflict(f"{kind} {identifier} was changed by somebody else", kind=kind, id=identifier)


def _refuse_repeated(change: Change) -> None:
    named = [(write.kind, write.id) for write in change.writes] + [(key.kind, key.id) for key in change.deletes]
    if len(set(named)) != len(named):
        raise ValueError("a change names an entity more than once")
