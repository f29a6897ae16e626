"""Conversations written into one text: ChatML tags and transcripts with speaker labels."""

import re
from collections import Counter
from typing import NamedTuple

from mcp_control.techdeck.formats.names import LABELS

LEAD_LIMIT = 500
"""Characters before the first label that still pass for a system message."""

_CHATML = re.compile(r"<\|im_start\|>[ \t]*([^\s<]*)[ \t]*\r?\n?(.*?)(<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_NAME = re.compile(r"[^\W\d_][\w.'-]{0,20}(?: [^\W\d_][\w.'-]{0,20}){0,2}")
_LONGEST = 70
_UPPER = ("q", "a", "ai")
"""Labels that count only in capitals."""


class Mark(NamedTuple):
    """A label at the start of a line: where its line and its text begin."""

    start: int
    body: int
    name: str


class Turns(NamedTuple):
    """Role names and texts found, how sure the roles are (0..1), and whether the last ChatML tag was left open."""

    turns: list[tuple[str, str]]
    confidence: float = 1.0
    unclosed: bool = False
    lead: str = ""


def is_chatml(text: str) -> bool:
    """True when the text has a ChatML tag."""
    return "<|im_start|>" in text


def chatml_turns(text: str) -> Turns:
    """Turns of ChatML tags; an unclosed last tag is accepted and reported."""
    turns: list[tuple[str, str]] = []
    unclosed = False
    for match in _CHATML.finditer(text):
        turns.append((match[1], match[2].strip()))
        unclosed = match[3] == ""
    return Turns(turns, unclosed=unclosed)


def is_transcript(text: str) -> bool:
    """True with labels of two roles at line starts, or with exactly two recurring unknown names."""
    marks = _marks(text)
    return len(_roles(marks)) >= 2 or len(_names(marks)) == 2


def transcript_turns(text: str) -> Turns:
    """Turns of a transcript, split at line starts only; what precedes the first label is `lead`."""
    marks = _marks(text)
    confidence = 1.0
    if len(_roles(marks)) >= 2:
        labelled = [(mark, role) for mark in marks if (role := _role(mark.name)) is not None]
    else:
        roles = dict(zip(_names(marks), ("user", "assistant"), strict=False))
        labelled = [(mark, roles[mark.name]) for mark in marks if mark.name in roles]
        confidence = 0.5
    if not labelled:
        return Turns([])
    ends = [mark.start for mark, _ in labelled[1:]] + [len(text)]
    turns = [(role, text[mark.body : end].strip()) for (mark, role), end in zip(labelled, ends, strict=True)]
    return Turns(turns, confidence, lead=text[: labelled[0][0].start].strip())


def _marks(text: str) -> list[Mark]:
    """Every line start that could be a label."""
    marks: list[Mark] = []
    start = 0
    while start < len(text):
        colon = text.find(":", start, start + _LONGEST)
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if 0 < colon < end:
            name = text[start:colon].strip()
            if name:
                marks.append(Mark(start, colon + 1, name))
        start = end + 1
    return marks


def _role(name: str) -> str | None:
    folded = name.casefold()
    return None if folded in _UPPER and not name.isupper() else LABELS.get(folded)


def _roles(marks: list[Mark]) -> set[str]:
    return {role for mark in marks if (role := _role(mark.name)) is not None} - {"system"}


def _names(marks: list[Mark]) -> list[str]:
    """Names that label at least two lines, in order of appearance."""
    counts = Counter(mark.name for mark in marks)
    return [name for name, times in counts.items() if times >= 2 and _NAME.fullmatch(name)]
