"""The privacy tier: finds personal data in a whole conversation and puts typed placeholders in its place.

Polars regexes (`gate`) over every text say which rows are worth Python; the detectors run on those alone. Within one
conversation the same datum has the same placeholder (`[EMAIL_1]`); no map back is kept anywhere. A replaced text is
scanned again until nothing is found, because taking one span out can bring a context word next to another.
Source: design of techdeck, section 3.
"""

import re
from collections import Counter
from typing import Any

import msgspec
import orjson
import polars as pl

from mcp_control.techdeck.model import QUARANTINE_SCHEMA, canonical_json
from mcp_control.techdeck.validation.contexts import CREDENTIALS, STREET_TYPES, word_set
from mcp_control.techdeck.validation.detectors import CLASSES, Candidate, scan

_GATES = (
    r"(?i:https?://|www\.)",
    r"(?i:\bname(?:['’]s| is| was| ?:))\s+[A-ZÀ-Þ]",
    r"\b(?:Dr|Mr|Mrs|Ms|Prof)(?:\.|\b) ?[A-ZÀ-Þ]",
    CREDENTIALS,
)
_SIGNED = r"(?i:regards|wishes|love|sincerely|yours|truly|take care|thanks|thank you|cheers|best)[,.!]?\s*\n\s*[-–—~]? ?[A-ZÀ-Þ]"
_DIGIT_GATES = (
    r"\d(?:[ \u00a0().\-–/]{0,3}\d){6}",
    r"\d\.\d{1,3}\.\d{1,3}\.\d",
    r"\d[-/.]\d{1,2}[-/.]\d",
    r"(?i:[a-z]{2}\d\d ?[a-z0-9]{4} ?[a-z0-9]{4})",
    r"[0-9A-Fa-f]:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]|::[0-9A-Fa-f]",
    r"(?i:\bborn\b|\bd\.?o\.?b\b|\bbirth|\bbday)",
    rf"\d[A-Za-z]?,? (?:[A-Z0-9][A-Za-z0-9'’.-]* ){{1,5}}(?:{STREET_TYPES})\b",
    r"(?i:\bp\.? ?o\.? box \d)",
)
"""Rust regexes, one pass each: joined into one they are six times slower, since the engine then runs out of its cache."""


def gate(texts: pl.Series) -> pl.Series:
    """Say of each text whether a detector could find anything in it; never false where one would. Null is false."""
    frame = texts.alias("text").to_frame()
    flags = frame.select(
        pl.any_horizontal(
            pl.col("text").str.contains("@", literal=True),
            *(pl.col("text").str.contains(pattern) for pattern in _GATES),
        ).alias("hit"),
        pl.col("text").str.contains(r"\d").alias("digit"),
        pl.col("text").str.contains("\n", literal=True).alias("lines"),
    )
    hits = flags["hit"].fill_null(value=False)
    for where, patterns in (("digit", _DIGIT_GATES), ("lines", (_SIGNED,))):
        rest = frame.with_row_index("at").filter(flags[where] & ~hits)
        more = rest.filter(pl.any_horizontal(pl.col("text").str.contains(pattern) for pattern in patterns))["at"]
        if len(more):
            hits = hits.scatter(more, values=True)
    return hits


_META_NAME = r'(?i:name)"\s*:\s*"[A-ZÀ-Þ]'


def side_gate(frame: pl.DataFrame) -> pl.Series:
    """As `gate`, for what surrounds the messages of each conversation: id, meta, label values, message names."""
    meta = frame["meta"].str.replace_all("\\n", "\n", literal=True)
    label_values = frame["labels"].list.eval(pl.element().struct.field("value")).list.join("\n")
    names = frame["messages"].list.eval(pl.element().struct.field("name").drop_nulls()).list.join("\n")
    hits = gate(frame["id"]) | gate(meta) | gate(label_values) | gate(names)
    return (
        hits
        | meta.str.contains(_META_NAME).fill_null(value=False)
        | names.str.contains(_GATE_NAME).fill_null(value=False)
    )


PASSES = 6  # each pass takes spans out of a text; two or three are the rule
PLACEHOLDER = re.compile(rf"\[({'|'.join(CLASSES)})_(\d+)\]")
_NUMBER_ONLY = re.compile(r"^\W*\d[\d\W]{5,40}$")
_KEY_NAME = re.compile(
    r"^(?:full|first|last|real|patient|client|user|member|given|family|sur)?[_ -]?name$", re.IGNORECASE
)
_PLAIN_NAME = re.compile(r"^[A-ZÀ-Þ][a-zà-ÿ'’-]+(?: [A-ZÀ-Þ][A-Za-zà-ÿ.'’-]*){0,3}$")
_GATE_NAME = r"(?m)^[A-ZÀ-Þ][a-zà-ÿ'’-]"
_ROLE_NAMES = word_set(
    "user assistant system tool human bot ai client patient therapist counselor counsellor doctor speaker seeker supporter"
    " model agent anonymous unknown question answer interviewer interviewee person host guest"
)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the privacy tier saw in one conversation: accepted spans by class and low-score ones by class."""

    spans: dict[str, int]
    low: dict[str, int]


class Redactor:
    """Placeholders of one conversation: the same datum gets the same index for as long as the object lives."""

    def __init__(self, regions: tuple[str, ...], texts: list[str]) -> None:
        """`texts` are all texts of the conversation: indexes already used in them are not given out again."""
        self._regions = regions
        self._indexes: dict[tuple[str, str], int] = {}
        self._last: Counter[str] = Counter()
        for text in texts:
            if "[" in text:
                for kind, index in PLACEHOLDER.findall(text):
                    self._last[kind] = max(self._last[kind], int(index[:9]))
        self.spans: Counter[str] = Counter()
        self.low: Counter[str] = Counter()

    def placeholder(self, kind: str, value: str) -> str:
        key = (kind, value)
        if key not in self._indexes:
            self._last[kind] += 1
            self._indexes[key] = self._last[kind]
        return f"[{kind}_{self._indexes[key]}]"

    def text(self, text: str, before: str = "") -> str:
        """`text` with every accepted span replaced; counts are added to `spans` and `low`."""
        question = before if _NUMBER_ONLY.match(text) else ""
        for turn in range(PASSES):
            candidates = scan(text, question, self._regions)
            if turn == 0:
                self.low.update(candidate.kind for candidate in candidates if not candidate.accepted)
            accepted = [candidate for candidate in candidates if candidate.accepted]
            if not accepted:
                break
            text = self._replace(text, accepted)
        return text

    def _replace(self, text: str, accepted: list[Candidate]) -> str:
        pieces: list[str] = []
        at = 0
        for span in accepted:
            self.spans[span.kind] += 1
            pieces += (text[at : span.start], self.placeholder(span.kind, span.value))
            at = span.end
        return "".join((*pieces, text[at:]))

    def speaker(self, name: str) -> str:
        """A message's `name`: a plain personal name is one by the field's meaning, role words are not."""
        name = self.text(name)
        if _PLAIN_NAME.match(name) and not _ROLE_NAMES.intersection(name.lower().split()):
            self.spans["NAME"] += 1
            return self.placeholder("NAME", name.casefold())
        return name

    def value(self, value: Any, key: str = "") -> Any:
        """A JSON value with personal data replaced, in keys as well; the key lends its values context."""
        if isinstance(value, dict):
            pairs: dict[str, Any] = {}
            for name, inner in value.items():
                clean = self.text(name)
                while clean in pairs or (clean != name and clean in value):
                    clean += "'"
                pairs[clean] = self.value(inner, name)
            return pairs
        if isinstance(value, list):
            return [self.value(inner, key) for inner in value]
        if isinstance(value, str):
            if _KEY_NAME.match(key):
                return self.speaker(value)
            return self.text(value, key.replace("_", " "))
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 999_999:
            text = str(value)
            clean = self.text(text, key.replace("_", " "))
            return value if clean == text else clean
        return value

    def json(self, text: str) -> str:
        """JSON text by its values; text that is no JSON (a cut record) as it stands."""
        before = self.spans.total()
        try:
            clean = self.value(orjson.loads(text))
            return text if self.spans.total() == before else canonical_json(clean)
        except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):  # cut, or nested beyond reason
            return self.text(text)

    def found(self) -> Found:
        return Found(spans=dict(self.spans), low=dict(self.low))


class Redacted(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation after the privacy tier: its texts, and what was found in them before."""

    id: str
    messages: list[dict[str, str | None]]
    meta: str
    labels: list[dict[str, str]]
    found: Found


def redact_conversation(row: dict[str, Any], regions: tuple[str, ...]) -> Redacted:
    """Redact id, messages (content and name), meta and label values of one conversation.

    `row` holds these four columns, `row`, its number in the file, `flag`, which says of each message whether `gate` let
    its content through, and `side`, which says the same of all the rest; what was not let
    through is copied. An id that holds personal data gets `#row` appended, since placeholders repeat from conversation
    to conversation.
    """
    messages: list[dict[str, str | None]] = row["messages"] or []
    labels: list[dict[str, str]] = row["labels"] or []
    identity, meta, side = row["id"] or "", row["meta"] or "", row["side"]
    texts = [text for message in messages for text in (message["content"], message["name"]) if text]
    redactor = Redactor(regions, [identity, meta, *texts, *(label["value"] or "" for label in labels)])
    clean: list[dict[str, str | None]] = []
    before = ""
    for message, worth in zip(messages, row["flag"] or (), strict=True):
        content, name = message["content"] or "", message["name"]
        clean.append(
            {
                **message,
                "content": redactor.text(content, before) if worth else message["content"],
                "name": redactor.speaker(name) if name and side else name,
            }
        )
        before = content
    if side:
        clean_id = redactor.text(identity)
        identity = identity if clean_id == identity else f"{clean_id}#{row['row']}"
        meta = redactor.json(meta) if meta else meta
        labels = [
            {**label, "value": redactor.text(label["value"], label["key"] or "")} if label["value"] else label
            for label in labels
        ]
    return Redacted(id=identity, messages=clean, meta=meta, labels=labels, found=redactor.found())


def redact_text(text: str, regions: tuple[str, ...] = ("US", "GB")) -> str:
    """A single text or JSON record, for display: a report's sample, a quarantine row's `raw`."""
    return Redactor(regions, [text]).json(text)


def redact_quarantine(frame: pl.DataFrame, regions: tuple[str, ...] = ("US", "GB")) -> pl.DataFrame:
    """A frame of `QUARANTINE_SCHEMA` with `raw` redacted; row and digest still name the record."""
    raw = [None if text is None else redact_text(text, regions) for text in frame["raw"]]
    return frame.with_columns(pl.Series("raw", raw, dtype=QUARANTINE_SCHEMA["raw"]))
