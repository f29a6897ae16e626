"""Long tables: one row per turn, grouped into conversations. Source: design of techdeck, section 2, format 10."""

from collections.abc import Iterable, Mapping
from typing import Any

from mcp_control.techdeck.formats.mapping import Mapped, MappingError, Message, clean, content_of, role_of
from mcp_control.techdeck.formats.recognise import table_columns

Turn = tuple[int, dict[str, Any]]
"""Row number and record."""


def columns_of(record: Any, mapping: Mapping[str, str]) -> dict[str, str] | None:
    """Columns by meaning: those of the caller's mapping, else those recognised."""
    if "conversation" in mapping:
        given = {"conversation": "conversation", "turn": "turn", "role": "role", "content": "text"}
        found = {meaning: mapping[field] for field, meaning in given.items() if field in mapping}
        whole = isinstance(record, dict) and all(column in record for column in found.values())
        return found if whole and {"role", "text"} <= found.keys() else None
    return table_columns(record)


def conversation_of(record: Any, mapping: Mapping[str, str]) -> str | None:
    """The conversation that a row belongs to, or None when the row names none."""
    columns = columns_of(record, mapping)
    value = None if columns is None else record[columns["conversation"]]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    return str(value).strip() or None


def map_group(turns: list[Turn], mapping: Mapping[str, str]) -> Mapped:
    """One conversation from its rows. Numbered turns are sorted; without numbers the file's order holds (W_ORDER).

    Fields equal in all rows go to the metadata once, others as a list by turn. A MappingError's `message` is the
    index of the offending row in `turns`.
    """
    columns = columns_of(turns[0][1], mapping)
    if columns is None:
        raise MappingError("E_FORMAT_UNKNOWN", "no conversation, role and text columns")
    keys = [_order(record.get(columns.get("turn", ""))) for _, record in turns]
    positions = list(range(len(turns)))
    numbered = all(key is not None for key in keys) and len({type(key) for key in keys}) == 1
    if numbered:
        positions.sort(key=lambda position: (keys[position], position))
    messages: list[Message] = []
    for position in positions:
        record = turns[position][1]
        role = role_of(record.get(columns["role"]), position)
        messages.append((role, content_of(record.get(columns["text"]), position), None, _time(record, columns)))
    used = tuple(columns.values())
    meta = _shared([turns[position][1] for position in positions], used)
    return Mapped(messages, used, flags=() if numbered else ("W_ORDER",), meta=meta)


def _order(value: Any) -> float | str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        return float(value)
    except ValueError:
        return value.strip()


def _time(record: dict[str, Any], columns: Mapping[str, str]) -> str | None:
    value = record.get(columns.get("turn", ""))
    return clean(value) if isinstance(value, str) and isinstance(_order(value), str) else None


def _shared(records: Iterable[dict[str, Any]], used: tuple[str, ...]) -> dict[str, Any]:
    rows = list(records)
    names = sorted({name for record in rows for name in record if name not in used})
    meta: dict[str, Any] = {}
    for name in names:
        values = [record.get(name) for record in rows]
        meta[name] = values[0] if all(value == values[0] for value in values) else values
    return meta
