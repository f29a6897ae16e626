# ruff: noqa: S608  identifiers come from declarations, checked when a kind is declared; values are bound
"""Queries over index fields as SQL. Identifiers come from the declaration and are checked; values are bound."""

from collections.abc import Sequence
from typing import Final

from mcp_control.kernel.changes import IndexValue, Kind, Query, Where
from mcp_control.storage.sqlite.schema import Table

_OPERATORS: Final = {"eq": "=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

Bound = tuple[str, list[IndexValue]]


def find_sql(table: Table, query: Query) -> list[Bound]:
    """Return the SELECTs that answer a query one after the other, without their last value, which is the limit.

    Two only where a page starts among values and may end among nulls, or the other way round: one condition for both would keep
    SQLite from seeking in the index. Raises ValueError for a field that was not declared.
    """
    where, values = _where(table, query.where)
    order = "" if query.order in (None, "id") else f"{_column(table, query.order)} {_direction(query)}, "
    head = table.select_sql
    tail = f'ORDER BY {order}"{table.name}".id {_direction(query)} LIMIT ?'
    found = []
    for condition, position in _after(table, query):
        conditions = " AND ".join(part for part in (where, condition) if part)
        found.append((f"{head} WHERE {conditions} {tail}" if conditions else f"{head} {tail}", [*values, *position]))
    return found


def count_sql(table: Table, where: Sequence[Where], limit: int) -> Bound:
    """Return the SELECT that counts, no further than `limit`."""
    condition, values = _where(table, where)
    clause = f" WHERE {condition}" if condition else ""
    values.append(limit)
    return f'SELECT count(*) FROM (SELECT 1 FROM "{table.name}"{clause} LIMIT ?)', values


def is_led(kind: Kind, query: Query) -> bool:
    """Say whether an index leads straight to the rows, so that the cost is that of the rows asked for and no scan or sort is needed.

    True for ids, and for equality on the first fields of an index where the order goes on with its next field, within bounds or not.
    """
    if len(query.where) == 1 and query.where[0].field == "id":
        return query.where[0].op in ("eq", "in") and query.order in (None, "id")
    if any(where.op == "in" or (where.op != "eq" and where.field != query.order) for where in query.where):
        return False
    equal = {where.field for where in query.where if where.op == "eq"}
    if not query.where or query.order in equal:
        return False
    wanted = () if query.order is None else (query.order,)
    for index in kind.indexes:
        rest = index.fields[len(equal) :]
        if set(index.fields[: len(equal)]) == equal and (
            rest == (*wanted, "id") or (index.unique and not rest and not wanted)
        ):
            return True
    return False


def _where(table: Table, where: Sequence[Where]) -> Bound:
    parts: list[str] = []
    values: list[IndexValue] = []
    for condition in where:
        column = _column(table, condition.field)
        value = condition.value
        if condition.op == "in":
            if value is None or isinstance(value, (str, int)):
                raise ValueError(f"`in` on {condition.field} needs a list")
            parts.append(f"{column} IN ({', '.join('?' * len(value))})")
            values.extend(value)
        elif value is None or isinstance(value, (str, int)):
            parts.append(f"{column} {_OPERATORS[condition.op]} ?")
            values.append(value)
        else:
            raise ValueError(f"`{condition.op}` on {condition.field} needs one value")
    return " AND ".join(parts), values


def _after(table: Table, query: Query) -> list[Bound]:
    """The keyset conditions. Nulls sort first, as SQLite and MongoDB have it, so they come last when descending."""
    if query.after is None:
        return [("", [])]
    sign = "<" if query.descending else ">"
    identifier = f'"{table.name}".id'
    if query.order in (None, "id"):
        if not query.after:
            raise ValueError("the position is (id,)")
        return [(f"{identifier} {sign} ?", [query.after[-1]])]
    if len(query.after) != 2:
        raise ValueError("the position is (value of the order field, id)")
    column = _column(table, query.order)
    value, last = query.after
    if value is None:
        nulls: Bound = (f"{column} IS NULL AND {identifier} {sign} ?", [last])
        return [nulls] if query.descending else [nulls, (f"{column} IS NOT NULL", [])]
    beyond: Bound = (f"({column}, {identifier}) {sign} (?, ?)", [value, last])
    return [beyond, (f"{column} IS NULL", [])] if query.descending else [beyond]


def _column(table: Table, name: str | None) -> str:
    if name != "id" and name not in table.names:
        raise ValueError(f"kind {table.name} has no index field {name}")
    return f'"{table.name}"."{name}"'


def _direction(query: Query) -> str:
    return "DESC" if query.descending else "ASC"
