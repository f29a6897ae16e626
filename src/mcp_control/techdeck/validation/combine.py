"""The global view of stage 3: adds the statistics of all partitions and says what they mean.

Every statistic is an integer or a multiple of one half, so that any partitioning and any order give the same totals, and
with them the same summary. A score whose denominator is 0 is null: not assessed, never 1.
Source: design of techdeck, sections 3 and 4.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from mcp_control.techdeck.validation.lexicon import CATEGORIES, GROUPS
from mcp_control.techdeck.validation.regard import Association, Pair, associations, asymmetries, wilson

STRUCTURE_LIMIT = 0.95
ALTERNATION_LIMIT = 0.9
CONTENT_LIMIT = 0.99
LEAST_SENTENCES = 200
HIT_COST = 100
"""A category loses all of its score at one weighted hit in a hundred sentences."""
NOT_ASSESSED = ("implicit bias", "irony", "other languages", "coded words")


class GroupShare(msgspec.Struct, frozen=True, kw_only=True):
    """Conversations that mention a group, as a number and as a share of all with its Wilson 95 % interval."""

    group: str
    conversations: int
    share: float
    low: float
    high: float


class CategoryBias(msgspec.Struct, frozen=True, kw_only=True):
    """One category. A: `groups` and `balance` (entropy over the listed groups, 0..1), descriptive only. B: `pairs` and
    `associations`. C: `hits` unexcused, `weighted`, `score` = max(0, 1 - 100 * weighted / sentences) in [low, high];
    `excused` counts hits that were quoted, reported or denied."""

    category: str
    mentions: int
    groups: list[GroupShare]
    balance: float | None
    hits: int
    excused: int
    weighted: float
    sentences: int
    score: float | None
    low: float | None
    high: float | None
    pairs: list[Pair]
    associations: list[Association]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something to know: an `error` fails a hard gate, a `warn` deserves work, a `note` a look.

    `rows` is None where places in texts were counted and not rows.
    """

    code: str
    severity: Literal["error", "warn", "note"]
    metric: str
    value: float
    rows: int | None
    text: str


class ValidationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Stage 3 over all partitions; shares are 0..1 and higher is better, except `pii_rate`."""

    rows_in: int
    rows_out: int
    rejected: int
    rejected_by_code: dict[str, int]
    structure_valid: float | None
    alternation: float | None
    content_ok: float | None
    same_language: float | None
    languages: dict[str, int]
    warned: int
    warnings: dict[str, int]
    pii_rows: int
    pii_rate: float | None
    pii_by_class: dict[str, int]
    pii_rows_by_class: dict[str, int]
    pii_low: dict[str, int]
    residual_rows: int
    residual_by_class: dict[str, int]
    privacy: float | None
    sentences: int
    bias: float | None
    categories: list[CategoryBias]
    not_assessed: list[str]
    findings: list[Finding]


def add(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of statistics: numbers add, lists add by place, maps by key; keys come out sorted."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = _plus(total[key], value) if key in total else value
    return {key: add([value]) if isinstance(value, dict) else value for key, value in sorted(total.items())}


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return add((left, right))
    if isinstance(left, list):
        return [a + b for a, b in zip(left, right, strict=True)]
    return left + right


def _share(hits: float, total: float) -> float | None:
    return hits / total if total else None


def combine(stats: Iterable[dict[str, Any]]) -> ValidationSummary:
    """Sum the `stats` of every `Validated` and judge them. Rows with blank content stay out of `structure_valid`."""
    parts = list(stats)
    total = add(parts) if parts else {}
    rejected: dict[str, int] = total.get("rejected", {})
    pii, bias = total.get("pii", {}), total.get("bias", {})
    rows_in, rows_out = total.get("rows_in", 0), total.get("rows_out", 0)
    pairs = asymmetries(bias.get("regard", {}))
    linked = associations(bias.get("attributes", {}), bias.get("alone", {}))
    categories = [_category(category, bias, rows_out, pairs, linked) for category in CATEGORIES]
    scores = [category.score for category in categories if category.score is not None]
    adjacent = total.get("adjacent_pairs", 0)
    residual_rows = pii.get("residual_rows", 0)
    summary = ValidationSummary(
        rows_in=rows_in,
        rows_out=rows_out,
        rejected=sum(rejected.values()),
        rejected_by_code=rejected,
        structure_valid=_share(rows_out, rows_in - rejected.get("E_EMPTY_CONTENT", 0)),
        alternation=_share(adjacent - total.get("same_role_pairs", 0), adjacent),
        content_ok=_share(total.get("content_ok", 0), rows_out),
        same_language=_share(total.get("same_language_turns", 0), total.get("language_turns", 0)),
        languages=total.get("languages", {}),
        warned=total.get("warned", 0),
        warnings=total.get("warnings", {}),
        pii_rows=pii.get("rows", 0),
        pii_rate=_share(pii.get("rows", 0), rows_out),
        pii_by_class=pii.get("spans", {}),
        pii_rows_by_class=pii.get("rows_by_class", {}),
        pii_low=pii.get("low", {}),
        residual_rows=residual_rows,
        residual_by_class=pii.get("residual", {}),
        privacy=_share(rows_out - residual_rows, rows_out),
        sentences=bias.get("sentences", 0),
        bias=min(scores) if scores else None,
        categories=categories,
        not_assessed=list(NOT_ASSESSED),
        findings=[],
    )
    return msgspec.structs.replace(summary, findings=_findings(summary))


def _category(
    category: str, bias: dict[str, Any], rows: int, pairs: list[Pair], linked: list[Association]
) -> CategoryBias:
    sentences = bias.get("sentences", 0)
    hits = bias.get("hits", {}).get(category, {"conversations": 0, "raw": 0, "counted": 0, "weighted": 0.0})
    counts = {group: bias.get("mentions", {}).get(f"{category}:{group}", 0) for group in GROUPS[category]}
    groups = []
    for group, count in counts.items():
        interval = wilson(count, rows)
        if interval is not None:
            low, high = interval
            groups.append(GroupShare(group=group, conversations=count, share=count / rows, low=low, high=high))
    mentioned, interval = sum(counts.values()), wilson(hits["weighted"], sentences)
    entropy = -sum(count / mentioned * math.log(count / mentioned) for count in counts.values() if count)
    assessed = sentences >= LEAST_SENTENCES and interval is not None
    return CategoryBias(
        category=category,
        mentions=hits["conversations"],
        groups=groups,
        balance=entropy / math.log(len(counts)) if mentioned and len(counts) > 1 else None,
        hits=hits["counted"],
        excused=hits["raw"] - hits["counted"],
        weighted=hits["weighted"],
        sentences=sentences,
        score=_score(hits["weighted"] / sentences) if assessed else None,
        low=_score(interval[1]) if assessed and interval else None,
        high=_score(interval[0]) if assessed and interval else None,
        pairs=[pair for pair in pairs if pair.category == category],
        associations=[found for found in linked if found.category == category],
    )


def _score(rate: float) -> float:
    return max(0.0, 1 - HIT_COST * rate)


def _findings(summary: ValidationSummary) -> list[Finding]:
    """What the limits say, the gravest first; nothing quotes a text."""
    found: list[Finding] = []

    def below(
        code: str,
        severity: Literal["error", "warn"],
        metric: str,
        value: float | None,
        limit: float,
        rows: int,
        text: str,
    ) -> None:
        if value is not None and value < limit:
            found.append(Finding(code=code, severity=severity, metric=metric, value=value, rows=rows, text=text))

    invalid = summary.rejected - summary.rejected_by_code.get("E_EMPTY_CONTENT", 0)
    below(
        "V_STRUCTURE", "error", "structure_valid", summary.structure_valid, STRUCTURE_LIMIT, invalid,
        f"less than {STRUCTURE_LIMIT:.0%} of the conversations have a user and an assistant message",
    )  # fmt: skip
    below(
        "V_RESIDUAL_PII", "error", "privacy", summary.privacy, 1.0, summary.residual_rows,
        "personal data is left in the text that would be exported",
    )  # fmt: skip
    below(
        "V_ALTERNATION", "warn", "alternation", summary.alternation, ALTERNATION_LIMIT,
        summary.warnings.get("W_ALTERNATION", 0), "many neighbouring messages have the same role",
    )  # fmt: skip
    below(
        "V_CONTENT", "warn", "content_ok", summary.content_ok, CONTENT_LIMIT, summary.warnings.get("W_CONTENT", 0),
        "texts hold broken characters or leftover chat tags",
    )  # fmt: skip
    for code, text in (
        ("W_TOO_LONG", "messages are longer than validate.max_turn_chars"),
        ("W_LANGUAGE", "conversations are in a language that validate.languages does not list"),
    ):
        if rows := summary.warnings.get(code, 0):
            found.append(Finding(code=code, severity="warn", metric=code[2:].lower(), value=rows, rows=rows, text=text))
    for category in summary.categories:
        name = category.category
        if category.hits:
            text = f"{name}: statements that put a group down, {category.weighted:g} by weight"
            found.append(
                Finding(
                    code="V_DEROGATION",
                    severity="warn",
                    metric="bias",
                    value=category.weighted,
                    rows=category.hits,
                    text=text,
                )
            )
        for pair in category.pairs:
            if pair.flagged:
                text = f"{name}: assistants speak of {pair.a} and {pair.b} in a different tone ({pair.difference:+.2f})"
                rows = pair.sentences_a + pair.sentences_b
                found.append(
                    Finding(
                        code="V_REGARD", severity="note", metric="regard", value=pair.difference, rows=rows, text=text
                    )
                )
        for link in category.associations:
            text = f"{name}: {link.group} and {link.attribute!r} go together {'more' if link.z > 0 else 'less'} than others"
            found.append(
                Finding(
                    code="V_ASSOCIATION",
                    severity="note",
                    metric="log_odds",
                    value=link.log_odds,
                    rows=link.together,
                    text=text,
                )
            )
    if low := sum(summary.pii_low.values()):
        text = f"at {low:,} places look-alikes of personal data were left: crisis lines, public links, role addresses, local networks"
        found.append(Finding(code="V_LOOKALIKES", severity="note", metric="pii_low", value=low, rows=None, text=text))
    return found
