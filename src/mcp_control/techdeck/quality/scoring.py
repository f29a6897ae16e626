"""Scores, gates and recommendations from counts. Pure: numbers in, decisions out.

Every score is 0..1 and higher is better. A denominator of 0 gives None, "not assessed", never 1; parts that are not
assessed leave the overall score and the others take over their weight. Hard gates stand beside the average because an
average can hide a fatal part. Sums are exact decimal arithmetic, so a score of exactly the threshold passes.
Source: design of techdeck, section 3.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from math import log
from typing import Literal

from msgspec import Struct

from mcp_control.techdeck.model import QualityOptions

WEIGHTS = {
    "completeness": Fraction(25, 100),
    "consistency": Fraction(25, 100),
    "diversity": Fraction(20, 100),
    "bias": Fraction(15, 100),
    "duplication": Fraction(15, 100),
}
STRUCTURE_LIMIT = 0.95
ALTERNATION_LIMIT = 0.9
CONTENT_LIMIT = 0.99
BIAS_LIMIT = 0.9
READABILITY_LIMIT = 30.0
READ_REPORT = "mcpctl runs artifacts RUN --output DIR"


class Count(Struct, frozen=True, kw_only=True):
    """`hits` of `total`; its share is None where there was nothing to count."""

    hits: float = 0
    total: float = 0

    @property
    def share(self) -> float | None:
        return self.hits / self.total if self.total else None


class Facts(Struct, frozen=True, kw_only=True):
    """What was counted over the accepted rows, and the rejected ones as `rejected` of all rows read.

    `fields` counts per required field the rows that have it; `openings` counts conversations by how they open;
    `sources` rows by input file; `distinct_2` is distinct of all bigrams of the sample; `residual_pii` counts rows that
    still hold personal data in the text to be exported; `leaks` groups across splits.
    """

    rows: int
    fields: dict[str, int]
    structure_valid: float | None
    alternation: Count
    same_language: Count
    confident_roles: Count
    content_ok: Count
    distinct_2: Count
    openings: list[int]
    sources: list[int]
    bias: float | None
    exact_duplicates: int
    near_duplicates: int
    residual_pii: int
    leaks: int
    rejected: Count
    repetitive: int = 0
    hard_to_read: int = 0


class Part(Struct, frozen=True, kw_only=True):
    """One weighted part of the overall score with what it is the mean of."""

    name: str
    score: float | None
    weight: float
    rows: int
    of: dict[str, float | None]


class Gate(Struct, frozen=True, kw_only=True):
    """A hard condition. `passed` is None where the value was not assessed, which does not fail a run."""

    name: str
    value: float | None
    relation: Literal[">=", "<=", "=="]
    limit: float
    passed: bool | None


class Recommendation(Struct, frozen=True, kw_only=True):
    """What to do about a metric: its value, the rows it concerns and the command that helps, None where none does."""

    code: str
    metric: str
    value: float
    rows: int
    text: str
    command: str | None


class Assessment(Struct, frozen=True, kw_only=True):
    """The verdict: `passed` is what the gate says, whatever the gate is then used for."""

    overall: float | None
    parts: list[Part]
    gates: list[Gate]
    passed: bool
    recommendations: list[Recommendation]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the assessed values; None if there is none."""
    known = [Fraction(str(value)) for value in values if value is not None]
    return float(sum(known, Fraction(0)) / len(known)) if known else None


def overall(parts: dict[str, float | None]) -> Fraction | None:
    """Weighted mean of the assessed parts, exact on their shortest decimal form."""
    known = {name: Fraction(str(value)) for name, value in parts.items() if value is not None}
    weight = sum((WEIGHTS[name] for name in known), Fraction(0))
    return sum((WEIGHTS[name] * value for name, value in known.items()), Fraction(0)) / weight if weight else None


def evenness(counts: list[int]) -> float | None:
    """Normalised entropy H / ln k of k counted kinds: 1 when all are equally frequent, 0 when many rows are of one kind.

    None below two rows.
    """
    total = sum(counts)
    if total < 2:
        return None
    if len(counts) == 1:
        return 0.0
    return min(sum(count / total * log(total / count) for count in sorted(counts)) / log(len(counts)), 1.0)


def source_balance(counts: list[int]) -> float | None:
    """1 - the largest source's share; None with one source, where it says nothing."""
    return 1 - max(counts) / sum(counts) if len(counts) > 1 else None


def duplication(facts: Facts) -> float | None:
    """1 - duplicate rows / rows; the kept row of each cluster is no duplicate."""
    return 1 - (facts.exact_duplicates + facts.near_duplicates) / facts.rows if facts.rows else None


def score_parts(facts: Facts) -> list[Part]:
    """The five parts of the overall score."""
    consistency = {
        "structure_valid": facts.structure_valid,
        "alternation": facts.alternation.share,
        "same_language": facts.same_language.share,
        "confident_roles": facts.confident_roles.share,
    }
    diversity = {
        "distinct_2": facts.distinct_2.share,
        "openings": evenness(facts.openings),
        "sources": source_balance(facts.sources),
    }
    completeness = {name: Count(hits=hits, total=facts.rows).share for name, hits in facts.fields.items()}
    shares: dict[str, dict[str, float | None]] = {
        "completeness": completeness,
        "consistency": consistency if facts.rows else {},
        "diversity": diversity,
    }
    scores = {name: mean(of.values()) for name, of in shares.items()}
    scores |= {"bias": facts.bias, "duplication": duplication(facts)}
    return [
        Part(name=name, score=scores[name], weight=float(weight), rows=facts.rows, of=shares.get(name, {}))
        for name, weight in WEIGHTS.items()
    ]


def _gate(name: str, value: float | None, relation: Literal[">=", "<=", "=="], limit: float) -> Gate:
    checks: dict[str, Callable[[float], bool]] = {
        ">=": lambda number: number >= limit,
        "<=": lambda number: number <= limit,
        "==": lambda number: number == limit,
    }
    passed = None if value is None else checks[relation](value)
    return Gate(name=name, value=value, relation=relation, limit=limit, passed=passed)


def gate(parts: dict[str, float | None], threshold: float) -> Gate:
    """The gate on the overall score: >= on the unrounded value. A score that cannot be assessed does not pass."""
    total = overall(parts)
    return Gate(
        name="overall",
        value=None if total is None else float(total),
        relation=">=",
        limit=threshold,
        passed=total is not None and total >= Fraction(str(threshold)),
    )


def assess(facts: Facts, options: QualityOptions) -> Assessment:
    """Score `facts` and say whether the run passes."""
    parts = score_parts(facts)
    scores = {part.name: part.score for part in parts}
    gates = [
        gate(scores, options.threshold),
        _gate("structure_valid", facts.structure_valid, ">=", STRUCTURE_LIMIT),
        _gate("residual_pii", facts.residual_pii, "==", 0),
        _gate("split_leak", facts.leaks, "==", 0),
        _gate("rejected", facts.rejected.share, "<=", options.max_rejected),
    ]
    total = overall(scores)
    return Assessment(
        overall=None if total is None else float(total),
        parts=parts,
        gates=gates,
        passed=all(item.passed is not False for item in gates),
        recommendations=recommend(facts, options),
    )


def _below(value: float | None, limit: float) -> bool:
    return value is not None and value < limit


def recommend(facts: Facts, options: QualityOptions) -> list[Recommendation]:
    """Rules that fired, in a fixed order; each names the rows it concerns and what to run, if that helps."""
    copies = facts.exact_duplicates + facts.near_duplicates
    unequal = round(facts.same_language.total - facts.same_language.hits)
    unsure = round(facts.confident_roles.total - facts.confident_roles.hits)
    dirty = round(facts.content_ok.total - facts.content_ok.hits)
    rules: list[tuple[bool, str, str, float | None, int, str, str | None]] = [
        ((facts.rejected.share or 0) > options.max_rejected / 4, "R_REJECTED", "rejected", facts.rejected.share,
         round(facts.rejected.hits), "Many rows were set aside. Read the codes, then name the columns that hold the parts.",
         "mcpctl pipelines run techdeck --input FILE --set ingest.mapping.user=COLUMN --set ingest.mapping.assistant=COLUMN"),
        (_below(facts.structure_valid, STRUCTURE_LIMIT), "R_STRUCTURE", "structure_valid", facts.structure_valid,
         round((1 - (facts.structure_valid or 0)) * facts.rows), "Conversations lack a user or an assistant message.",
         "mcpctl pipelines run techdeck --input FILE --set ingest.format=FORMAT"),
        (_below(facts.alternation.share, ALTERNATION_LIMIT), "R_ALTERNATION", "alternation", facts.alternation.share,
         round(facts.alternation.total - facts.alternation.hits),
         "Roles often follow themselves; some trainers refuse that. Merge neighbouring messages of one role.",
         "mcpctl pipelines run techdeck --input FILE --set export.format=sharegpt"),
        (_below(facts.confident_roles.share, ALTERNATION_LIMIT), "R_ROLES", "confident_roles", facts.confident_roles.share,
         unsure, "Roles were guessed from the order of messages. Name the column that holds them.",
         "mcpctl pipelines run techdeck --input FILE --set ingest.mapping.role=COLUMN"),
        (_below(facts.same_language.share, CONTENT_LIMIT), "R_LANGUAGE", "same_language", facts.same_language.share, unequal,
         "The assistant answers in another language than the user's.",
         "mcpctl pipelines run techdeck --input FILE --set validate.languages=[en]"),
        (_below(facts.content_ok.share, CONTENT_LIMIT), "R_CONTENT", "content_ok", facts.content_ok.share, dirty,
         "Texts hold broken characters or leftover markup. State the encoding of the file.",
         "mcpctl pipelines run techdeck --input FILE --set ingest.encoding=ENCODING"),
        (copies * 20 > facts.rows, "R_DUPLICATES", "duplication", duplication(facts), copies,
         "Export keeps one row of each group of copies; look for the source that repeats. `worst` in report.json names copies.",
         READ_REPORT),
        (facts.residual_pii > 0, "R_PII", "residual_pii", float(facts.residual_pii), facts.residual_pii,
         "Personal data is left in the text to be exported. Turn redaction on.",
         "mcpctl pipelines run techdeck --input FILE --set validate.redact=true"),
        (_below(facts.bias, BIAS_LIMIT), "R_BIAS", "bias", facts.bias, facts.rows,
         "Derogatory statements about a group were found. `worst` in report.json names conversations, reason derogation.",
         READ_REPORT),
        (facts.repetitive * 50 > facts.rows, "R_REPETITION", "repetition", facts.repetitive / max(facts.rows, 1),
         facts.repetitive, "Turns repeat the same words; often a generator that got stuck. `worst` in report.json names "
         "conversations, reason repetitive.", READ_REPORT),
        (facts.hard_to_read * 5 > facts.rows, "R_READABILITY", "flesch", facts.hard_to_read / max(facts.rows, 1),
         facts.hard_to_read, "Many English conversations are very hard to read (Flesch reading ease below 30).",
         None),
    ]  # fmt: skip
    return [
        Recommendation(code=code, metric=metric, value=value or 0.0, rows=rows, text=text, command=command)
        for fired, code, metric, value, rows, text, command in rules
        if fired
    ]
