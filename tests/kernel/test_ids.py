"""Ids: what they carry, and that those made quickly are those made by the book."""

from hypothesis import given
from hypothesis import strategies as st

from mcp_control.kernel.ids import IdSource, derived_id, id_millis, is_id, make_id


class At:
    """A clock that stands."""

    def __init__(self, millis: int) -> None:
        self.millis = millis

    def now(self) -> int:
        """Return the moment."""
        return self.millis

    def monotonic(self) -> float:
        """Return nothing of meaning."""
        return 0.0


def entropy_of(identifier: str) -> bytes:
    """Return the 128 bits that follow the time."""
    return (int(identifier.rpartition("_")[2], 32) >> 4 & (1 << 128) - 1).to_bytes(16)


@given(st.integers(0, 2**48 - 1), st.binary(min_size=4096, max_size=4096))
def test_a_fresh_id_is_one_that_make_id_makes_of_other_random_bytes(millis: int, random: bytes) -> None:
    """Whatever the clock and the source give, the id carries the time and 128 bits, and its unused bits are zero."""
    made = IdSource(At(millis), lambda _: random).new("task")
    assert is_id(made)
    assert id_millis(made) == millis
    assert made == make_id("task", millis, entropy_of(made))


def test_every_bit_of_a_fresh_id_is_random() -> None:
    """The source decides on all 128 bits: its zeros and its ones lead to the first and the last id of the moment."""
    lowest, highest = (IdSource(At(7), lambda count, byte=byte: byte * count).new("x") for byte in (b"\0", b"\xff"))
    assert (lowest, highest) == (make_id("x", 7, bytes(16)), make_id("x", 7, b"\xff" * 16))


@given(st.lists(st.integers(0, 2**48 - 1), min_size=2, max_size=20))
def test_ids_sort_by_the_time_they_were_made(moments: list[int]) -> None:
    """The order of ids as text is that of their times, also where the clock of one source is set back."""
    clock = At(0)
    ids = IdSource(clock)
    made: list[tuple[int, str]] = []
    for clock.millis in moments:
        made.append((clock.millis, ids.new("task")))
    assert [millis for millis, _ in sorted(made, key=lambda each: each[1])] == sorted(moments)


def test_fresh_random_bytes_are_not_given_twice() -> None:
    """Ids, bytes and secrets of one source share nothing, over many blocks of the source."""
    ids = IdSource(At(1))
    drawn = [part for _ in range(500) for part in (ids.bytes16().hex(), ids.secret()[:32], ids.secret()[32:])]
    assert len(set(drawn)) == len(drawn)
    assert {len(ids.secret()), len(ids.bytes16())} == {64, 16}


def test_a_derived_id_is_always_the_same() -> None:
    """Parent and parts name one id, at the time of the parent; other parts name another."""
    parent = make_id("run", 5, bytes(16))
    assert derived_id("task", parent, "a", 1) == derived_id("task", parent, "a", 1) != derived_id("task", parent, "a1")
    assert id_millis(derived_id("task", parent, "a")) == 5
