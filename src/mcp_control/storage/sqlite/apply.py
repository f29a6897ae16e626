"""Applying one Change inside the open transaction: check everything first, then write.

Guards are checked before the first write, so a change that conflicts has written nothing, and the check tells which index columns
change, so that an UPDATE touches no other index. Only a unique index can then refuse a statement: for an entity that is new that of
its id, which spares it a read. One such statement is put first; where there are two or more, or deletes that may free the value, the
change runs in a SAVEPOINT.

What a guard needs is remembered from the last write of an entity, since the entity that was just written is the one most likely to be
written next: this saves a read per write. It holds because this connection is the only one that writes; should another one do so after
all, the PRAGMA data_version tells, and everything is forgotten, as it is when a write is taken back.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import apsw

from mcp_control.kernel.changes import Change, Entity, IndexValue, Key
from mcp_control.kernel.errors import Conflict, Duplicate, Problem
from mcp_control.storage.sqlite.schema import Table

_State = tuple[Any, ...]  # row, version, index values
_Write = tuple[
    Table, Entity, tuple[IndexValue, ...], _State | None
]  # the new index values; the state before (None: insert)
_REMEMBERED: Final = 50_000  # entities per kind, some 300 bytes each


class Applier:
    """Applies changes through one connection, in a transaction that somebody else opens and ends."""

    __slots__ = ("_connection", "_data_version", "_execute", "_last_row", "_remembered", "_tables")

    def __init__(self, connection: apsw.Connection, tables: Mapping[str, Table]) -> None:
        self._connection = connection
        self._execute: Callable[..., Any] = connection.cursor().execute
        self._last_row = connection.last_insert_rowid
        self._tables = tables
        self._remembered: dict[str, dict[str, _State]] = {name: {} for name in tables}
        self._data_version = 0

    def begin(self) -> None:
        """Open a transaction. Raises apsw.BusyError when another connection writes."""
        self._execute("BEGIN IMMEDIATE")
        data_version = self._execute("PRAGMA data_version").fetchall()[0][0]
        if data_version != self._data_version:
            self._data_version = data_version
            self._forget()

    def rollback(self) -> None:
        """Take the open transaction back, if there is one; SQLite may have done so itself."""
        self._forget()
        if self._connection.in_transaction:
            self._execute("ROLLBACK")

    def apply(self, change: Change) -> Problem | None:
        """Apply all of the change or nothing of it; deletes come before writes. Facts are not touched here.

        Returns:
            None, or the Conflict or Duplicate that kept it from being applied.

        Raises:
            ValueError: an undeclared kind, field or part, or one entity twice.
            Exception: a value that cannot be bound. After any of these the transaction must be taken back.
        """
        if len(change.writes) == 1 and not change.deletes:
            write = self._guard(change.writes[0], alone=True)
            return write if isinstance(write, Problem) else self._write(*write)
        return self._apply_many(change)

    def _apply_many(self, change: Change) -> Problem | None:
        _refuse_repeated(change)
        deletes: list[tuple[Table, str, int]] = []
        for key in change.deletes:
            state = self._state(self._table(key.kind), key.id)
            if state is None and key.version is None:
                continue  # nothing there to delete, which is what was asked for
            if state is None or (key.version is not None and state[1] != key.version):
                return _conflict(key)
            deletes.append((self._table(key.kind), key.id, state[0]))
        writes: list[_Write] = []
        risky = 0  # writes that a unique index could refuse
        for entity in change.writes:
            write = self._guard(entity, alone=False)
            if isinstance(write, Problem):
                return write
            if _takes_unique(*write):
                risky += 1
                writes.insert(0, write)
            else:
                writes.append(write)
        if risky == 0 or (risky == 1 and not deletes):
            return self._write_all(deletes, writes)
        self._execute("SAVEPOINT change")
        problem = self._write_all(deletes, writes)
        if problem is not None:
            self._execute("ROLLBACK TO change")
            self._forget()
        self._execute("RELEASE change")
        return problem

    def _state(self, table: Table, identifier: str) -> _State | None:
        found = self._remembered[table.name].get(identifier)
        if found is None:
            rows = self._execute(table.state_sql, (identifier,)).fetchall()
            return rows[0] if rows else None
        return found

    def _forget(self) -> None:
        for states in self._remembered.values():
            states.clear()

    def _guard(self, entity: Entity, *, alone: bool) -> _Write | Problem:
        """Check that the entity is at its version, and find what to set; that of one that is new may be left to its INSERT."""
        table = self._table(entity.kind)
        index = entity.index
        shape = tuple(index)
        if shape == table.columns:
            values = tuple(index.values())
        else:
            if shape not in table.shapes:
                table.check_shape(shape)
            get = index.get
            values = tuple([get(name) for name in table.columns])
        if entity.version == 0 and (alone or table.unique_at):
            state = self._remembered[table.name].get(entity.id)
        else:
            state = self._state(table, entity.id)
        if entity.version != (0 if state is None else state[1]):
            return _conflict(entity)
        return table, entity, values, state

    def _write_all(self, deletes: list[tuple[Table, str, int]], writes: list[_Write]) -> Problem | None:
        for table, identifier, row in deletes:
            self._remembered[table.name].pop(identifier, None)
            for sql in table.delete_sql:
                self._execute(sql, (row,))
        for write in writes:
            problem = self._write(*write)
            if problem is not None:
                return problem
        return None

    def _write(
        self, table: Table, entity: Entity, values: tuple[IndexValue, ...], state: _State | None
    ) -> Problem | None:
        execute = self._execute
        try:
            if state is None:
                execute(table.insert_sql, (entity.id, entity.hot, *values))
                row = self._last_row()
            else:
                row = state[0]
                old = state[2:]
                if values == old:
                    execute(table.update_sql(()), (entity.version + 1, entity.hot, row))
                else:
                    changed = [at for at, value in enumerate(values) if value != old[at]]
                    new = [values[at] for at in changed]
                    execute(table.update_sql(tuple(changed)), (entity.version + 1, entity.hot, *new, row))
        except apsw.ConstraintError:
            return self._duplicate(table, entity)
        for name, data in entity.cold.items():
            piece = ""
            sql = table.cold_write_sql.get(name)
            if sql is None:
                part, _, piece = name.partition("/")
                sql = table.cold_write_sql.get(part)
                if sql is None:
                    raise ValueError(f"kind {table.name} has no cold part {part}")
            execute(sql, (row, piece, data))
        states = self._remembered[table.name]
        states[entity.id] = (row, entity.version + 1, *values)
        if len(states) > _REMEMBERED:
            states.clear()  # costs those in use one read each, now and then; an order of age would cost something every time
        return None

    def _duplicate(self, table: Table, entity: Entity) -> Problem:
        if entity.version == 0 and self._execute(table.state_sql, (entity.id,)).fetchall():
            return _conflict(entity)
        for index, sql in table.unique_sql:
            values = [entity.id if name == "id" else entity.index.get(name) for name in index.fields]
            for (existing,) in self._execute(sql, values).fetchall():
                if existing != entity.id:
                    return Duplicate(f"{table.name} already has this {index.name}", index=index.name, existing=existing)
        raise ValueError(f"an index value of {table.name} {entity.id} is not of its declared type")

    def _table(self, kind: str) -> Table:
        table = self._tables.get(kind)
        if table is None:
            raise ValueError(f"kind {kind} was not declared when the store was opened")
        return table


def _takes_unique(table: Table, entity: Entity, values: tuple[IndexValue, ...], state: _State | None) -> bool:
    """Whether a unique index could refuse this write."""
    return any(state is None or values[at] != state[2 + at] for at in table.unique_at)


def _conflict(item: Entity | Key) -> Conflict:
    return Conflict(f"{item.kind} {item.id} was changed by somebody else", kind=item.kind, id=item.id)


def _refuse_repeated(change: Change) -> None:
    named = [(write.kind, write.id) for write in change.writes] + [(key.kind, key.id) for key in change.deletes]
    if len(set(named)) != len(named):
        raise ValueError("a change names an entity more than once")
