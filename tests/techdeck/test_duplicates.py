"""Duplicates, clusters and splits over the whole data set."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.techdeck.model import DataError, Options, ProcessOptions
from mcp_control.techdeck.processing import neardup
from mcp_control.techdeck.processing.groups import SPLITS, Union, bucket_pairs, split_of
from tests.techdeck.conversations import Turns, combined, frame, processed

A = "I have not slept well since my father died in the spring"
B = "My manager shouts at me every day and nobody says a word about it"


def _talk(text: str) -> Turns:
    return [("user", text), ("assistant", "Thank you for telling me. How long has this been going on for you?")]


def _texts(seed: int, count: int, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(words)) for _ in range(count)]


def test_two_equal_rows_and_another_make_one_duplicate(tmp_path: Path) -> None:
    """Rows A, A, B: one exact duplicate, the copies in one split, the lowest row kept."""
    result = combined(processed(frame([_talk(A), _talk(A), _talk(B)]), tmp_path), tmp_path)
    table = pl.read_parquet(result.assignments)
    assert (result.rows, result.exact, result.near, result.clusters, result.leaks) == (3, 1, 0, 1, 0)
    assert table["duplicate_of"].to_list() == [None, "c0", None]
    assert table["cluster"].to_list() == [0, 0, None]
    assert table["split"][0] == table["split"][1]


def test_a_near_copy_joins_its_cluster_and_a_distant_one_does_not(tmp_path: Path) -> None:
    """One word of forty changed is near (.8 or more of the shingles); twenty changed is not."""
    (text,) = _texts(1, 1)
    words = text.split()
    near, far = [*words[:-1], "other"], [*words[:20], *(f"x{n}" for n in range(20))]
    rows = [_talk(text), _talk(" ".join(near)), _talk(" ".join(far))]
    result = combined(processed(frame(rows), tmp_path), tmp_path)
    assert (result.exact, result.near) == (0, 1)
    assert pl.read_parquet(result.assignments)["duplicate_kind"].to_list() == [None, "near", None]


def test_below_eight_words_only_exact_copies_count(tmp_path: Path) -> None:
    """Short conversations share shingles by chance."""
    rows: list[Turns] = [
        [("user", "I feel sad"), ("assistant", "Tell me more")],
        [("user", "I feel sad"), ("assistant", "tell me more!")],
        [("user", "I feel sad"), ("assistant", "Tell me more")],
    ]
    result = combined(processed(frame(rows), tmp_path), tmp_path)
    assert (result.exact, result.near) == (1, 0)


def test_a_shared_system_prompt_makes_no_duplicates(tmp_path: Path) -> None:
    """Only the talk is compared."""
    prompt = ("system", " ".join(_texts(3, 1, words=200)))
    rows = [[prompt, *_talk(text)] for text in _texts(4, 3, words=12)]
    assert combined(processed(frame(rows), tmp_path), tmp_path).near == 0


def test_rows_of_one_subject_stay_in_one_split(tmp_path: Path) -> None:
    """Thirty rows of three patients fall in at most three groups."""
    rows = [_talk(text) for text in _texts(5, 30)]
    meta: list[dict[str, object]] = [{"Patient ID": f"p{number % 3}"} for number in range(30)]
    result = combined(processed(frame(rows, meta=meta), tmp_path), tmp_path)
    split = pl.read_parquet(result.assignments)["split"].to_list()
    assert all(split[number] == split[number % 3] for number in range(30))
    assert result.leaks == 0


def test_splits_follow_the_shares_and_the_seed(tmp_path: Path) -> None:
    """About 80/10/10 over many keys; another seed gives another division."""
    keys = [str(number) for number in range(20_000)]
    found = [split_of(key, 1, [0.8, 0.1, 0.1]) for key in keys]
    assert found.count("train") / len(keys) == pytest.approx(0.8, abs=0.01)
    assert found.count("test") / len(keys) == pytest.approx(0.1, abs=0.01)
    assert found != [split_of(key, 2, [0.8, 0.1, 0.1]) for key in keys]
    assert {split_of(key, 1, [0, 0, 1]) for key in keys[:50]} == {"test"}


@pytest.mark.parametrize("split", [[0.5, 0.5], [0.0, 0.0, 0.0], [1.2, -0.1, -0.1]])
def test_impossible_shares_are_refused(tmp_path: Path, split: list[float]) -> None:
    """The code is stable."""
    options = Options(process=ProcessOptions(split=split))
    with pytest.raises(DataError) as caught:
        combined(processed(frame([_talk(A)]), tmp_path), tmp_path, options)
    assert caught.value.code == "E_SPLIT"


def test_an_empty_data_set_has_empty_assignments(tmp_path: Path) -> None:
    """No rows, no clusters, no leaks."""
    result = combined(processed(frame([]), tmp_path), tmp_path)
    assert (result.rows, result.clusters, result.leaks) == (0, 0, 0)
    assert result.kept == dict.fromkeys(SPLITS, 0)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=24),
    st.lists(st.integers(0, 24), max_size=3),
    st.randoms(use_true_random=False),
)
def test_assignments_do_not_depend_on_partitions_or_their_order(
    picked: list[int], cuts: list[int], shuffle: random.Random
) -> None:
    """Any division into partitions, in any order, gives the same bytes, no leak and the same metrics."""
    base = _texts(7, 6)
    rows = [_talk(base[index] + (" and so on" if shuffle.random() < 0.3 else "")) for index in picked]
    data = frame(rows)
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = processed(data, folder / "whole")
        divided = processed(data, folder / "divided", sorted(min(cut, len(rows)) for cut in cuts))
        metrics = pl.concat([pl.read_parquet(part.path) for part in divided])
        assert metrics.equals(pl.read_parquet(whole[0].path))
        shuffle.shuffle(divided)
        one, many = combined(whole, folder / "whole"), combined(divided, folder / "divided")
        assert one.assignments.read_bytes() == many.assignments.read_bytes()
        assert many.leaks == 0
        table = pl.read_parquet(many.assignments)
        assert table.filter(pl.col("cluster").is_not_null()).group_by("cluster").agg(
            pl.col("split").n_unique() == 1, pl.col("duplicate_of").is_null().sum() == 1
        ).select(pl.all_horizontal("split", "duplicate_of").all()).item() in (True, None)


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_a_set_is_named_by_its_lowest_member(joins: list[tuple[int, int]]) -> None:
    """Whatever the order of joins."""
    union = Union(20)
    members = {item: {item} for item in range(20)}
    for left, right in joins:
        union.join(left, right)
        merged = members[left] | members[right]
        members |= dict.fromkeys(merged, merged)
    assert union.roots() == [min(members[item]) for item in range(20)]


@given(st.integers(1, 200))
def test_a_bucket_is_compared_in_linear_time_and_stays_connected(size: int) -> None:
    """All pairs of a small bucket; in a large one every row meets the first."""
    pairs = list(bucket_pairs(range(size)))
    assert len(pairs) <= max(24 * 23 // 2, size * 9)
    assert {(0, member) for member in range(1, size)} <= set(pairs)
    assert all(left < right for left, right in pairs)


def test_no_partitions_at_all_are_an_empty_data_set(tmp_path: Path) -> None:
    """When every row was rejected, no partition is left to combine."""
    assert combined([], tmp_path).rows == 0


def test_the_byte_sketch_loses_no_similar_pair_and_drops_strangers() -> None:
    """Of 200 pairs at .8 or more all stay for the exact check; of 200 that share a third, nearly none."""
    rng = np.random.default_rng(3)
    shared, own = (
        rng.integers(1 << 63, size=(400, 80), dtype=np.uint64),
        rng.integers(1 << 63, size=(800, 80), dtype=np.uint64),
    )
    sets = [
        np.unique(np.concatenate((shared[place // 2], own[place][: 10 if place < 400 else 80]))) for place in range(800)
    ]
    bounds = np.concatenate(([0], np.cumsum([len(found) for found in sets])))
    _, sketches = neardup.sketch(np.concatenate(sets), bounds)
    kept = neardup.plausible(sketches, np.arange(0, 800, 2), np.arange(1, 800, 2))
    assert neardup.jaccard(sets[0], sets[1]) == pytest.approx(0.8)
    assert neardup.jaccard(sets[400], sets[401]) == pytest.approx(1 / 3)
    assert kept[:200].all()
    assert kept[200:].sum() <= 2
