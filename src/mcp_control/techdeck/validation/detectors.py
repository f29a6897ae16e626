"""Personal data in one text: patterns, validators and the order in which they win.

A detector yields candidates; where two overlap the class earlier in `CLASSES` wins. A candidate that is known not to be
personal (a crisis line, a public help page, a role address) keeps its place, so that no weaker class takes its digits,
but it is not accepted and never redacted.

Recall is deliberately uneven. Email, URL, card, IBAN, SSN and IP are checked by structure or checksum. Phones need the
numbering plan of a region, dates a birth context, addresses a capitalised street name. Names are found only by context
("my name is X", "Dr. X", a signature, a professional title after the name): most names are missed.
Source: design of techdeck, section 3; ISO 13616 (IBAN), ISO/IEC 7812 (Luhn), RFC 2606 (reserved domains).
"""

import ipaddress
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from datetime import date
from typing import NamedTuple

from stdnum import iban, luhn

from mcp_control.techdeck.validation.contexts import (
    ADDRESS_STOPS,
    BARE_NUMBER_REFUSED,
    CARD_CONTEXT,
    CREDENTIALS,
    DOB_REFUSED,
    EXAMPLE_DOMAINS,
    IP_CONTEXT,
    MONTHS,
    NAME_FIRST,
    NAME_STOPS,
    PERSONAL_HOSTS,
    PERSONAL_PATH,
    ROLE_LOCALS,
    SSN_CONTEXT,
    STREET_TYPES,
    VERSION_CONTEXT,
)
from mcp_control.techdeck.validation.phones import phones

CLASSES = ("URL", "EMAIL", "IBAN", "CARD", "SSN", "IP", "DOB", "PHONE", "ADDRESS", "NAME")
"""Classes of personal data, strongest first; the names are those of the placeholders."""


class Candidate(NamedTuple):
    """A place in a text. `value` is normalised: equal values are the same datum. Not `accepted` means not personal.

    `claim` is where the evidence for it starts (the title before a name): the span falls if a stronger one has that place.
    """

    start: int
    end: int
    kind: str
    value: str
    accepted: bool
    claim: int | None = None


class View(NamedTuple):
    """What a detector looks at: `text`, what was said `before` it, and where its digits are (with a margin)."""

    text: str
    before: str
    regions: tuple[str, ...]
    start: int
    end: int


Detector = Callable[[View], Iterator[Candidate]]

_NAME = r"[A-ZÀ-ÖØ-Þ][A-Za-zÀ-ÖØ-öø-ÿ'’-]{1,40}"  # bounded, as every repetition here: no text may be slow
_NAMES = rf"{_NAME}(?: {_NAME}){{0,2}}"
_URL = re.compile(r"(?:https?://|(?<![\w.])www\.)[^\s<>\"'\])}]+", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]*[\w%+-]@((?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_]{2,24})")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,4})?(?![A-Za-z0-9])")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
_SSN = re.compile(r"(?<![\w-])(\d{3})(?:-(\d{2})-|([ .])(\d{2})\3|(\d{2}))(\d{4})(?![\w-]|\.\d)")
_IP4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|::)[0-9A-Fa-f:]{2,40}(?![\w:])")
_LOCAL_IP4 = tuple(
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
    )
)
_GLOBAL_IP6 = ipaddress.ip_network("2000::/3")
_MONTH = rf"(?:{'|'.join(MONTHS)})[a-z]{{0,6}}\.?"
_DATE = re.compile(
    rf"(?<![\w/.-])(?:(?P<y>\d{{4}})[-/.](?P<m>\d{{1,2}})[-/.](?P<d>\d{{1,2}})"
    rf"|(?P<a>\d{{1,2}})[-/.](?P<b>\d{{1,2}})[-/.](?P<c>\d{{4}}|\d{{2}})"
    rf"|(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?(?: of)? (?P<m2>{_MONTH})(?:,? (?P<y2>\d{{4}}))?"
    rf"|(?P<m3>{_MONTH}) (?P<d3>\d{{1,2}})(?:st|nd|rd|th)?(?:,? (?P<y3>\d{{4}}))?)(?![\w/-]| (?:years?|months?|weeks?|days?) )",
    re.IGNORECASE,
)
_BIRTH_BEFORE = re.compile(
    r"(?:\bborn\b|\bd\.?o\.?b\b|\bbirth ?(?:day|date)?\b|\bbday\b)([^.!?;\n]{0,40})$", re.IGNORECASE
)
_BIRTH_AFTER = re.compile(
    r"^(?: (?:is|was) (?:my|his|her|their) (?:d\.?o\.?b\b|date of birth|birth ?da(?:y|te))|[ ,]{0,2}\(?(?:d\.?o\.?b\b|date of birth))",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"(?<![\w.,/-])\d{1,5}[A-Za-z]?,? (?:(?:North|South|East|West|[NSEW]\.?) )?"
    r"((?:(?:[A-Z][A-Za-z'’-]+|St\.|\d{1,3}(?:st|nd|rd|th)) ){1,3})"
    rf"(?:{STREET_TYPES})\b(?:,? (?:Apt|Apartment|Unit|Suite|Ste|Flat)\.? ?#?\w{{1,5}}\b)?"
)
_PO_BOX = re.compile(r"\bP\.? ?O\.? Box \d{1,6}\b", re.IGNORECASE)
_NAME_SELF = re.compile(
    rf"\b(?i:(?:my|his|her|patient|client|full|first|last)['’]?s? (?:full |first |last |real )?name(?:['’]s| is| was| ?:))"
    rf"\s+({_NAMES})"
)
_NAME_TITLE = re.compile(rf"\b(?:Dr|Mr|Mrs|Ms|Prof)(?:\.|\b) ?({_NAME}(?: {_NAME})?)")
_NAME_SIGNED = re.compile(
    r"(?:^|\n|[.!?] )(?i:(?:(?:best|kind|warm|with) )?(?:regards|wishes|love)|sincerely|yours(?: truly| sincerely)?|take care"
    rf"|thanks|thank you|cheers|best)[,.!]?[ \t]{{0,4}}\n\s{{0,4}}[-–—~]? ?({_NAMES})[ \t]{{0,4}}(?=\n|$)"
)
_NAME_CREDENTIAL = re.compile(rf"\b({_NAME}(?: [A-Z]\.)?(?: {_NAME}){{1,2}}),? ?(?:{CREDENTIALS})")
_CREDENTIAL_SIGNS = ("LC", "LI", "LM", "LP", "NCC", "Psy", "Ph", "Ed", "M.", "MD", "MSW", "RN")
_STREET_SIGNS = tuple(f" {name}" for name in STREET_TYPES.split("|"))
"""Substrings without which the slow pattern cannot match."""


def _urls(view: View) -> Iterator[Candidate]:
    text = view.text
    if "://" not in text and "www." not in text.lower():
        return
    for match in _URL.finditer(text):
        url = match.group().rstrip(".,;:!?*_")
        host, _, path = re.sub(r"^https?://", "", url, flags=re.IGNORECASE).partition("/")
        bare = host.lower().removeprefix("www.").removeprefix("m.")
        personal = (
            "@" in url
            or "%40" in url
            or bool(PERSONAL_PATH.search("/" + path))
            or (bare in PERSONAL_HOSTS and bool(path.strip("/")))
        )
        yield Candidate(match.start(), match.start() + len(url), "URL", url.lower(), personal)


def _emails(view: View) -> Iterator[Candidate]:
    text = view.text
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        value = match.group().lower()
        local = value.partition("@")[0]
        personal = match.group(1).lower() not in EXAMPLE_DOMAINS and local not in ROLE_LOCALS
        yield Candidate(match.start(), match.end(), "EMAIL", value, personal)


def _ibans(view: View) -> Iterator[Candidate]:
    text = view.text
    for match in _IBAN.finditer(text, view.start, view.end):
        found = match.group()
        # The pattern may run on into the next words: the longest valid head that ends at a word's end is the IBAN.
        ends = [len(found), *(i for i in range(len(found) - 1, 14, -1) if found[i] == " ")]
        for end in ends:
            compact = found[:end].replace(" ", "").upper()
            if iban.is_valid(compact, check_country=False):
                yield Candidate(match.start(), match.start() + end, "IBAN", compact, accepted=True)
                break


def _is_card(digits: str) -> bool:
    """Luhn, and a length that the issuer of the prefix uses."""
    two, three, four, size = int(digits[:2]), int(digits[:3]), int(digits[:4]), len(digits)
    if digits[0] == "4":
        known = size in (13, 16, 19)
    elif 51 <= two <= 55 or 2221 <= four <= 2720:
        known = size == 16
    elif two in (34, 37):
        known = size == 15
    elif two in (36, 38, 39) or 300 <= three <= 305:
        known = size == 14
    elif four == 6011 or two == 65 or 644 <= three <= 649 or two == 62 or 3528 <= four <= 3589:
        known = 16 <= size <= 19
    else:
        known = two in (50, 56, 57, 58, 63, 67) and size in (16, 18, 19)
    return known and luhn.is_valid(digits)


def _cards(view: View) -> Iterator[Candidate]:
    text = view.text
    for match in _CARD.finditer(text, view.start, view.end):
        digits = re.sub(r"\D", "", match.group())
        if not _is_card(digits):
            continue
        context = view.before + " " + text[max(0, match.start() - 40) : match.start()]
        if match.group().isdigit() and BARE_NUMBER_REFUSED.search(context) and not CARD_CONTEXT.search(context):
            continue  # one in ten order numbers passes the checksum
        yield Candidate(match.start(), match.end(), "CARD", digits, accepted=True)


def _ssns(view: View) -> Iterator[Candidate]:
    text = view.text
    for match in _SSN.finditer(text, view.start, view.end):
        area, serial = match.group(1), match.group(6)
        group = match.group(2) or match.group(4) or match.group(5)
        if area in ("000", "666") or area[0] == "9" or group == "00" or serial == "0000":
            continue
        value = area + group + serial
        if value in ("078051120", "219099999"):  # printed on specimen cards
            continue
        dashed = match.group(2) is not None
        context = view.before + " " + text[max(0, match.start() - 40) : match.start()]
        if dashed or SSN_CONTEXT.search(context):
            yield Candidate(match.start(), match.end(), "SSN", value, accepted=True)


def _ips(view: View) -> Iterator[Candidate]:
    text = view.text
    found4 = _IP4.finditer(text, view.start, view.end) if text.count(".") >= 3 else ()
    found6 = _IP6.finditer(text, view.start, view.end) if text.count(":") >= 2 else ()
    for match in (*found4, *found6):
        found = match.group().rstrip(":") if not match.group().endswith("::") else match.group()
        try:
            address = ipaddress.ip_address(found)
        except ValueError:
            continue
        context = view.before + " " + text[max(0, match.start() - 30) : match.start()]
        if address.version == 4:
            if VERSION_CONTEXT.search(context):
                continue
            # "1.2.3.4" reads as a version or a section unless the text speaks of addresses.
            if len(found) == 7 and not IP_CONTEXT.search(context):
                continue
            personal = not any(address in network for network in _LOCAL_IP4)
        else:
            if not any(character.isdigit() for character in found):
                continue  # "Bad::Face"
            personal = address in _GLOBAL_IP6
        yield Candidate(match.start(), match.start() + len(found), "IP", str(address), personal)


def _date_value(match: re.Match[str]) -> str | None:
    """The date as ISO text, `--MM-DD` without a year, None if there is no such day."""
    parts = match.groupdict()
    if parts["y"]:
        days = [(parts["y"], parts["m"], parts["d"])]
    elif parts["a"]:
        year = parts["c"] if len(parts["c"]) == 4 else "19" + parts["c"]
        days = [(year, parts["a"], parts["b"]), (year, parts["b"], parts["a"])]
    else:
        name = (parts["m2"] or parts["m3"])[:3].lower()
        if name not in MONTHS:  # a letter that only case folding takes for one of ours
            return None
        month = str(MONTHS.index(name) + 1)
        days = [(parts["y2"] or parts["y3"] or "2000", month, parts["d2"] or parts["d3"])]
    for year, month, day in days:
        try:
            found = date(int(year), int(month), int(day))
        except ValueError:
            continue
        yearless = parts["y"] is None and parts["a"] is None and not (parts["y2"] or parts["y3"])
        return found.strftime("--%m-%d") if yearless else found.isoformat()
    return None


def _births(view: View) -> Iterator[Candidate]:
    text = view.text
    low = (view.before + " " + text).lower()
    if not any(word in low for word in ("born", "birth", "bday", "dob", "d.o.b", "do.b", "d.ob")):
        return
    for match in _DATE.finditer(text, view.start, view.end):
        head = text[max(0, match.start() - 60) : match.start()]
        ahead = _BIRTH_BEFORE.search(head) or (_BIRTH_BEFORE.search(view.before) if not head.strip() else None)
        named = (ahead is not None and not DOB_REFUSED.search(ahead.group(1))) or _BIRTH_AFTER.search(
            text[match.end() : match.end() + 40]
        )
        value = _date_value(match) if named else None
        if value is not None:
            yield Candidate(match.start(), match.end(), "DOB", value, accepted=True)


def _phones(view: View) -> Iterator[Candidate]:
    for start, end, value, personal in phones(view.text, view.before, view.regions, view.start, view.end):
        yield Candidate(start, end, "PHONE", value, personal)


def _addresses(view: View) -> Iterator[Candidate]:
    text = view.text
    for match in _PO_BOX.finditer(text, view.start, view.end):
        yield Candidate(match.start(), match.end(), "ADDRESS", match.group().lower(), accepted=True)
    if not any(sign in text for sign in _STREET_SIGNS):
        return
    for match in _ADDRESS.finditer(text, view.start, view.end):
        words = match.group(1).lower().split()
        if not ADDRESS_STOPS.intersection(words):
            yield Candidate(
                match.start(), match.end(), "ADDRESS", " ".join(match.group().lower().split()), accepted=True
            )


def _names(view: View) -> Iterator[Candidate]:
    text = view.text
    patterns = []
    if any(title in text for title in ("Dr", "Mr", "Ms", "Prof")):
        patterns.append(_NAME_TITLE)
    if "name" in text.lower():
        patterns.append(_NAME_SELF)
    if "\n" in text:
        patterns.append(_NAME_SIGNED)
    if any(sign in text for sign in _CREDENTIAL_SIGNS):
        patterns.append(_NAME_CREDENTIAL)
    for pattern in patterns:
        for match in pattern.finditer(text):
            words = match.group(1).split()
            kept = 1 if words[0].lower() in NAME_FIRST else 0
            while kept < len(words) and words[kept].lower() not in NAME_STOPS:
                kept += 1
            if kept:
                name = " ".join(words[:kept])
                start, end = match.start(1), match.start(1) + len(name)
                yield Candidate(start, end, "NAME", name.casefold(), accepted=True, claim=match.start())


_DIGIT = re.compile(r"[0-9]")
_TEXTUAL: tuple[Detector, ...] = (_urls, _emails)
_NUMERIC: tuple[Detector, ...] = (_ibans, _cards, _ssns, _ips, _births, _phones, _addresses)
_SHORT: tuple[Detector, ...] = (_ibans, _ips, _births, _addresses)  # the ones that do without seven digits in a run
_MARGIN = 40  # characters; street names and month names are shorter
_RUN = re.compile(r"\d(?:[ \u00a0().\-–/]{0,3}\d){6}")


def scan(text: str, before: str = "", regions: tuple[str, ...] = ("US", "GB")) -> list[Candidate]:
    """All candidates of `text` that survive the precedence, in the order of their place.

    `before` is what was said just before (the question a bare number answers); it lends context and is not scanned.
    `regions` are ISO 3166 codes whose national phone numbers are known.
    """
    first = _DIGIT.search(text)
    if first is None:
        numeric: tuple[Detector, ...] = ()
        view = View(text, before, regions, 0, len(text))
    else:
        # Everything numeric lies around the digits; most texts have them in one place.
        last = max(text.rfind(digit) for digit in "0123456789")
        view = View(text, before, regions, max(0, first.start() - _MARGIN), min(len(text), last + 4 * _MARGIN))
        numeric = _NUMERIC if _RUN.search(text, first.start()) else _SHORT
    kept: list[Candidate] = []
    for detector in (*_TEXTUAL, *numeric, _names):
        for candidate in detector(view):
            # Kept spans are in order and apart, so only the last one that starts before the end can be in the way.
            place = bisect_left(kept, candidate.end, key=_start)
            begin = candidate.start if candidate.claim is None else candidate.claim
            if place == 0 or kept[place - 1].end <= begin:
                kept.insert(place, candidate)
    return kept


def _start(candidate: Candidate) -> int:
    return candidate.start
