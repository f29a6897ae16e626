"""Words, syllables and sentences of many texts at once, as numpy arrays over one UTF-8 buffer.

A word is a run of ASCII letters, digits and non-ASCII characters; an apostrophe counts inside a word ("don't"). Text is
lower-cased and typographic punctuation folded to ASCII first. A word's hash is a polynomial of its bytes modulo 2**64,
so it is the same in every process, chunk and version of the libraries below.
"""

from functools import lru_cache

import numpy as np
import polars as pl
from msgspec import Struct
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Flags = NDArray[np.bool_]

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_FOLDED = {
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2013\u2014\u2022\u00a0\u2009\u202f\u3000\uff0c\u3001\u00b7\ufffc", " "),
    **dict.fromkeys("\u2026\u3002\uff0e", "."),
    "\uff1f": "?",
    "\uff01": "!",
    "\u00bf": " ",
    "\u00a1": " ",
}
"""Punctuation outside ASCII that must not glue words together."""


def _table(characters: str) -> Flags:
    """Membership of each of the 256 byte values in `characters` (ASCII)."""
    table = np.zeros(256, dtype=np.bool_)
    table[np.frombuffer(characters.encode("ascii"), dtype=np.uint8)] = True
    return table


_WORD = _table("abcdefghijklmnopqrstuvwxyz0123456789")
_WORD[0x80:] = True
_VOWEL = _table("aeiouy")
_STOP = _table(".!?")


class Words(Struct, frozen=True, kw_only=True):
    """The words of a list of texts in order.

    `hash`, `length` (bytes), `start` (byte offset in the joined buffer), `syllables` and `text` (index of the text) have
    one value per word; `first` has one more value than there are texts: the words of text i are first[i]:first[i + 1].
    `sentences` counts per text and is at least 1 where there is a word.
    """

    hash: U64
    start: I64
    length: I64
    syllables: I64
    text: I64
    first: I64
    sentences: I64

    def __len__(self) -> int:
        return len(self.hash)


def mix(values: U64) -> U64:
    """Spread 64-bit values so that every output bit depends on every input bit (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def index_words(texts: pl.Series) -> Words:
    """Index the words of `texts` (strings, no nulls). Memory is about 60 times the bytes of the texts: pass chunks."""
    folded = texts.str.to_lowercase().str.replace_many(list(_FOLDED), list(_FOLDED.values()))
    buffer = np.frombuffer(("\n".join(folded.to_list()) + "\n").encode("utf-8", "replace"), dtype=np.uint8)
    ends_of_text = np.cumsum(folded.str.len_bytes().to_numpy().astype(np.int64) + 1)
    word = _WORD[buffer]
    quote = np.flatnonzero(buffer == 39)
    quote = quote[(quote > 0) & (quote < len(buffer) - 1)]
    word[quote[word[quote - 1] & word[quote + 1]]] = True
    edges = np.flatnonzero(np.diff(word, prepend=False))
    start, end = edges[::2], edges[1::2]
    first = np.concatenate(([0], np.searchsorted(start, ends_of_text))).astype(np.int64)
    return Words(
        hash=_hashes(buffer, start, end),
        start=start,
        length=end - start,
        syllables=_syllables(buffer, start, end),
        text=np.repeat(np.arange(len(texts), dtype=np.int64), np.diff(first)),
        first=first,
        sentences=_sentences(buffer, word, ends_of_text, np.diff(first)),
    )


@lru_cache(maxsize=4)
def _powers(base: int, bits: int) -> U64:
    """base ** 0, base ** 1, ... modulo 2**64, `2 ** bits` of them; kept, as every chunk of a run needs them."""
    powers = np.full(1 << bits, base, dtype=np.uint64)
    powers[0] = 1
    np.cumprod(powers, out=powers)
    powers.flags.writeable = False
    return powers


def _hashes(buffer: NDArray[np.uint8], start: I64, end: I64) -> U64:
    """Polynomial hash of each word: differences of one running sum, shifted back to the word's own origin."""
    bits = max(len(buffer) - 1, 1).bit_length()
    terms = _powers(_BASE, bits)[: len(buffer)] * buffer
    total = np.zeros(len(buffer) + 1, dtype=np.uint64)
    np.cumsum(terms, out=total[1:])
    return mix((total[end] - total[start]) * _powers(_INVERSE, bits)[start])


def _syllables(buffer: NDArray[np.uint8], start: I64, end: I64) -> I64:
    """Vowel groups per word, at least 1, minus one silent final e."""
    vowel = _VOWEL[buffer]
    opens = vowel.copy()
    opens[1:] &= ~vowel[:-1]
    count = np.cumsum(opens, dtype=np.int32)
    groups = (count[end - 1] - count[start] + opens[start]).astype(np.int64)
    silent = (buffer[end - 1] == ord("e")) & opens[end - 1] & (groups > 1)
    counted: I64 = np.maximum(groups - silent, 1)
    return counted


def _sentences(buffer: NDArray[np.uint8], word: Flags, ends_of_text: I64, words: I64) -> I64:
    """Runs of . ! ? that no word character follows, per text."""
    stop = _STOP[buffer]
    last = stop[:-1] & ~stop[1:] & ~word[1:]
    at = np.searchsorted(np.flatnonzero(last), ends_of_text)
    return np.where(words > 0, np.maximum(np.diff(at, prepend=0), 1), 0)


def ngrams(words: Words, size: int) -> U64:
    """Hash of the `size` words that begin at each word (whatever text they belong to); `size - 1` fewer than words."""
    count = max(len(words) - size + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        total = total * np.uint64(_BASE) + words.hash[offset : offset + count]
    return mix(total)


class WordTable:
    """Codes of known words, looked up by hash: `lookup` gives -1 for words it does not know."""

    def __init__(self, codes: dict[str, int]) -> None:
        hashes = index_words(pl.Series(list(codes), dtype=pl.String)).hash
        if len(hashes) != len(codes):
            raise ValueError("every entry must be exactly one word")
        order = np.argsort(hashes)
        self._hashes = hashes[order]
        self._codes = np.array(list(codes.values()), dtype=np.int64)[order]
        self._seen = np.zeros(1 << 16, dtype=np.bool_)
        self._seen[hashes >> np.uint64(48)] = True

    def lookup(self, hashes: U64) -> I64:
        """The code of each hash. A small table on the top 16 bits keeps the search to the few words that may match."""
        codes = np.full(len(hashes), -1, dtype=np.int64)
        maybe = np.flatnonzero(self._seen[hashes >> np.uint64(48)])
        wanted = hashes[maybe]
        place = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        hit = self._hashes[place] == wanted
        codes[maybe[hit]] = self._codes[place[hit]]
        return codes
