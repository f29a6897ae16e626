"""From one record of a known format to canonical messages. Pure: no I/O, no state, one rule per function."""

import ast
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from mcp_control.techdeck.formats import names, recognise, text
from mcp_control.techdeck.formats.names import shown, type_name

Message = tuple[str, str, str | None, str | None]
"""Role, content, name and time stamp."""


class MappingError(Exception):
    """The record cannot be mapped: a stable code, and a reason that does not quote content."""

    def __init__(self, code: str, detail: str, message: int | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.message = message

    def text(self, row: int) -> str:
        """The reason with its place."""
        place = f"row {row}" if self.message is None else f"row {row}, message {self.message}"
        return f"{place}: {self.detail}"


class Mapped(NamedTuple):
    """Canonical messages, the record's keys they came from, and what else is worth keeping."""

    messages: list[Message]
    used: tuple[str, ...] = ()
    confidence: float = 1.0
    flags: tuple[str, ...] = ()
    meta: Mapping[str, Any] = {}


def clean(value: str) -> str:
    """Text as the canonical schema wants it: NFC, LF line ends."""
    if "\r" in value:
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    return value if value.isascii() else unicodedata.normalize("NFC", value)


def content_of(value: Any, index: int) -> str:
    """A message's text. Null is blank; a list joins its text parts; anything else raises E_CONTENT_TYPE."""
    if isinstance(value, str):
        return clean(value)
    if value is None:
        return ""
    if isinstance(value, list):
        parts: list[str] = []
        for part in value:
            inner = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            if not isinstance(inner, str):
                raise MappingError("E_CONTENT_TYPE", "content part is not text", index)
            parts.append(inner)
        return clean("\n".join(parts))
    raise MappingError("E_CONTENT_TYPE", f"content is {type_name(value)}, expected text", index)


def role_of(value: Any, index: int) -> str:
    """The canonical role of a role name. Raises E_ROLE for an unknown one."""
    known = names.ROLES.get(value) if isinstance(value, str) else None
    if known is None and isinstance(value, str):
        known = names.ROLES.get(value.strip().rstrip(":").casefold())
    if known is None:
        what = shown(value) if isinstance(value, str) else type_name(value)
        raise MappingError("E_ROLE", f"unknown role {what}", index)
    return known


def _stamp(item: dict[str, Any]) -> tuple[str | None, str | None]:
    for key in names.TIME_KEYS:
        value = item.get(key)
        if value is not None and isinstance(value, str | int | float):
            return key, str(value)
    return None, None


def _extras(item: dict[str, Any], used: tuple[str | None, ...]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in used and value is not None}


def _pairs(items: list[Any], role: str, body: str) -> tuple[list[Message], dict[str, Any]]:
    messages: list[Message] = []
    rest: dict[str, Any] = {}
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise MappingError("E_CONTENT_TYPE", f"message is {type_name(item)}, expected an object", index)
        messages.append(_message(item, index, role_of(item.get(role), index), role, body, rest))
    return messages, {"message_fields": rest} if rest else {}


def _message(item: dict[str, Any], index: int, role: str, key: str | None, body: str, rest: dict[str, Any]) -> Message:
    content = content_of(item.get(body), index)
    if len(item) == 2:
        return role, content, None, None
    name = item.get("name")
    label = clean(name) if isinstance(name, str) else None
    time_key, time = _stamp(item)
    extra = _extras(item, (key, body, time_key, "name" if label is not None else None))
    if extra:
        rest[str(index)] = extra
    return role, content, label, time


def _chatml(record: dict[str, Any]) -> Mapped:
    key, items = recognise.message_list(record) or ("", [])
    if not items:
        raise MappingError("E_NO_MESSAGES", "no messages")
    mixed = any(isinstance(item, dict) and "from" in item and "value" in item for item in items)
    messages, rest = _pairs(items, "role", "content")
    return Mapped(messages, (key,), flags=("W_MIXED_KEYS",) if mixed else (), meta=rest)


def _sharegpt(record: dict[str, Any]) -> Mapped:
    key, items = recognise.message_list(record) or ("", [])
    if not items:
        raise MappingError("E_NO_MESSAGES", "no messages")
    messages, rest = _pairs(items, "from", "value")
    return Mapped(messages, (key,), meta=rest)


def _alternating(texts: list[Any]) -> list[Message]:
    return [
        ("assistant" if index % 2 else "user", content_of(value, index), None, None)
        for index, value in enumerate(texts)
    ]


def _personachat(record: dict[str, Any]) -> Mapped:
    """Only the last utterance: each one before is a prefix of it. Its last candidate is the true answer."""
    last = record["utterances"][-1]
    history = last.get("history") if isinstance(last, dict) else None
    candidates = last.get("candidates") if isinstance(last, dict) else None
    if not isinstance(history, list) or not isinstance(candidates, list) or not candidates:
        raise MappingError("E_NO_MESSAGES", "the last utterance has no history or no candidates")
    personality = record.get("personality")
    lines = personality if isinstance(personality, list) else [personality]
    system = " ".join(clean(line) for line in lines if isinstance(line, str) and line.strip())
    messages = _alternating([*history, candidates[-1]])
    if system:
        messages.insert(0, ("system", system, None, None))
    return Mapped(messages, ("utterances", "personality"), 1.0 if len(history) % 2 else 0.5)


def _turns(record: Any) -> Mapped:
    key, items = recognise.turn_list(record) or (None, [])
    used = () if key is None else (key,)
    if all(isinstance(item, str) for item in items):
        return Mapped(_alternating(items), used, 0.5)
    if all(isinstance(item, list) for item in items):
        return Mapped(_alternating([value for pair in items for value in pair]), used, 1.0)
    rest: dict[str, Any] = {}
    messages: list[Message] = []
    speakers, confidence = _speakers(items)
    for index, item in enumerate(items):
        body = recognise.text_key(item) if isinstance(item, dict) else None
        if body is None:
            raise MappingError("E_CONTENT_TYPE", "turn has no text", index)
        key = recognise.role_key(item)
        if key is None:
            role = "assistant" if index % 2 else "user"
        else:
            role = speakers.get(item[key]) or role_of(item[key], index)
        messages.append(_message(item, index, role, key, body, rest))
    return Mapped(messages, used, confidence, meta={"message_fields": rest} if rest else {})


def _speakers(items: list[Any]) -> tuple[dict[Any, str], float]:
    """Roles of exactly two unknown speakers, by appearance; with roles known or missing there is nothing to add."""
    labels: list[str] = []
    for item in items:
        key = recognise.role_key(item) if isinstance(item, dict) else None
        if key is None:
            return {}, 0.5
        if isinstance(item[key], str) and item[key] not in labels:
            labels.append(item[key])
    if len(labels) == 2 and not any(label.strip().casefold() in names.ROLES for label in labels):
        return {labels[0]: "user", labels[1]: "assistant"}, 0.5
    return {}, 1.0


def _alpaca(record: dict[str, Any]) -> Mapped:
    output = recognise.alpaca_output(record) or "output"
    context = "input" if "input" in record else "context"
    messages: list[Message] = []
    system = content_of(record.get("system"), 0)
    if system.strip():
        messages.append(("system", system, None, None))
    used = ["instruction", context, "system", output]
    history = record.get("history")
    if isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        messages += _alternating([value for pair in history for value in pair])
        used.append("history")
    index = len(messages)
    question, more = content_of(record["instruction"], index), content_of(record.get(context), index)
    messages.append(("user", f"{question}\n\n{more}" if more.strip() else question, None, None))
    messages.append(("assistant", content_of(record[output], index + 1), None, None))
    return Mapped(messages, tuple(used))


def _qa(record: dict[str, Any]) -> Mapped:
    questions, answers = recognise.qa_columns(record)
    if len(questions) > 1 or len(answers) > 1:
        columns = ", ".join(shown(name) for name in (*questions, *answers))
        raise MappingError(
            "E_AMBIGUOUS_COLUMNS", f"several columns fit ({columns}); give a mapping of user and assistant"
        )
    system = next((key for key in record if names.folded(key) == "context" and key not in questions), None)
    return _columns(record, system, questions[0], answers[0])


def _columns(record: dict[str, Any], system: str | None, user: str, assistant: str) -> Mapped:
    messages: list[Message] = []
    used = [user, assistant]
    if system is not None:
        used.append(system)
        content = content_of(record.get(system), 0)
        if content.strip():
            messages.append(("system", content, None, None))
    messages.append(("user", content_of(record.get(user), len(messages)), None, None))
    messages.append(("assistant", content_of(record.get(assistant), len(messages)), None, None))
    return Mapped(messages, tuple(used))


def _chatml_text(record: Any) -> Mapped:
    key, value = recognise.text_field(record, text.is_chatml) or (None, "")
    found = text.chatml_turns(clean(value))
    messages: list[Message] = [
        (role_of(role, index), content, None, None) for index, (role, content) in enumerate(found.turns)
    ]
    return Mapped(messages, () if key is None else (key,), flags=("W_UNCLOSED",) if found.unclosed else ())


def _transcript(record: Any) -> Mapped:
    key, value = recognise.text_field(record, text.is_transcript) or (None, "")
    found = text.transcript_turns(clean(value))
    if len(found.lead) > text.LEAD_LIMIT:
        raise MappingError("E_LEADING_TEXT", f"{len(found.lead)} characters before the first label")
    messages: list[Message] = [("system", found.lead, None, None)] if found.lead else []
    messages += [(role, content, None, None) for role, content in found.turns]
    return Mapped(messages, () if key is None else (key,), found.confidence)


RULES: dict[str, Callable[[Any], Mapped]] = {
    "chatml": _chatml,
    "sharegpt": _sharegpt,
    "personachat": _personachat,
    "turns": _turns,
    "alpaca": _alpaca,
    "qa": _qa,
    "chatml_text": _chatml_text,
    "transcript": _transcript,
}
"""The rule of each format whose records stand alone (a long table is grouped first)."""


def by_mapping(record: Any, mapping: Mapping[str, str]) -> Mapped:
    """Map by columns that the caller named. Raises E_FORMAT_UNKNOWN when the record lacks them."""
    if not isinstance(record, dict) or any(
        mapping[field] not in record for field in ("messages", "text", "user", "assistant") if field in mapping
    ):
        raise MappingError("E_FORMAT_UNKNOWN", "the columns of the mapping are not there")
    if "user" in mapping and "assistant" in mapping:
        return _columns(record, mapping.get("system"), mapping["user"], mapping["assistant"])
    field = "messages" if "messages" in mapping else "text"
    column = mapping.get(field, "")
    value = record.get(column)
    if field == "messages" and isinstance(value, str):
        value = _unpack(value) or value
    inner = {"messages": value} if isinstance(value, list) else value
    name = recognise.recognise(inner)
    if name is None and isinstance(value, list):
        name = recognise.recognise(inner := value)
    if name is None or name not in RULES:
        raise MappingError("E_FORMAT_UNKNOWN", "the mapped column holds no known conversation")
    return RULES[name](inner)._replace(used=(column,))


def prepare(record: Any) -> tuple[Any, tuple[str, ...]]:
    """What holds for every format before its rule: lists packed as JSON text are unpacked, preferences reduced.

    Returns the record and the flags earned. Raises E_JSON for a packed list of messages that is broken.
    """
    if not isinstance(record, dict):
        return record, ()
    for key in names.PACKED:
        value = record.get(key)
        if isinstance(value, str) and value[:1] in ("[", "{"):
            unpacked = _unpack(value)
            if unpacked is not None:
                record = {**record, key: unpacked}
            elif key in ("messages", "conversations"):
                raise MappingError("E_JSON", f"column {key} is not valid JSON")
    if "chosen" in record and "rejected" in record:
        return _prefer(record), ("W_PREFERENCE",)
    return record, ()


def _unpack(value: str) -> Any:
    """The list in a cell: JSON, or a Python literal as table writers of the field leave it. None when it is neither."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        pass
    try:
        found = ast.literal_eval(value)
        orjson.dumps(found)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return found


def _prefer(record: dict[str, Any]) -> dict[str, Any]:
    """A preference pair reduced to its chosen side, before any other rule; the rejected side stays as a field."""
    chosen, prompt = record["chosen"], record.get("prompt")
    rest = {key: value for key, value in record.items() if key not in ("chosen", "prompt")}
    if isinstance(chosen, dict):
        chosen = [chosen]
    if isinstance(chosen, list):
        if isinstance(prompt, list):
            return {"messages": [*prompt, *chosen], **rest}
        asked = any(
            isinstance(item, dict) and item.get("role", item.get("from")) in ("user", "human") for item in chosen
        )
        if isinstance(prompt, str) and not asked:
            chosen = [{"role": "user", "content": prompt}, *chosen]
        elif prompt is not None:
            rest["prompt"] = prompt
        return {"messages": chosen, **rest}
    if isinstance(chosen, str) and (text.is_chatml(chosen) or text.is_transcript(chosen)):
        return {"text": chosen, **rest, **({} if prompt is None else {"prompt": prompt})}
    return {"prompt": prompt, "response": chosen, **rest} if prompt is not None else {"response": chosen, **rest}
