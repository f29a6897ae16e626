"""Conversations written into one text: ChatML tags and transcripts with speaker labels."""

import re
from collections import Counter
from typing import NamedTuple

from mcp_control.techdeck.formats.names import LABELS

LEAD_LIMIT = 500
"""Characters before the first label that still pass for a system message."""

_CHATML = re.compile(r"<\|im_start\|>[ \t]*([^\s<]*)[ \t]*\r?\n?(.*?)(<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_KNOWN = re.compile(
    r"^[ \t]*((?i:Human|User|Client|Patient|Seeker|Assistant|Bot|Therapist|Counsell?or|Supporter|System)|AI|Q|A)"
    r"[ \t]*:[ \t]*",
    re.MULTILINE,
)
_NAMED = re.compile(r"^[ \t]*([^\W\d_][\w.'-]{0,20}(?: [^\W\d_][\w.'-]{0,20}){0,2})[ \t]*:[ \t]*", re.MULTILINE)


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
    if ":" not in text:
        return False
    return len(_roles(text)) >= 2 or len(_names(text)) == 2


def transcript_turns(text: str) -> Turns:
    """Turns of a transcript, split at line starts only; what precedes the first label is `lead`."""
    if len(_roles(text)) >= 2:
        marks = [(m.start(), m.end(), LABELS[m[1].casefold()]) for m in _KNOWN.finditer(text)]
        confidence = 1.0
    else:
        names = _names(text)
        roles = dict(zip(names, ("user", "assistant"), strict=False))
        marks = [(m.start(), m.end(), roles[m[1]]) for m in _NAMED.finditer(text) if m[1] in roles]
        confidence = 0.5
    if not marks:
        return Turns([])
    ends = [start for start, _, _ in marks[1:]] + [len(text)]
    turns = [(role, text[begin:end].strip()) for (_, begin, role), end in zip(marks, ends, strict=True)]
    return Turns(turns, confidence, lead=text[: marks[0][0]].strip())


def _roles(text: str) -> set[str]:
    return {LABELS[match[1].casefold()] for match in _KNOWN.finditer(text)} - {"system"}


def _names(text: str) -> list[str]:
    """Names that label at least two lines, in order of appearance."""
    counts = Counter(match[1] for match in _NAMED.finditer(text))
    return [name for name, times in counts.items() if times >= 2]
