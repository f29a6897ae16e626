"""Which rows belong together, and which split each group goes to. Pure: no files."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate, combinations

SPLITS = ("train", "validation", "test")
FULL_BUCKET = 24
"""Up to this many rows in a bucket every pair is compared; in a larger one each row with the first and its neighbours."""
NEIGHBOURS = 8


class Union:
    """Disjoint sets of 0..size-1; the representative of a set is its lowest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, left: int, right: int) -> None:
        left, right = self.find(left), self.find(right)
        if left != right:
            self._parent[max(left, right)] = min(left, right)

    def roots(self) -> list[int]:
        """The representative of every member."""
        return [self.find(item) for item in range(len(self._parent))]


def bucket_pairs(members: Sequence[int]) -> Iterable[tuple[int, int]]:
    """The pairs (lower, higher) of a bucket to compare; linear in the size of a large bucket."""
    ordered = sorted(members)
    if len(ordered) <= FULL_BUCKET:
        yield from combinations(ordered, 2)
        return
    for place, member in enumerate(ordered):
        if place > NEIGHBOURS:
            yield ordered[0], member
        for neighbour in ordered[max(place - NEIGHBOURS, 0) : place]:
            yield neighbour, member


def split_of(key: str, seed: int, shares: Sequence[float]) -> str:
    """The split that `key` falls in: the first 8 bytes of BLAKE2b(seed, key) as a number in [0, 1) against `shares`.

    Shares are relative: [8, 1, 1] is [.8, .1, .1].
    """
    digest = blake2b(f"{seed}\x1f{key}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64 * sum(shares)
    limits = list(accumulate(shares))
    return SPLITS[min(bisect_right(limits, point), len(SPLITS) - 1)]
