"""Which conversation format a record has, by its keys and shapes alone. The order of the tests is the rule."""

from collections.abc import Callable
from typing import Any

from mcp_control.techdeck.formats.names import (
    ANSWERS,
    FORMATS,
    QUESTIONS,
    ROLE_KEYS,
    TABLE_CONVERSATION,
    TABLE_ROLE,
    TABLE_TEXT,
    TABLE_TURN,
    TEXT_FIELDS,
    TEXT_KEYS,
    TURN_LISTS,
    folded,
)
from mcp_control.techdeck.formats.text import is_chatml, is_transcript


def recognise(record: Any) -> str | None:
    """The first format of the table whose signature `record` has, or None."""
    for name, test in _TESTS:
        if test(record):
            return name
    return None


def matches(name: str, record: Any) -> bool:
    """True when `record` has the signature of the format `name`."""
    return dict(_TESTS)[name](record)


def message_list(record: Any) -> tuple[str, list[Any]] | None:
    """The key and list under which a record keeps role and text pairs of rules 1 to 3."""
    if not isinstance(record, dict):
        return None
    for key in ("messages", "conversations", "conversation"):
        value = record.get(key)
        if isinstance(value, list):
            return key, value
    return None


def _pair(record: Any, role: str, text: str) -> bool:
    found = message_list(record)
    if found is None:
        return False
    key, items = found
    if not items:
        return key == "messages" and role == "role"
    # A fault of one message is that row's fault, not another format.
    return any(isinstance(item, dict) and (role in item and text in item) for item in items)


def _chatml(record: Any) -> bool:
    return _pair(record, "role", "content")


def _sharegpt(record: Any) -> bool:
    return _pair(record, "from", "value") or (
        isinstance(record, dict) and record.get("conversations") == [] and not _chatml(record)
    )


def _personachat(record: Any) -> bool:
    items = record.get("utterances") if isinstance(record, dict) else None
    return isinstance(items, list) and any(
        isinstance(item, dict) and "history" in item and "candidates" in item for item in items
    )


def turn_list(record: Any) -> tuple[str | None, list[Any]] | None:
    """The list of turns of rule 5 and its key (None when the record itself is the list)."""
    if isinstance(record, list):
        return (None, record) if _is_turns(record) else None
    if not isinstance(record, dict):
        return None
    for key in TURN_LISTS:
        value = record.get(key)
        if isinstance(value, list) and _is_turns(value):
            return key, value
    return None


def _is_turns(items: list[Any]) -> bool:
    if not items:
        return False
    if all(isinstance(item, str) for item in items):
        return True
    if all(isinstance(item, list) and len(item) == 2 and _texts(item) for item in items):
        return True
    return any(isinstance(item, dict) and text_key(item) is not None for item in items) and not any(
        isinstance(item, list) for item in items
    )


def _texts(items: list[Any]) -> bool:
    return all(item is None or isinstance(item, str) for item in items)


def text_key(item: dict[str, Any]) -> str | None:
    """The key that holds a turn's text."""
    return next((key for key in TEXT_KEYS if key in item), None)


def role_key(item: dict[str, Any]) -> str | None:
    """The key that holds a turn's speaker."""
    return next((key for key in ROLE_KEYS if key in item), None)


def _turns(record: Any) -> bool:
    return turn_list(record) is not None and not _alpaca(record)


def alpaca_output(record: dict[str, Any]) -> str | None:
    """The key of an instruction record's answer."""
    return next((key for key in ("output", "response", "completion", "answer") if key in record), None)


def _alpaca(record: Any) -> bool:
    return isinstance(record, dict) and "instruction" in record and alpaca_output(record) is not None


def qa_columns(record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Columns that may hold the question and the answer. Context beside another question is not a question."""
    questions = [key for key in record if folded(key) in QUESTIONS]
    answers = [key for key in record if folded(key) in ANSWERS]
    if len(questions) > 1:
        questions = [key for key in questions if folded(key) != "context"]
    return questions, answers


def _qa(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    questions, answers = qa_columns(record)
    return bool(questions and answers)


def text_field(record: Any, test: Callable[[str], bool]) -> tuple[str | None, str] | None:
    """The text of a record that passes `test` and its key: names of the trade first, then in the record's order."""
    if isinstance(record, str):
        return (None, record) if test(record) else None
    if not isinstance(record, dict):
        return None
    named = [key for key in record if folded(key) in TEXT_FIELDS]
    for key in (*named, *(key for key in record if key not in named)):
        value = record[key]
        if isinstance(value, str) and test(value):
            return key, value
    return None


def _chatml_text(record: Any) -> bool:
    return text_field(record, is_chatml) is not None


def _transcript(record: Any) -> bool:
    return text_field(record, is_transcript) is not None


def table_columns(record: Any) -> dict[str, str] | None:
    """Columns of a long table by meaning: conversation, role, text and, where there is one, turn."""
    if not isinstance(record, dict):
        return None
    names = {folded(key): key for key in reversed(record)}
    found: dict[str, str] = {}
    for meaning, known in (
        ("conversation", TABLE_CONVERSATION),
        ("turn", TABLE_TURN),
        ("role", TABLE_ROLE),
        ("text", TABLE_TEXT),
    ):
        key = next((names[name] for name in known if name in names and names[name] not in found.values()), None)
        if key is not None:
            found[meaning] = key
    return found if {"conversation", "role", "text"} <= found.keys() else None


def _long_table(record: Any) -> bool:
    return table_columns(record) is not None


_TESTS: tuple[tuple[str, Callable[[Any], bool]], ...] = tuple(
    zip(
        FORMATS,
        (_chatml, _sharegpt, _personachat, _turns, _alpaca, _qa, _chatml_text, _transcript, _long_table),
        strict=True,
    )
)
