"""Signatures by which duplicates are found without looking at all texts again.

A conversation's shingles are its lower-cased word 3-grams over all messages but the system's, so that a shared prompt
does not make conversations alike. MinHash with 128 permutations in 16 bands of 8: conversations of Jaccard similarity s
share a band with probability 1 - (1 - s**8)**16, .95 at s = .8. Below 8 words only exact copies count.
Source: Broder 1997 (MinHash); Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4 (banding).
"""

from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rensa import RMinHash

from mcp_control.techdeck.processing.words import I64, U64, Flags, Words, mix, ngrams

SHINGLE = 3
PERMUTATIONS = 128
BANDS = 16
ROWS = PERMUTATIONS // BANDS
MIN_WORDS = 8
THRESHOLD = 0.8
_MARGIN = 0.18
_BLOCK = 50_000
_SEED = 42
"""Of the permutations; fixed, so that signatures of different runs can be compared."""

BAND_NAMES = [f"band_{number:02d}" for number in range(BANDS)]

SIGNATURE_SCHEMA = pl.Schema(
    {
        "row": pl.Int64(),
        "id": pl.String(),
        "subject": pl.String(),
        "exact": pl.String(),
        "words": pl.Int64(),
        "opening": pl.UInt64(),
        "sketch": pl.Binary(),
        **dict.fromkeys(BAND_NAMES, pl.UInt64()),
    }
)
"""One row per conversation: `exact` is the hash of roles and texts, `opening` that of the user's first three words."""


def read_all(signatures: list[Path], columns: list[str]) -> pl.DataFrame:
    """Some columns of all signature files, which may be none."""
    empty = pl.DataFrame(schema={name: SIGNATURE_SCHEMA[name] for name in columns})
    return pl.concat([empty, *(pl.read_parquet(path, columns=columns) for path in signatures)])


def exact_hash(roles: list[str], contents: list[str]) -> str:
    """BLAKE2b-128 (hex) of a conversation's roles and texts: equal for exact copies only."""
    digest = blake2b(digest_size=16)
    for role, content in zip(roles, contents, strict=True):
        data = content.encode()
        digest.update(b"%s:%d:" % (role.encode(), len(data)))
        digest.update(data)
    return digest.hexdigest()


def shingles(words: Words, counted: Flags, conversation: I64, conversations: int) -> tuple[U64, I64]:
    """Shingle hashes of all conversations in order, and where each begins (`conversations` + 1 values).

    `counted` says of each text whether it takes part, `conversation` which one (ascending) it belongs to.
    """
    kept = counted[words.text]
    belongs = conversation[words.text[kept]]
    hashes = ngrams(_only(words, kept), SHINGLE)
    starts = belongs[: len(hashes)]
    whole = starts == belongs[SHINGLE - 1 :]
    bounds = np.searchsorted(starts[whole], np.arange(conversations + 1))
    return hashes[whole], bounds.astype(np.int64)


def _only(words: Words, kept: Flags) -> Words:
    return Words(
        hash=words.hash[kept],
        start=words.start[kept],
        length=words.length[kept],
        syllables=words.syllables[kept],
        text=words.text[kept],
        first=words.first,
        sentences=words.sentences,
    )


def sketch(hashes: U64, bounds: I64) -> tuple[NDArray[np.uint64], list[bytes]]:
    """`BANDS` band keys per conversation, and the low byte of each of its `PERMUTATIONS` minima."""
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, bounds.astype(np.uint64), PERMUTATIONS, _SEED)
    count = len(bounds) - 1
    flat = np.fromiter(chain.from_iterable(matrix.to_rows()), dtype=np.uint64, count=count * PERMUTATIONS)
    grouped = flat.reshape(count, BANDS, ROWS)
    keys = np.zeros((count, BANDS), dtype=np.uint64)
    for row in range(ROWS):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + grouped[:, :, row]
    low = (flat & np.uint64(0xFF)).astype(np.uint8).reshape(count, PERMUTATIONS)
    return mix(keys), [row.tobytes() for row in low]


def plausible(sketches: list[bytes], left: I64, right: I64) -> Flags:
    """Which pairs of `sketches` may reach the threshold: their estimate is at most five standard errors below it.

    Equal low bytes estimate the similarity (b-bit MinHash, Li and Koenig 2010) with a standard error of .04 at .8. It
    spares the exact comparison to pairs that share a band by chance, most of them in texts of few words.
    """
    minima = np.frombuffer(b"".join(sketches), dtype=np.uint8).reshape(-1, PERMUTATIONS)
    kept = np.zeros(len(left), dtype=np.bool_)
    for begin in range(0, len(left), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        equal = (minima[left[block]] == minima[right[block]]).mean(axis=1)
        kept[block] = (equal - 1 / 256) / (1 - 1 / 256) >= THRESHOLD - _MARGIN
    return kept


def jaccard(left: U64, right: U64) -> float:
    """Jaccard similarity of two sorted arrays without repeats; 0 where both are empty."""
    if not len(left) or not len(right):
        return 0.0
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
