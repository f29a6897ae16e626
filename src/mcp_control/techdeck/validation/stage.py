"""Stage 3 for one partition: check structure, content, privacy and bias of conversations; redact; count.

Every kept conversation gets the column `validation`, a struct with these fields in this order:

====================  ============  ====================================================================================
field                 type          meaning
====================  ============  ====================================================================================
verdict               String        `ok`, or `warn` if `warnings` is not empty
warnings              List(String)  of `WARNINGS`, in that order
same_role_pairs       Int32         neighbours (system messages left out) of the same role, tool results excepted
adjacent_pairs        Int32         neighbours, system messages left out
content_ok            Boolean       no U+FFFD, control character, leftover chat tag or mis-decoded text
too_long              Int32         messages longer than `validate.max_turn_chars`
language              String        of most turns, by function words or script; null if no turn is sure
language_turns        Int32         user and assistant turns with a known language
same_language_turns   Int32         those of them in `language`
pii_spans             Int32         accepted spans of personal data found in the input
pii_classes           List(String)  their classes, in the order of `detectors.CLASSES`
pii_low               Int32         look-alikes left in place: crisis lines, public links, role addresses
residual_pii          Int32         accepted spans in the text as it is handed on
sentences             Int32         sentences of user and assistant turns
bias                  Struct        per category of `lexicon.CATEGORIES` a Struct{mention Boolean, hits Int32,
                                    weighted Float64, sentences Int32}: a group is mentioned, unexcused derogations,
                                    their weight, and the sentences that mention a group
====================  ============  ====================================================================================

Rows without a user or an assistant message (`E_NO_MESSAGES`), with a role unknown (`E_ROLE`) or a blank user or assistant
message (`E_EMPTY_CONTENT`) go to quarantine, redacted.
Source: design of techdeck, sections 3 and 4.
"""

from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mcp_control.techdeck.model import (
    CONVERSATION_SCHEMA,
    Options,
    Progress,
    canonical_json,
    quarantine_frame,
    reject,
    write_parquet,
)
from mcp_control.techdeck.validation.bias import BLOCKS, assess
from mcp_control.techdeck.validation.lexicon import CATEGORIES
from mcp_control.techdeck.validation.privacy import redact_text
from mcp_control.techdeck.validation.screen import Screened, screen
from mcp_control.techdeck.validation.structure import by_conversation, check_turns

WARNINGS = ("W_ALTERNATION", "W_CONTENT", "W_TOO_LONG", "W_LANGUAGE", "W_RESIDUAL_PII", "W_DEROGATION")
_REASONS = {
    "E_ROLE": "a message's role is unknown",
    "E_NO_MESSAGES": "no user or no assistant message",
    "E_EMPTY_CONTENT": "a user or assistant message is blank",
}


class Validated(msgspec.Struct, frozen=True, kw_only=True):
    """Result of stage 3 for one partition. `stats` are plain sums; `combine` adds them up over all partitions."""

    conversations: Path | None
    quarantine: Path | None
    rows_in: int
    rows_out: int
    rejected: int
    rejected_by_code: dict[str, int] = {}
    stats: dict[str, Any] = {}


def validate(part: Path, out: Path, options: Options, progress: Progress) -> Validated:
    """Check the conversations of `part`; write `conversations.parquet` and `quarantine.parquet` to the folder `out`.

    A file without rows is not written, its path is None.
    """
    settings = options.validate
    regions = tuple(settings.phone_regions)
    frame = pl.read_parquet(part).select(CONVERSATION_SCHEMA.names()).with_row_index("at")
    rows = frame.height
    progress(0, rows, "structure")
    checked = check_turns(_turns(frame), settings.max_turn_chars)
    sums = by_conversation(checked, rows)
    frame = frame.hstack(sums.drop("at").with_columns(_code()))
    rejects = frame.filter(pl.col("code").is_not_null())
    kept = frame.filter(pl.col("code").is_null()).drop("at").with_row_index("at")
    del checked, frame
    progress(rejects.height, rows, "privacy")
    screened = screen(kept, regions, redact=settings.redact)
    kept = screened.frame
    progress(rows // 2, rows, "bias")
    bias = assess(_turns(kept), kept.height)
    judged = _judge(kept, bias.frame, settings.languages)
    out.mkdir(parents=True, exist_ok=True)
    conversations, quarantine = out / "conversations.parquet", out / "quarantine.parquet"
    if judged.height:
        write_parquet(judged.select(*CONVERSATION_SCHEMA.names(), "validation"), conversations)
    if rejects.height:
        write_parquet(_quarantine(rejects, regions), quarantine)
    by_code = dict(sorted(Counter(rejects["code"]).items()))
    progress(rows, rows, "validated")
    return Validated(
        conversations=conversations if judged.height else None,
        quarantine=quarantine if rejects.height else None,
        rows_in=rows,
        rows_out=judged.height,
        rejected=rejects.height,
        rejected_by_code=by_code,
        stats=_stats(rows, by_code, judged, screened) | {"bias": bias.stats},
    )


def _turns(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per message: `at`, `block` and the fields of the message."""
    block = (pl.col("source").struct.field("row").fill_null(0) % BLOCKS).alias("block")
    return frame.select("at", block, "messages").explode("messages", empty_as_null=False).unnest("messages")


def _code() -> pl.Expr:
    return (
        pl.when(pl.col("unknown_roles") > 0)
        .then(pl.lit("E_ROLE"))
        .when((pl.col("users") == 0) | (pl.col("assistants") == 0))
        .then(pl.lit("E_NO_MESSAGES"))
        .when(pl.col("blanks") > 0)
        .then(pl.lit("E_EMPTY_CONTENT"))
        .alias("code")
    )


def _judge(kept: pl.DataFrame, bias: pl.DataFrame, languages: list[str]) -> pl.DataFrame:
    """Add the `validation` struct."""
    derogated = pl.any_horizontal(pl.col(category).struct.field("hits") > 0 for category in CATEGORIES)
    conditions = (
        pl.col("same_role_pairs") > 0,
        ~pl.col("content_ok"),
        pl.col("too_long") > 0,
        (~pl.col("language").is_in(languages)).fill_null(value=False) if languages else pl.lit(value=False),
        pl.col("residual_pii") > 0,
        derogated,
    )
    warnings = pl.concat_list(
        pl.when(condition).then(pl.lit(code)) for code, condition in zip(WARNINGS, conditions, strict=True)
    ).list.drop_nulls()
    return (
        kept.hstack(bias)
        .with_columns(warnings.alias("warnings"))
        .with_columns(
            pl.struct(
                pl.when(pl.col("warnings").list.len() > 0)
                .then(pl.lit("warn"))
                .otherwise(pl.lit("ok"))
                .alias("verdict"),
                "warnings",
                "same_role_pairs",
                "adjacent_pairs",
                "content_ok",
                "too_long",
                "language",
                "language_turns",
                "same_language_turns",
                "pii_spans",
                "pii_classes",
                "pii_low",
                "residual_pii",
                "sentences",
                pl.struct(CATEGORIES).alias("bias"),
            ).alias("validation")
        )
    )


def _quarantine(rejects: pl.DataFrame, regions: tuple[str, ...]) -> pl.DataFrame:
    """The rejected rows, with the digest of the record as it was and its redacted head."""
    sources = rejects["source"].struct
    items = []
    for record, row, offset, code in zip(
        rejects.select("id", "messages", "meta", "labels").iter_rows(named=True),
        sources.field("row"),
        sources.field("byte_offset"),
        rejects["code"],
        strict=True,
    ):
        raw = canonical_json(record)
        digest = sha256(raw.encode()).hexdigest()
        items.append(
            reject(row, offset, code, f"row {row}: {_REASONS[code]}", redact_text(raw, regions).encode(), digest)
        )
    return quarantine_frame("", "validation", items).with_columns(sources.field("file").alias("file"))


def _stats(rows: int, by_code: dict[str, int], judged: pl.DataFrame, screened: Screened) -> dict[str, Any]:
    def total(column: str) -> int:
        return int(judged[column].sum())

    languages = judged["language"].drop_nulls().value_counts().sort("language")
    warnings = judged["warnings"].explode().drop_nulls().value_counts().sort("warnings")
    return {
        "rows_in": rows,
        "rows_out": judged.height,
        "rejected": by_code,
        "same_role_pairs": total("same_role_pairs"),
        "adjacent_pairs": total("adjacent_pairs"),
        "content_ok": total("content_ok"),
        "too_long": total("too_long"),
        "warned": int((judged["warnings"].list.len() > 0).sum()),
        "warnings": dict(warnings.iter_rows()),
        "languages": dict(languages.iter_rows()),
        "language_turns": total("language_turns"),
        "same_language_turns": total("same_language_turns"),
        "pii": {
            "rows": int((judged["pii_spans"] > 0).sum()),
            "spans": dict(sorted(screened.spans.items())),
            "rows_by_class": dict(sorted(screened.rows_by_class.items())),
            "low": dict(sorted(screened.low.items())),
            "residual_rows": int((judged["residual_pii"] > 0).sum()),
            "residual": dict(sorted(screened.residual.items())),
        },
    }
