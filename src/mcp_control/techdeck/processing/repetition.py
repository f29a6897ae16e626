"""Repetition inside a turn: how much of it its most frequent 2-, 3- and 4-gram of words covers.

Source: Rae et al. 2021 (Gopher), table A1, "top n-gram character fraction"; limits .20, .18 and .16 there.
"""

import numpy as np
from numpy.typing import NDArray

from mcp_control.techdeck.processing.words import I64, U64, Flags, Words, ngrams

SIZES = (2, 3, 4)
LIMITS = {2: 0.20, 3: 0.18, 4: 0.16}
MIN_WORDS = 50


def repetition(words: Words, lengths: I64) -> dict[int, NDArray[np.float64]]:
    """Share (0..1) of each text's bytes that its most frequent n-gram covers, for n = 2, 3, 4; nan below 50 words.

    `lengths` are the bytes of the texts. An n-gram that occurs once repeats nothing and counts 0; of equally frequent
    ones the longest counts.
    """
    assessed = np.diff(words.first) >= MIN_WORDS
    place = np.flatnonzero(assessed[words.text])
    shares: dict[int, NDArray[np.float64]] = {}
    for size in SIZES:
        share = np.where(assessed, 0.0, np.nan)
        place = place[place + size <= len(words)]
        last = place + size - 1
        place = place[words.text[last] == words.text[place]]
        # Only where an n-gram repeats can the longer one that starts there repeat: the next size looks at those alone.
        place, opens = _repeated(ngrams(words, size)[place], words.text[place], place)
        if len(place):
            last = place + size - 1
            covered = np.add.reduceat(words.start[last] + words.length[last] - words.start[place], opens)
            count = np.diff(np.append(opens, len(place)))
            text = words.text[place[opens]]
            order = np.lexsort((covered, count, text))
            top = order[np.append(np.diff(text[order]) > 0, True)]
            share[text[top]] = np.minimum(covered[top] / lengths[text[top]], 1.0)
        shares[size] = share
        place = np.sort(place)
    return shares


def _repeated(hashes: U64, text: I64, place: I64) -> tuple[I64, I64]:
    """The places whose (hash, text) occurs at least twice, grouped, and where each group opens.

    One sort of plain integers does it: the high bits hold the hash, the low bits the place, and neighbours are compared
    in full afterwards.
    """
    bits = np.uint64(max(len(hashes), 1).bit_length())
    spread = hashes ^ (text.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93))
    keys = ((spread >> bits) << bits) | np.arange(len(hashes), dtype=np.uint64)
    keys.sort()
    order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    spread, grouped_text = hashes[order], text[order]
    same: Flags = (spread[1:] == spread[:-1]) & (grouped_text[1:] == grouped_text[:-1])
    follows = np.concatenate((np.zeros(min(len(order), 1), dtype=np.bool_), same))
    member = follows.copy()
    member[:-1] |= follows[1:]
    kept = order[member]
    return place[kept], np.flatnonzero(~follows[member])
