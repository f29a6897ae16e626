"""Conversation formats as frames: every row of a format has the same fields with the same types.

| format | fields of the talk |
| --- | --- |
| chatml | `messages`: list of {role, content} |
| sharegpt | `conversations`: list of {from, value}; from is system, human, gpt or tool |
| alpaca | `instruction`, `input`, `output`, `system`, `history`: list of [question, answer] before the last |

Each row also has `id`, `language`, `tokens`, and `labels` and `meta` as JSON text (typed fields would differ from row
to row, which loaders refuse).
"""

import polars as pl
from msgspec import Struct

_SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
_TAIL = ("language", "tokens", "labels", "meta")
_PARAGRAPH = "\n\n"


class Converted(Struct, frozen=True, kw_only=True):
    """A partition in its format. `dropped` rows could not be said in it, `trimmed` lost a question without answer."""

    frame: pl.DataFrame
    dropped: int = 0
    trimmed: int = 0


def convert(frame: pl.DataFrame, name: str) -> Converted:
    """Processed conversations in the format `name`: chatml, sharegpt or alpaca.

    Alpaca knows questions and answers only: neighbouring messages of one role are joined by a blank line, an answer
    before any question gets an empty one, a last question without answer is cut (`trimmed`), and conversations with
    tool messages or without any answer are left out (`dropped`).
    """
    base = frame.with_columns(
        pl.col("metrics").struct.field("language").fill_null(""),
        pl.col("metrics").struct.field("tokens").fill_null(0),
        json_text("labels"),
    )
    if name == "chatml":
        return Converted(frame=base.select("id", _renamed("messages", "role", "content", "messages"), *_TAIL))
    if name == "sharegpt":
        named = base.with_columns(
            pl.col("messages").list.eval(
                pl.struct(
                    pl.element().struct.field("role").replace(_SHAREGPT_ROLES).alias("role"),
                    pl.element().struct.field("content"),
                )
            )
        )
        return Converted(frame=named.select("id", _renamed("messages", "from", "value", "conversations"), *_TAIL))
    if name == "alpaca":
        return _alpaca(base)
    raise ValueError(f"unknown export format {name!r}")


def json_text(column: str) -> pl.Expr:
    """A list column as JSON text."""
    wrapped = pl.struct(pl.col(column).alias("_")).struct.json_encode()
    return wrapped.str.slice(5).str.strip_suffix("}").alias(column)  # without the wrapping {"_":...}


def _renamed(column: str, role: str, content: str, name: str) -> pl.Expr:
    element = pl.element().struct
    return (
        pl.col(column)
        .list.eval(pl.struct(element.field("role").alias(role), element.field("content").alias(content)))
        .alias(name)
    )


def _alpaca(frame: pl.DataFrame) -> Converted:
    turns = (
        frame.select("messages")
        .with_row_index("at")
        .explode("messages", empty_as_null=False)
        .unnest("messages")
        .select("at", "role", "content")
    )
    unsayable = turns.filter(pl.col("role") == "tool").select("at").unique()
    system = (
        turns.filter(pl.col("role") == "system")
        .group_by("at", maintain_order=True)
        .agg(pl.col("content").str.join(_PARAGRAPH).alias("system"))
    )
    talk = turns.filter(pl.col("role") != "system").join(unsayable, on="at", how="anti", maintain_order="left")
    changes = (pl.col("role") != pl.col("role").shift(1)) | (pl.col("at") != pl.col("at").shift(1))
    runs = (
        talk.with_columns(changes.fill_null(value=True).cum_sum().alias("run"))
        .group_by("run", maintain_order=True)
        .agg(pl.col("at", "role").first(), pl.col("content").str.join(_PARAGRAPH))
    )
    opens = (pl.col("role") == "user") | (pl.col("at") != pl.col("at").shift(1))
    pairs = (
        runs.with_columns(opens.fill_null(value=True).cum_sum().alias("pair"))
        .group_by("pair", maintain_order=True)
        .agg(
            pl.col("at").first(),
            pl.col("content").filter(pl.col("role") == "user").first().fill_null("").alias("question"),
            pl.col("content").filter(pl.col("role") == "assistant").first().alias("answer"),
        )
    )
    answered = pairs.filter(pl.col("answer").is_not_null())
    rows = answered.group_by("at", maintain_order=True).agg(
        pl.col("question").last().alias("instruction"),
        pl.col("answer").last().alias("output"),
        pl.concat_list("question", "answer").head(pl.len() - 1).alias("history"),
    )
    joined = (
        frame.with_row_index("at")
        .join(rows, on="at", how="inner", maintain_order="left")
        .join(system, on="at", how="left", maintain_order="left")
    )
    open_ended = pairs.filter(pl.col("answer").is_null())["at"].unique()
    return Converted(
        frame=joined.select(
            "id",
            "instruction",
            pl.lit("").alias("input"),
            "output",
            pl.col("system").fill_null(""),
            pl.col("history").cast(pl.List(pl.List(pl.String))),
            *_TAIL,
        ),
        dropped=frame.height - joined.height,
        trimmed=int(joined["at"].is_in(open_ended.implode()).sum()),
    )
