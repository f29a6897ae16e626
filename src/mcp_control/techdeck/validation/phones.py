"""Telephone numbers in one text: the numbering plans of `phonenumbers`, crisis lines and context.

Crisis lines stay in the text: taking them out of a counselling data set would do harm and protect nobody. They are known
by number, or as a free number that the text calls a helpline.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

import phonenumbers

from mcp_control.techdeck.validation.contexts import BARE_NUMBER_REFUSED, HELPLINE, PHONE_CONTEXT

CRISIS_LINES = frozenset(
    {
        "+18002738255",  # 988 Suicide & Crisis Lifeline, also veterans (US)
        "+18006624357",  # SAMHSA helpline (US)
        "+18009855990",  # SAMHSA disaster distress (US)
        "+18007997233",  # domestic violence (US)
        "+18006564673",  # RAINN, sexual assault (US)
        "+18664887386",  # Trevor Project (US)
        "+18775658860",  # Trans Lifeline (US)
        "+18773306366",  # Trans Lifeline (CA)
        "+18888434564",  # LGBT national help centre (US)
        "+18007842433",  # 1-800-SUICIDE (US)
        "+18009506264",  # NAMI (US)
        "+18009312237",  # eating disorders (US)
        "+18004224453",  # Childhelp (US)
        "+18007862929",  # runaway safeline (US)
        "+18004483000",  # Boys Town (US)
        "+18003668288",  # S.A.F.E., self-injury (US)
        "+18009444773",  # postpartum support (US)
        "+18338526262",  # maternal mental health (US)
        "+18002221222",  # poison control (US)
        "+18334564566",  # Talk Suicide Canada
        "+18006686868",  # Kids Help Phone (CA)
        "+44116123",  # Samaritans (GB)
        "+448001111",  # Childline (GB)
        "+448082000247",  # domestic abuse (GB)
        "+44800585858",  # CALM (GB)
        "+448000684141",  # PAPYRUS (GB)
        "+443001233393",  # Mind (GB)
        "+61131114",  # Lifeline (AU)
        "+611800551800",  # Kids Helpline (AU)
        "+353116123",  # Samaritans (IE)
    }
)
"""Public lines in E.164. Short codes (988, 911, 999, 112, 111, 116 123, text 741741 or 85258) are no valid numbers of a
region's plan, so they are never matched in the first place."""

_RUN = re.compile(
    r"(?<![\w.@/-])(?:\+ ?)?\(?\d(?:[ \u00a0().\-–/]{0,3}\d){6,80}(?: ?(?:x|ext\.?|extension) ?\d{1,6})?(?![\w@]|[.,]\d)",
    re.IGNORECASE,
)


_TOKEN = re.compile(r"[^ \u00a0]+")
_TOKENS_MAX = 6  # "+44 20 79 46 09 58" has six
_DIGITS = (7, 15)  # E.164 allows 15


@lru_cache(maxsize=16_384)
def _match(window: str, region: str) -> tuple[int, int, str, bool] | None:
    """Start, end, E.164 and whether the call is free, of a valid number of `region` that takes all digits of `window`."""
    digits = sum(character.isdigit() for character in window)
    if not _DIGITS[0] <= digits <= _DIGITS[1]:
        return None
    for found in phonenumbers.PhoneNumberMatcher(window, region, leniency=phonenumbers.Leniency.VALID):
        if sum(character.isdigit() for character in found.raw_string) < digits:
            return None
        e164 = phonenumbers.format_number(found.number, phonenumbers.PhoneNumberFormat.E164)
        free = phonenumbers.number_type(found.number) == phonenumbers.PhoneNumberType.TOLL_FREE
        return found.start, found.end, e164, free
    return None


def phones(
    text: str, before: str, regions: tuple[str, ...], begin: int, finish: int
) -> Iterator[tuple[int, int, str, bool]]:
    """Start, end, E.164 value and whether it is personal, for each number in `text[begin:finish]`.

    Digits without any separator or plus sign count only next to a word such as "call" or "phone", and never right after
    "order", "invoice" and the like.
    """
    for run in _RUN.finditer(text, begin, finish):
        tokens = [(run.start() + token.start(), run.start() + token.end()) for token in _TOKEN.finditer(run.group())]
        at = 0
        while at < len(tokens):
            step = 1
            # The longest window first, so that a number in groups is not taken for a shorter one.
            for last in range(min(at + _TOKENS_MAX, len(tokens)), at, -1):
                start, end = tokens[at][0], tokens[last - 1][1]
                window = text[start:end]
                hit = next((hit for region in regions if (hit := _match(window, region)) is not None), None)
                if hit is not None:
                    start, end = start + hit[0], start + hit[1]
                    if _in_context(text, before, start, end):
                        public = hit[2] in CRISIS_LINES or (
                            hit[3] and bool(HELPLINE.search(text[max(0, start - 60) : start]))
                        )
                        yield start, end, hit[2], not public
                    step = last - at
                    break
            at += step


def _in_context(text: str, before: str, first: int, last: int) -> bool:
    if not text[first:last].isdigit():
        return True
    if BARE_NUMBER_REFUSED.search(text[max(0, first - 25) : first]):
        return False
    ahead = before + " " + text[max(0, first - 40) : first]
    return bool(PHONE_CONTEXT.search(ahead) or PHONE_CONTEXT.search(text[last : last + 25]))
