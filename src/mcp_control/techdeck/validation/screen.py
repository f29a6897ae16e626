"""The privacy tier over a frame of conversations: gate in polars, detectors on the rows it lets through, re-scan."""

from collections import Counter

import msgspec
import polars as pl

from mcp_control.techdeck.model import CONVERSATION_SCHEMA
from mcp_control.techdeck.validation.detectors import CLASSES
from mcp_control.techdeck.validation.privacy import Redacted, gate, redact_conversation, side_gate

_TEXT_COLUMNS = ("id", "messages", "meta", "labels")


class Screened(msgspec.Struct, frozen=True, kw_only=True):
    """`frame` with texts redacted (if asked) and the columns `pii_spans`, `pii_classes`, `pii_low`, `residual_pii`.

    Counters: accepted spans by class, rows with such a span by class, look-alikes by class, spans left by class.
    """

    frame: pl.DataFrame
    spans: Counter[str]
    rows_by_class: Counter[str]
    low: Counter[str]
    residual: Counter[str]


def screen(frame: pl.DataFrame, regions: tuple[str, ...], *, redact: bool) -> Screened:
    """Look for personal data in every conversation of `frame` (canonical columns and `at`, its row index).

    With `redact` the changed conversations are scanned again as they are handed on; what that finds is the residual.
    Without it everything found is residual.
    """
    found = _scan(frame, regions)
    changed = [(at, result) for at, result in found if result.found.spans]
    texts = _frame_of(changed)
    residual = _scan(texts, regions) if redact else changed
    left = {at: sum(result.found.spans.values()) for at, result in residual}
    spans, rows_by_class, low, residual_spans = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for _, result in found:
        spans.update(result.found.spans)
        rows_by_class.update(result.found.spans.keys())
        low.update(result.found.low)
    for _, result in residual:
        residual_spans.update(result.found.spans)
    counts = pl.DataFrame(
        {
            "at": [at for at, _ in found],
            "pii_spans": [sum(result.found.spans.values()) for _, result in found],
            "pii_classes": [[kind for kind in CLASSES if kind in result.found.spans] for _, result in found],
            "pii_low": [sum(result.found.low.values()) for _, result in found],
            "residual_pii": [left.get(at, 0) for at, _ in found],
        },
        schema={
            "at": pl.UInt32,
            "pii_spans": pl.Int32,
            "pii_classes": pl.List(pl.String),
            "pii_low": pl.Int32,
            "residual_pii": pl.Int32,
        },
    )
    if redact and texts.height:
        frame = _replaced(frame, texts)
    frame = frame.join(counts, on="at", how="left", maintain_order="left").with_columns(
        pl.col("pii_spans", "pii_low", "residual_pii").fill_null(0),
        pl.col("pii_classes").fill_null(pl.lit([], dtype=pl.List(pl.String))),
    )
    return Screened(frame=frame, spans=spans, rows_by_class=rows_by_class, low=low, residual=residual_spans)


def _scan(frame: pl.DataFrame, regions: tuple[str, ...]) -> list[tuple[int, Redacted]]:
    """Redact the conversations that the gates let through; `at` and the outcome of each, in order."""
    if not frame.height:
        return []
    contents = frame.select(
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("place"),
        pl.col("messages").list.eval(pl.element().struct.field("content")).alias("content"),
    ).explode("content", empty_as_null=False)
    flags = contents.select("place", gate(contents["content"]).alias("flag"))
    wanted = flags.group_by("place", maintain_order=True).agg(pl.col("flag"), pl.col("flag").any().alias("any"))
    worth = (
        frame.select("at", pl.col("source").struct.field("row"), *_TEXT_COLUMNS)
        .with_columns(side_gate(frame).alias("side"))
        .with_row_index("place")
        .join(wanted, on="place", how="left", maintain_order="left")
        .filter(pl.col("side") | pl.col("any"))
    )
    return [(row["at"], redact_conversation(row, regions)) for row in worth.iter_rows(named=True)]


def _frame_of(results: list[tuple[int, Redacted]]) -> pl.DataFrame:
    """The texts of redacted conversations, with an empty `source`."""
    order = pl.DataFrame({"at": [at for at, _ in results]}, schema={"at": pl.UInt32})
    plain = order.with_columns(
        pl.Series("id", [result.id for _, result in results], dtype=pl.String),
        pl.Series("meta", [result.meta for _, result in results], dtype=pl.String),
        pl.lit(None, dtype=CONVERSATION_SCHEMA["source"]).alias("source"),
    )
    for name, fields in (("messages", ("role", "content", "name", "ts")), ("labels", ("key", "value"))):
        plain = plain.join(_lists(results, name, fields), on="at", how="left", maintain_order="left").with_columns(
            pl.col(name).fill_null(pl.lit([], dtype=CONVERSATION_SCHEMA[name]))
        )
    return plain


def _lists(results: list[tuple[int, Redacted]], name: str, fields: tuple[str, ...]) -> pl.DataFrame:
    """The list column `name`, built from flat columns: polars is slow at taking nested Python values apart."""
    items = [(at, item) for at, result in results for item in getattr(result, name)]
    flat = pl.DataFrame(
        {"at": [at for at, _ in items], **{field: [item[field] for _, item in items] for field in fields}},
        schema={"at": pl.UInt32, **dict.fromkeys(fields, pl.String)},
    )
    return flat.group_by("at", maintain_order=True).agg(pl.struct(*fields).alias(name))


def _replaced(frame: pl.DataFrame, texts: pl.DataFrame) -> pl.DataFrame:
    """`frame` with the columns of text taken from `texts` where `at` is the same."""
    new = texts.select(
        "at", pl.lit(value=True).alias("_new"), *(pl.col(name).alias(f"_{name}") for name in _TEXT_COLUMNS)
    )
    return (
        frame.join(new, on="at", how="left", maintain_order="left")
        .with_columns(
            pl.when(pl.col("_new").is_not_null()).then(f"_{name}").otherwise(name).alias(name) for name in _TEXT_COLUMNS
        )
        .drop("_new", *(f"_{name}" for name in _TEXT_COLUMNS))
    )
