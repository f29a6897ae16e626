"""Stage 4 for one partition: metrics of every conversation, and the signatures that the combine step compares."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import polars as pl
from msgspec import Struct

from mcp_control.techdeck.model import Options, Progress, write_parquet
from mcp_control.techdeck.processing import language, neardup
from mcp_control.techdeck.processing.metrics import count_tokens, encoding, finish, measure, plainly_english, summarise
from mcp_control.techdeck.processing.turns import chunks, turns_of
from mcp_control.techdeck.processing.words import I64, U64, Flags, Words, index_words
from mcp_control.techdeck.valence import in_sample, turn_valence, vader_compound

SLICE_ROWS = 5_000
SUBJECT_KEYS = (
    "subject", "subjectid", "participantid", "patientid", "clientid", "userid", "speakerid", "questionid", "threadid",
)  # fmt: skip
"""Fields of `meta` (case, spaces, `_` and `-` ignored) that name whom or what a conversation is about; rows that share
one stay in one split."""
_SUBJECT_GATE = r"(?i)(subject|(participant|patient|client|user|speaker|question|thread)[ _-]?id)"


class Processed(Struct, frozen=True, kw_only=True):
    """Result of stage 4 for one partition: `path` holds the conversations with `metrics`, `signatures` a row each."""

    path: Path
    signatures: Path
    rows_in: int
    rows_out: int
    rejected: int = 0


def process(part: Path, out: Path, options: Options, progress: Progress, *, total_rows: int | None = None) -> Processed:
    """Measure the conversations of the Parquet file `part`; write `processed.parquet` and `signatures.parquet` to `out`.

    `total_rows` is the size of the whole data set (this partition's when None): the VADER sample is drawn from all of
    it by hash, so it does not depend on how the rows were divided. It is about `process.vader_sample` messages, the first
    of each role.
    """
    rows = pl.scan_parquet(part).select(pl.len()).collect().item()
    share = options.process.vader_sample / max(total_rows or rows, 1) / 2
    bpe = encoding()
    done: list[pl.DataFrame] = []
    signed: list[pl.DataFrame] = []
    frame = pl.read_parquet(part)
    for offset in range(0, max(rows, 1), SLICE_ROWS):
        taken = frame.slice(offset, SLICE_ROWS)
        turns = turns_of(taken)
        signatures, measured = _sign(taken, turns)
        turns = turns.hstack(measured)
        turns = turns.with_columns(
            pl.Series("tokens", count_tokens(bpe, turns["content"].to_list()), dtype=pl.Int64),
            _vader(turns, in_sample(signatures, ["exact"], share)),
            turn_valence(turns.select("content"))["valence"],
        )
        summary = _languages(summarise(turns), turns)
        done.append(taken.with_columns(finish(summary).alias("metrics")))
        signed.append(signatures)
        progress(offset + taken.height, rows, "measured")
    out.mkdir(parents=True, exist_ok=True)
    result = Processed(
        path=out / "processed.parquet", signatures=out / "signatures.parquet", rows_in=rows, rows_out=rows
    )
    write_parquet(pl.concat(done), result.path)
    write_parquet(pl.concat(signed), result.signatures)
    return result


def _sign(frame: pl.DataFrame, turns: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signatures of `frame`'s conversations, and what `measure` says of its turns."""
    signatures: list[pl.DataFrame] = []
    measured: list[pl.DataFrame] = []
    for begin, end, chunk in chunks(turns, frame.height):
        words = index_words(chunk["content"])
        measured.append(pl.DataFrame(measure(words, chunk["bytes"].to_numpy()), nan_to_null=True))
        signatures.append(_signatures(chunk, words, begin, end))
    named = frame.select(pl.col("source").struct.field("row"), "id", _subjects(frame["meta"]))
    compared = pl.col("words") >= neardup.MIN_WORDS
    signed = pl.concat(signatures).with_columns(
        pl.when("opens").then("opening").alias("opening"),
        *[pl.when(compared).then(name).alias(name) for name in ("sketch", *neardup.BAND_NAMES)],
    )
    return named.hstack(signed.drop("opens")), pl.concat(measured)


def _signatures(chunk: pl.DataFrame, words: Words, begin: int, end: int) -> pl.DataFrame:
    count = end - begin
    conversation = chunk["conversation"].to_numpy() - begin
    counted = (chunk["role"] != "system").to_numpy()
    hashes, bounds = neardup.shingles(words, counted, conversation, count)
    total = np.bincount(conversation[words.text[counted[words.text]]], minlength=count)
    roles, contents = chunk["role"].to_list(), chunk["content"].to_list()
    edges = np.searchsorted(conversation, np.arange(count + 1)).tolist()
    exact = [neardup.exact_hash(roles[first:last], contents[first:last]) for first, last in pairwise(edges)]
    keys, sketches = neardup.sketch(hashes, bounds)
    opening, opens = _openings(chunk, words, conversation, count)
    return pl.DataFrame(
        {
            "exact": pl.Series(exact, dtype=pl.String),
            "words": pl.Series(total, dtype=pl.Int64),
            "opening": opening,
            "opens": opens,
            "sketch": pl.Series(sketches, dtype=pl.Binary),
            **dict(zip(neardup.BAND_NAMES, keys.T, strict=True)),
        }
    )


def _openings(chunk: pl.DataFrame, words: Words, conversation: I64, count: int) -> tuple[U64, Flags]:
    """Hash of the first three words of each conversation's first user message, and whether it has any."""
    asked = np.flatnonzero((chunk["role"] == "user").to_numpy())
    who, at = np.unique(conversation[asked], return_index=True)
    turn = asked[at]
    length = np.diff(words.first)[turn]
    hashes = np.zeros(len(turn), dtype=np.uint64)
    for offset in range(3):
        place = np.minimum(words.first[turn] + offset, max(len(words) - 1, 0))
        word = words.hash[place] if len(words) else np.zeros(len(turn), dtype=np.uint64)
        hashes = hashes * np.uint64(31) + np.where(length > offset, word, np.uint64(0))
    opening = np.zeros(count, dtype=np.uint64)
    opening[who] = hashes
    opens = np.zeros(count, dtype=np.bool_)
    opens[who] = length > 0
    return opening, opens


def _subjects(meta: pl.Series) -> pl.Series:
    """The subject that `meta` names, as "key=value", or null. Only rows that pass the gate are parsed."""
    likely = meta.str.contains(_SUBJECT_GATE).fill_null(value=False)
    return pl.Series(
        "subject",
        [_subject(text) if hit else None for text, hit in zip(meta.to_list(), likely.to_list(), strict=True)],
        dtype=pl.String,
    )


def _subject(meta: str) -> str | None:
    fields = orjson.loads(meta)
    if not isinstance(fields, dict):
        return None
    named = {"".join(c for c in key.lower() if c not in " _-"): value for key, value in fields.items()}
    for key in SUBJECT_KEYS:
        value = named.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return f"{key}={value}"
    return None


def _vader(turns: pl.DataFrame, sampled: pl.Series) -> pl.Series:
    """VADER's compound for a sampled conversation's first message of each role, null for all others (1 ms a message)."""
    chosen = (
        turns.with_row_index("at")
        .filter(sampled.gather(turns["conversation"]) & turns["role"].is_in(["user", "assistant"]))
        .unique(["conversation", "role"], keep="first", maintain_order=True)
    )
    scores = pl.DataFrame(
        {"at": chosen["at"], "vader": pl.Series(vader_compound(chosen["content"].to_list()), dtype=pl.Float64)}
    )
    places = pl.DataFrame({"at": pl.int_range(turns.height, dtype=pl.UInt32, eager=True)})
    return places.join(scores, on="at", how="left", maintain_order="left")["vader"]


def _languages(summary: pl.DataFrame, turns: pl.DataFrame) -> pl.DataFrame:
    """Add `language`, that of the user's text."""
    english = summary.select(plainly_english().fill_null(value=False)).to_series()
    doubtful = summary["conversation"].filter(~english)
    texts = (
        turns.filter((pl.col("role") == "user") & pl.col("conversation").is_in(doubtful.implode()))
        .group_by("conversation")
        .agg(pl.col("content").str.slice(0, language.MAX_CHARS).str.join("\n"))
    )
    found = {row: language.identify(text) for row, text in zip(texts["conversation"], texts["content"], strict=True)}
    named = [
        "en" if sure else found.get(row, language.UNDETERMINED)
        for row, sure in zip(summary["conversation"].to_list(), english.to_list(), strict=True)
    ]
    return summary.with_columns(pl.Series("language", named, dtype=pl.String))
