"""Stage 4's global view: duplicates over all partitions, clusters of them, and splits that no cluster straddles.

The answer is a small table beside the data (`assignments.parquet`: row, duplicate_of, duplicate_kind, cluster, split);
later stages join it. Memory is bounded by the signatures' few columns: one band at a time, texts only of candidates.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from msgspec import Struct

from mcp_control.techdeck.model import DataError, Options, Progress, write_parquet
from mcp_control.techdeck.processing import neardup
from mcp_control.techdeck.processing.groups import SPLITS, Union, bucket_pairs, split_of
from mcp_control.techdeck.processing.turns import chunks, turns_of
from mcp_control.techdeck.processing.words import I64, U64, index_words

PAIR_BATCH = 20_000
"""Pairs whose texts are held at once: at most twice as many conversations."""

ASSIGNMENT_SCHEMA = pl.Schema(
    {
        "row": pl.Int64(),
        "duplicate_of": pl.String(),
        "duplicate_kind": pl.String(),
        "cluster": pl.Int64(),
        "split": pl.String(),
    }
)
"""`duplicate_of` is the id of the kept conversation (null: this one is kept), `duplicate_kind` exact or near, `cluster`
the kept conversation's row (null: no duplicates)."""


class Combined(Struct, frozen=True, kw_only=True):
    """Counts over the data set: duplicate rows (kept ones not counted), clusters of two or more rows, groups that
    lie in more than one split (must be 0), rows and kept rows per split."""

    assignments: Path
    rows: int
    exact: int
    near: int
    clusters: int
    leaks: int
    splits: dict[str, int]
    kept: dict[str, int]


def combine(parts: list[Path], signatures: list[Path], out: Path, options: Options, progress: Progress) -> Combined:
    """Compare all conversations; write `assignments.parquet`, ordered by row, to the folder `out`.

    The order and number of `parts` and `signatures` do not matter. Raises `DataError` E_SPLIT for impossible shares.
    """
    shares = options.process.split
    if len(shares) != len(SPLITS) or min(shares) < 0 or not sum(shares) > 0:
        raise DataError("E_SPLIT", "process.split must be three shares, none negative, not all 0")
    loaded = neardup.read_all(signatures, ["row", "id", "exact", "subject"])
    order = loaded["row"].arg_sort()
    rows = loaded.select(pl.all().gather(order))
    if rows["row"].n_unique() != rows.height:
        raise DataError("E_ROWS", "two conversations have the same row number")
    progress(0, rows.height, "exact copies")
    exact = rows.with_row_index("place").select(pl.col("place").first().over("exact")).to_series().to_list()
    union = Union(rows.height)
    for place, first in enumerate(exact):
        union.join(first, place)
    pairs = _candidates(signatures, order, exact)
    numbers = rows["row"].to_numpy()
    for offset in range(0, len(pairs), PAIR_BATCH):
        progress(offset, len(pairs), "near duplicates")
        _verify(parts, numbers, pairs[offset : offset + PAIR_BATCH], union)
    assignments = _assign(rows, exact, union, options)
    out.mkdir(parents=True, exist_ok=True)
    write_parquet(assignments.select(list(ASSIGNMENT_SCHEMA)), out / "assignments.parquet")
    kind = assignments["duplicate_kind"]
    kept = assignments.filter(pl.col("duplicate_of").is_null())
    return Combined(
        assignments=out / "assignments.parquet",
        rows=rows.height,
        exact=int((kind == "exact").sum()),
        near=int((kind == "near").sum()),
        clusters=assignments["cluster"].drop_nulls().n_unique(),
        leaks=leaks(assignments),
        splits={name: int((assignments["split"] == name).sum()) for name in SPLITS},
        kept={name: int((kept["split"] == name).sum()) for name in SPLITS},
    )


def leaks(assignments: pl.DataFrame) -> int:
    """Clusters, exact copies and subjects whose rows lie in more than one split (columns cluster, exact, subject)."""
    return sum(
        assignments.filter(pl.col(key).is_not_null())
        .group_by(key)
        .agg(pl.col("split").n_unique())
        .filter(pl.col("split") > 1)
        .height
        for key in ("cluster", "exact", "subject")
    )


def _candidates(signatures: list[Path], order: pl.Series, exact: list[int]) -> list[tuple[int, int]]:
    """Pairs of places (lower, higher), sorted, that share a band and look similar; of exact copies only the first takes part."""
    pairs: set[tuple[int, int]] = set()
    first = pl.Series(exact, dtype=pl.Int64) == pl.int_range(len(exact), eager=True)
    for name in neardup.BAND_NAMES:
        keys = neardup.read_all(signatures, [name])[name].gather(order)
        shared = (
            pl.DataFrame({"place": pl.int_range(len(keys), eager=True), "key": keys})
            .filter(first & keys.is_not_null())
            .filter(pl.col("key").is_duplicated())
            .group_by("key")
            .agg("place")
        )
        for members in shared["place"].to_list():
            pairs.update(bucket_pairs(members))
    if not pairs:
        return []
    ordered = sorted(pairs)
    left, right = np.array(ordered, dtype=np.int64).T
    places, compact = np.unique(np.concatenate((left, right)), return_inverse=True)
    sketches = neardup.read_all(signatures, ["sketch"])["sketch"].gather(order.gather(places)).to_list()
    kept = neardup.plausible(sketches, compact[: len(left)], compact[len(left) :])
    return [pair for pair, keep in zip(ordered, kept.tolist(), strict=True) if keep]


def _verify(parts: list[Path], numbers: I64, pairs: list[tuple[int, int]], union: Union) -> None:
    """Join the pairs whose exact Jaccard similarity reaches the threshold."""
    wanted = sorted({place for pair in pairs for place in pair})
    place_of = dict(zip(numbers[wanted].tolist(), wanted, strict=True))
    sets = dict(_shingle_sets(parts, place_of))
    for left, right in pairs:
        if union.find(left) != union.find(right) and neardup.jaccard(sets[left], sets[right]) >= neardup.THRESHOLD:
            union.join(left, right)


def _shingle_sets(parts: list[Path], place_of: dict[int, int]) -> Iterator[tuple[int, U64]]:
    """Place and sorted distinct shingles of the conversations whose row is a key of `place_of`."""
    wanted = pl.Series(list(place_of), dtype=pl.Int64)
    for part in parts:
        row = pl.col("source").struct.field("row")
        frame = pl.scan_parquet(part).select(row, "messages").filter(pl.col("row").is_in(wanted.implode())).collect()
        rows = frame["row"].to_list()
        for begin, end, chunk in chunks(turns_of(frame), frame.height):
            counted = (chunk["role"] != "system").to_numpy()
            words = index_words(chunk["content"])
            hashes, bounds = neardup.shingles(words, counted, chunk["conversation"].to_numpy() - begin, end - begin)
            for index in range(end - begin):
                yield place_of[rows[begin + index]], np.unique(hashes[bounds[index] : bounds[index + 1]])


def _assign(rows: pl.DataFrame, exact: list[int], union: Union, options: Options) -> pl.DataFrame:
    """`rows` with duplicate_of, duplicate_kind, cluster and split."""
    roots = union.roots()
    subjects = rows["subject"].to_list()
    first_of: dict[str, int] = {}
    for place, subject in enumerate(subjects):
        if subject is not None:
            union.join(first_of.setdefault(subject, place), place)
    # A group's key is the least of its members' subjects and hashes: it depends on neither the order nor the row numbers.
    keys: defaultdict[int, list[str]] = defaultdict(list)
    groups = union.roots()
    for group, subject, digest in zip(groups, subjects, rows["exact"].to_list(), strict=True):
        keys[group].append(subject or digest)
    seed, shares = options.process.seed, options.process.split
    split = {group: split_of(min(members), seed, shares) for group, members in keys.items()}
    ids, numbers = rows["id"].to_list(), rows["row"].to_list()
    size = np.bincount(roots, minlength=rows.height) if roots else np.zeros(0, dtype=np.int64)
    duplicate = [root != place for place, root in enumerate(roots)]
    return rows.with_columns(
        pl.Series(
            "duplicate_of",
            [ids[root] if is_copy else None for root, is_copy in zip(roots, duplicate, strict=True)],
            dtype=pl.String,
        ),
        pl.Series(
            "duplicate_kind",
            [
                None if not is_copy else "exact" if exact[place] != place else "near"
                for place, is_copy in enumerate(duplicate)
            ],
            dtype=pl.String,
        ),
        pl.Series("cluster", [numbers[root] if size[root] > 1 else None for root in roots], dtype=pl.Int64),
        pl.Series("split", [split[group] for group in groups], dtype=pl.String),
    )
