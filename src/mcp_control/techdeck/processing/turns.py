"""Conversations as one row per message, and ranges of them that are small enough to index at once."""

import numpy as np
import polars as pl

CHUNK_BYTES = 512 * 1024
"""Text handled at once: small enough for the processor's caches, and what bounds the memory of the word index."""


def turns_of(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per message of `frame` in order: conversation (index in `frame`), role, content, chars, bytes."""
    return (
        frame.select(pl.col("messages"))
        .with_row_index("conversation")
        .explode("messages", empty_as_null=False)
        .unnest("messages")
        .select(pl.col("conversation").cast(pl.Int64), "role", pl.col("content").fill_null(""))
        .with_columns(
            pl.col("content").str.len_chars().cast(pl.Int64).alias("chars"),
            pl.col("content").str.len_bytes().cast(pl.Int64).alias("bytes"),
        )
    )


def chunks(turns: pl.DataFrame, conversations: int) -> list[tuple[int, int, pl.DataFrame]]:
    """Divide `turns` into (first conversation, end, their turns) of about `CHUNK_BYTES`; at least one conversation each.

    There is always at least one chunk, so that an empty frame keeps its columns.
    """
    owner = turns["conversation"].to_numpy()
    sizes = np.bincount(owner, weights=turns["bytes"].to_numpy(), minlength=conversations)
    first_turn = np.searchsorted(owner, np.arange(conversations + 1)).tolist()
    ranges: list[tuple[int, int]] = []
    begin, held = 0, 0.0
    for index, size in enumerate(sizes.tolist()):
        if held and held + size > CHUNK_BYTES:
            ranges.append((begin, index))
            begin, held = index, 0.0
        held += size
    ranges.append((begin, conversations))
    return [(first, end, turns.slice(first_turn[first], first_turn[end] - first_turn[first])) for first, end in ranges]
