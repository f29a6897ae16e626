"""Which names mean which role or column, in one place. Source: design of techdeck, section 2, format table."""

from typing import Any

ROLES = {
    name: role
    for role, names in {
        "user": "user human usr prompter patient client seeker",
        "assistant": "assistant gpt bot model chatgpt bard therapist counselor counsellor supporter",
        "system": "system developer",
        "tool": "tool function observation",
    }.items()
    for name in names.split()
}
"""Role names of all formats, lower case, to the four canonical roles."""

LABELS = {
    **dict.fromkeys(("human", "user", "client", "patient", "seeker", "q"), "user"),
    **dict.fromkeys(("assistant", "ai", "bot", "therapist", "counselor", "counsellor", "supporter", "a"), "assistant"),
    "system": "system",
}
"""Speaker labels of transcripts, lower case."""

QUESTIONS = ("question", "questiontext", "prompt", "query", "input", "context", "user")
ANSWERS = ("answer", "answertext", "response", "completion", "output", "reply", "assistant")
TURN_LISTS = ("dialog", "dialogue", "turns", "utterances", "history")
PACKED = ("messages", "conversations", "conversation", *TURN_LISTS, "personality", "chosen", "rejected")
"""Fields whose lists may come as JSON text, as in a table's cell."""
ROLE_KEYS = ("role", "from", "speaker", "author")
TEXT_KEYS = ("content", "value", "text", "utterance", "message")
TIME_KEYS = ("ts", "timestamp", "created_at", "time")
TEXT_FIELDS = ("text", "transcript", "conversation", "dialog", "dialogue", "chat", "content")

TABLE_CONVERSATION = (
    "conversationid", "convid", "dialogid", "dialogueid", "sessionid", "conversation", "dialog", "session", "threadid"
)  # fmt: skip
TABLE_TURN = ("turn", "turnid", "turnidx", "turnindex", "idx", "index", "ts", "timestamp", "utteranceidx", "order")
TABLE_ROLE = ("role", "speaker", "author", "speakerrole", "sender")
TABLE_TEXT = ("text", "utterance", "content", "message", "value")

FORMATS = (
    "chatml",
    "sharegpt",
    "personachat",
    "turns",
    "alpaca",
    "qa",
    "chatml_text",
    "transcript",
    "long_table",
)
"""Format names in the order in which they are tested (Vicuna is a subformat of ShareGPT)."""

ALIASES = {"messages": "chatml", "vicuna": "sharegpt", "list": "turns", "question_answer": "qa", "table": "long_table"}

SIGNATURES = (
    "messages[role,content]; conversations[from,value]; utterances[history,candidates]; dialog|turns|history list; "
    "instruction+output; question+answer columns; <|im_start|> text; 'Human:'/'Assistant:' text; "
    "conversation id+role+text columns"
)
"""The known signatures as an error message names them."""


def folded(name: Any) -> str:
    """A column name without case, underscores, hyphens and spaces, for comparison."""
    return str(name).casefold().replace("_", "").replace(" ", "").replace("-", "")


def shown(name: str) -> str:
    """A column or role name fit for a message: short plain names as they are, others by their length only."""
    plain = name.replace("_", "").replace("-", "").replace(" ", "").replace(".", "")
    return name if len(name) <= 40 and (plain.isalnum() or not name) else f"(a name of {len(name)} characters)"


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else "object"
