"""Number C of the bias tier: sentences that put a group of people down.

A hit is a slur, or a generalisation: a group as the subject and a predicate that belittles, essentialises or excludes it.
At most one hit per sentence and category. What somebody else said (quoted or reported) and what the sentence denies or
challenges weighs nothing; a user's own statement weighs half (it discloses, it does not advise); an assistant's counts.
English only; irony, coded words and implicit bias are not assessed.
Source: design of techdeck, section 4.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from mcp_control.techdeck.validation.lexicon import (
    ADVERBS,
    ALWAYS_DO,
    CATEGORIES,
    CHALLENGE,
    ESSENCE,
    INSULTS,
    LACKS,
    LIKE_YOU_DO,
    MENTION_PATTERN,
    MENTIONS,
    NEVER_DO,
    OWN_OPINION,
    PLACES,
    PLURAL_PATTERN,
    PLURALS,
    REPORTING,
    SINGULAR_SAYINGS,
    SLURS,
    any_of,
)

_FLAGS = re.IGNORECASE | re.ASCII  # the phrases are ASCII; full case folding would match letters that no phrase has

WEIGHTS = {"assistant": 1.0, "user": 0.5}
"""Weight of an unexcused hit by role; other roles are not assessed."""

_ADV = rf"(?:(?:{any_of(ADVERBS)}) )*"
_PREDICATE = (
    rf"(?:(?:are|were|seem|act|tend to be|can be) {_ADV}(?:{any_of(INSULTS)})"
    rf"|(?:are|were) {_ADV}(?:{any_of(ESSENCE)}) \w+"
    rf"|{_ADV}(?:will )?(?:always|only|just|all|constantly) {_ADV}(?:{any_of(ALWAYS_DO)})"
    rf"|{_ADV}(?:never|can't|cannot|can not|don't|do not|won't|will never|shouldn't|should not|should never|couldn't) "
    rf"(?:(?:ever|even|really|just|ever really) )*(?:{any_of(NEVER_DO)})"
    rf"|{_ADV}(?:lack|have no) (?:any |basic |real )?(?:{any_of(LACKS)})"
    rf"|{_ADV}(?:{any_of(PLACES)}))"
)
_GENERALISATION = re.compile(
    rf"\b(?P<who>{PLURAL_PATTERN})(?: today| nowadays| these days| in general| like (?:you|her|him|them|that))? {_PREDICATE}\b",
    _FLAGS,
)
_SAYING = re.compile(rf"\b(?P<who>{any_of(SINGULAR_SAYINGS)})\b", _FLAGS)
_LIKE_YOU = re.compile(rf"\bpeople like you (?:just |really )?(?:{any_of(LIKE_YOU_DO)})\b", _FLAGS)
_SLUR = re.compile(rf"\b(?P<who>{any_of(SLURS)})\b", _FLAGS)
_MENTION = re.compile(rf"\b(?:{MENTION_PATTERN})\b", _FLAGS)
_LIMITED = re.compile(
    r"\b(?:some|many|certain|few|several|a lot of|not all|not every|other|which|if|whether|are) $", _FLAGS
)
_REPORT = re.compile(
    rf"(?P<own>\bi(?:'d|'ll| would| will| also| just| really| honestly)? )?\b(?P<verb>{any_of(REPORTING)})\b",
    _FLAGS,
)
_REPORT_AFTER = re.compile(
    r"[,\"”'] ?(?:he|she|they|my \w+|his \w+|her \w+|people|everyone|someone) (?:said|says|say|told|tells|thinks|thought|yelled|wrote)\b",
    _FLAGS,
)
_CHALLENGE = re.compile(rf"\b(?:{any_of(CHALLENGE)})\b", _FLAGS)
_OPEN_SINGLE = re.compile(r"(?<!\w)'(?!\w*'(?=\w))[^']*$")
_REACH = 400  # characters: keeps a text without full stops from costing its square
_OWN = frozenset(OWN_OPINION)

HINT = rf"(?i)(?-u:\b)(?:{PLURAL_PATTERN}|{any_of(SLURS)}|{any_of(SINGULAR_SAYINGS)}|people like you)(?-u:\b)"
"""Rust regex that matches every sentence `derogations` can flag (apostrophes made straight)."""


class Hit(NamedTuple):
    """A sentence's hit in one category; `excused` when quoted, reported, denied or challenged."""

    category: str
    excused: bool


def _quoted(ahead: str, behind: str) -> bool:
    if ahead.count('"') % 2 == 1 or ahead.count("“") > ahead.count("”"):
        return True
    return _OPEN_SINGLE.search(ahead) is not None and re.search(r"'(?!\w)", behind) is not None


def _excused(sentence: str, start: int, end: int) -> bool:
    ahead, behind = sentence[max(0, start - _REACH) : start], sentence[end : end + _REACH]
    if _quoted(ahead, behind) or _REPORT_AFTER.search(behind):
        return True
    if any(not (report.group("own") and report.group("verb").lower() in _OWN) for report in _REPORT.finditer(ahead)):
        return True
    return bool(_CHALLENGE.search(ahead) or _CHALLENGE.search(behind))


def derogations(sentence: str) -> tuple[Hit, ...]:
    """The hits of one sentence, at most one per category, in the order of `CATEGORIES`; one plain hit beats excused ones.

    What excuses a hit is looked for within 400 characters of it.
    """
    return _cached(sentence) if len(sentence) <= _REACH else _find(sentence)


def _find(sentence: str) -> tuple[Hit, ...]:
    text = sentence.replace("’", "'")
    found: dict[str, bool] = {}

    def add(category: str, start: int, end: int) -> None:
        if found.get(category, True):
            found[category] = _excused(text, start, end)

    for match in _GENERALISATION.finditer(text):
        if not _LIMITED.search(text[max(0, match.start() - 20) : match.start()]):
            # "Black men are ..." is said of Black people: the adjective names the category.
            add(PLURALS[match.group("who").lower()][0][0], match.start(), match.end())
    for pattern, meaning in ((_SAYING, SINGULAR_SAYINGS), (_SLUR, SLURS)):
        for match in pattern.finditer(text):
            for category, _group in meaning[match.group("who").lower()]:
                add(category, match.start(), match.end())
    for match in _LIKE_YOU.finditer(text):
        for mention in _MENTION.finditer(text):
            for category, _group in MENTIONS[mention.group().lower()]:
                add(category, match.start(), match.end())
    return tuple(Hit(category, found[category]) for category in CATEGORIES if category in found)


_cached = lru_cache(maxsize=4096)(_find)  # data sets repeat sentences
