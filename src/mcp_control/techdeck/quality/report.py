"""The quality report: everything counted as one plain document, written as JSON and as a page.

The document holds no time, run id or path, and its floats are rounded, so the same data gives the same bytes.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from msgspec import Struct, to_builtins

from mcp_control.techdeck.model import VERSION, Options, Plan, Progress
from mcp_control.techdeck.processing.combine import Combined
from mcp_control.techdeck.processing.emotion import EMOTIONS
from mcp_control.techdeck.processing.metrics import ENCODING
from mcp_control.techdeck.quality.aggregate import HISTOGRAMS, SENTIMENT_BINS, Totals, aggregate
from mcp_control.techdeck.quality.page import render
from mcp_control.techdeck.quality.scoring import Assessment, Count, Facts, assess
from mcp_control.techdeck.validation.combine import ValidationSummary

NOT_ASSESSED = [
    "implicit bias",
    "irony",
    "other languages",
    "coded words",
    "names of persons without a context pattern",
]
_DIGITS = 6
_SCORE_DIGITS = 4


class StageCount(Struct, frozen=True, kw_only=True):
    """Rows through one stage and what it set aside."""

    name: str
    rows_in: int
    rows_out: int
    rejected: int
    rejected_by_code: dict[str, int] = {}


class Quality(Struct, frozen=True, kw_only=True):
    """Result of stage 5.

    `score` is rounded as in the report, `gate` is passed, failed, warned (failed, but the option says go on) or off.
    """

    report: Path
    page: Path
    rows: int
    score: float | None
    gate: str
    failed: list[str]

    @property
    def stops(self) -> bool:
        """Whether the run ends here, with nothing exported."""
        return self.gate == "failed"


def assess_quality(
    parts: Sequence[Path],
    signatures: Sequence[Path],
    combined: Combined,
    validation: ValidationSummary,
    stages: Sequence[StageCount],
    plan: Plan,
    out: Path,
    options: Options,
    progress: Progress,
) -> Quality:
    """Count, score and report; write `report.json` and `report.html` to the folder `out`.

    `parts` are the processed partitions, `stages` the counts of the stages before in order.
    """
    progress(0, combined.rows, "counting")
    totals = aggregate(list(parts), list(signatures), combined.assignments)
    facts = facts_of(totals, combined, validation, stages)
    assessment = assess(facts, options.quality)
    gate = options.quality.gate
    verdict = "off" if gate == "off" else "passed" if assessment.passed else "warned" if gate == "warn" else "failed"
    document = build(totals, facts, assessment, verdict, combined, validation, stages, plan, options)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")
    (out / "report.html").write_text(render(document), encoding="utf-8")
    progress(combined.rows, combined.rows, verdict)
    return Quality(
        report=out / "report.json",
        page=out / "report.html",
        rows=combined.rows,
        score=document["quality"]["score"],
        gate=verdict,
        failed=[item.name for item in assessment.gates if item.passed is False],
    )


def facts_of(totals: Totals, combined: Combined, validation: ValidationSummary, stages: Sequence[StageCount]) -> Facts:
    """The counts that scoring needs."""
    sums, rows = totals.sums, combined.rows
    read = stages[0].rows_in if stages else rows
    return Facts(
        rows=rows,
        fields={name: sums[name] for name in ("id", "user", "assistant", "source")},
        structure_valid=validation.structure_valid,
        alternation=Count(hits=sums["adjacent"] - sums["same_role"], total=sums["adjacent"]),
        same_language=Count(hits=sums["same_language_turns"], total=sums["language_turns"]),
        confident_roles=Count(hits=sums["confident"], total=rows),
        content_ok=Count(hits=sums["content_ok"], total=rows),
        distinct_2=totals.distinct_2,
        openings=totals.openings,
        sources=sorted(totals.sources.values()),
        bias=validation.bias,
        exact_duplicates=combined.exact,
        near_duplicates=combined.near,
        residual_pii=validation.residual_rows,
        leaks=combined.leaks,
        rejected=Count(hits=sum(stage.rejected for stage in stages), total=read),
        repetitive=sums["repetitive"],
        hard_to_read=sums["hard_to_read"],
    )


def build(
    totals: Totals,
    facts: Facts,
    assessment: Assessment,
    verdict: str,
    combined: Combined,
    validation: ValidationSummary,
    stages: Sequence[StageCount],
    plan: Plan,
    options: Options,
) -> dict[str, Any]:
    """The report as plain values; the page shows this document and nothing else."""
    rejected: Counter[str] = Counter()
    for stage in stages:
        rejected.update(stage.rejected_by_code)
    document = {
        "techdeck": VERSION,
        "dataset": {
            "file": plan.file,
            "sha256": plan.sha256,
            "format": plan.format,
            "subformat": plan.subformat,
            "container": plan.container,
            "compression": plan.compression,
            "encoding": plan.encoding,
            "warnings": plan.warnings,
            "formats": _ranked(totals.formats),
        },
        "options": to_builtins(options),
        "stages": to_builtins(list(stages)),
        "rejected": {"rows": round(facts.rejected.hits), "share": facts.rejected.share, "by_code": _ranked(rejected)},
        "quality": {
            "score": assessment.overall,
            "threshold": options.quality.threshold,
            "gate": verdict,
            "parts": to_builtins(assessment.parts),
            "gates": to_builtins(assessment.gates),
            "recommendations": to_builtins(assessment.recommendations),
        },
        "validation": {
            "structure_valid": facts.structure_valid,
            "alternation": facts.alternation.share,
            "content_ok": facts.content_ok.share,
            "rows_with_warnings": totals.sums["warned"],
            "findings": to_builtins(validation.findings),
        },
        "privacy": {
            "rows_with_personal_data": totals.sums["pii_rows"],
            "spans": totals.sums["pii_spans"],
            "rate": Count(hits=totals.sums["pii_rows"], total=facts.rows).share,
            "by_class": _ranked(Counter(validation.pii_by_class)),
            "residual_rows": facts.residual_pii,
            "score": validation.privacy,
            "look_alikes": _ranked(Counter(validation.pii_low)),
            "redacted": options.validate.redact,
        },
        "bias": {
            "score": validation.bias,
            "sentences": validation.sentences,
            "categories": to_builtins(validation.categories),
            "not_assessed": validation.not_assessed,
        },
        "duplicates": {
            "exact": combined.exact,
            "near": combined.near,
            "clusters": combined.clusters,
            "score": {part.name: part.score for part in assessment.parts}["duplication"],
        },
        "splits": {
            "rows": combined.splits,
            "kept": combined.kept,
            "leaks": combined.leaks,
            "seed": options.process.seed,
        },
        "size": {
            "rows": facts.rows,
            "turns": totals.sums["turns"],
            "words": totals.sums["words"],
            "tokens": totals.sums["tokens"],
            "tokenizer": ENCODING,
            "histograms": {
                name: {"from": bounds, "rows": totals.bins.get(name, [0] * len(bounds))}
                for name, bounds in HISTOGRAMS.items()
            },
        },
        "languages": _ranked(totals.languages),
        "flags": _ranked(totals.flags),
        "sentiment": {
            "roles": {
                role: {
                    "mean": totals.mean(f"sentiment_{role}"),
                    "conversations": totals.number(f"sentiment_{role}"),
                    "vader_mean": totals.mean(f"vader_{role}"),
                    "vader_sample": totals.number(f"vader_{role}"),
                    "rows": totals.bins.get(f"sentiment_{role}", [0] * len(SENTIMENT_BINS)),
                }
                for role in ("user", "assistant")
            },
            "from": SENTIMENT_BINS,
        },
        "emotion": {
            "hits_per_100_words": {name: totals.mean(name) for name in EMOTIONS},
            "coverage": totals.mean("emotion_coverage"),
        },
        "readability": {
            "flesch": totals.mean("flesch"),
            "grade": totals.mean("grade"),
            "assessed": totals.number("flesch"),
            "hard_to_read": facts.hard_to_read,
        },
        "repetition": {"rows": facts.repetitive},
        "worst": to_builtins(totals.worst),
    }
    rounded: dict[str, Any] = _rounded(document)
    return rounded


def _ranked(counted: Counter[str]) -> list[dict[str, Any]]:
    """Name and number, most frequent first; a list, because names are data and data has no place among keys."""
    return [
        {"name": name, "rows": rows} for name, rows in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    ]


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: _rounded(item, _SCORE_DIGITS if key == "score" else _DIGITS) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
