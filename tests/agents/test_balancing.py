"""Balancing: where tasks go by load, by speed, in turn, and by their key."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mcp_control.agents.balancing import BUCKETS, Average, Candidate, added, bucket_of, estimates, home_of, spread
from mcp_control.agents.model import Strategy

STRATEGY = st.sampled_from(["least_loaded", "fastest", "round_robin"])
CANDIDATES = st.lists(
    st.integers(1, 8).flatmap(
        lambda slots: st.builds(
            Candidate, st.just(slots), st.integers(0, slots), st.booleans(), st.floats(0, 10), st.booleans()
        )
    ),
    max_size=8,
)


@given(candidates=CANDIDATES, count=st.integers(0, 40), strategy=STRATEGY)
def test_every_strategy_fills_what_is_free_and_no_more(
    candidates: list[Candidate], count: int, strategy: Strategy
) -> None:
    """As many tasks as fit are placed and nobody gets more than is free; home comes before others, the slow after them."""
    chosen = spread(candidates, count, strategy)
    assert len(chosen) == min(count, sum(candidate.free for candidate in candidates))
    left = [candidate.free for candidate in candidates]
    for place in chosen:
        tiers = [0 if c.home else 2 if c.last else 1 for c in candidates]
        assert left[place] > 0
        assert tiers[place] == min(tiers[n] for n, free in enumerate(left) if free)
        left[place] -= 1


@given(candidates=CANDIDATES, count=st.integers(0, 40))
def test_fastest_never_passes_over_a_faster_one(candidates: list[Candidate], count: int) -> None:
    """Each task goes to the fastest of those of its tier that still have room."""
    left = [candidate.free for candidate in candidates]
    for place in spread(candidates, count, "fastest"):
        tier = [(c.home, not c.home and c.last) for c in candidates]
        rivals = [c.seconds for n, c in enumerate(candidates) if left[n] and tier[n] == tier[place]]
        assert candidates[place].seconds == min(rivals)
        left[place] -= 1


def test_round_robin_ignores_the_load() -> None:
    """Everybody gets one before anybody gets two."""
    candidates = [Candidate(8, 2), Candidate(8, 8), Candidate(1, 1)]
    assert spread(candidates, 3, "round_robin") == [0, 1, 2]
    assert Counter(spread(candidates, 5, "round_robin")) == {0: 2, 1: 2, 2: 1}


@given(times=st.lists(st.floats(0.001, 100), min_size=1, max_size=50))
def test_an_average_stays_within_what_it_has_seen(times: list[float]) -> None:
    """The moving average lies between the shortest and the longest time, and follows a change."""
    average: Average | None = None
    for at, seconds in enumerate(times):
        average = added(average, seconds, float(at))
    assert average is not None
    assert min(times) - 1e-9 <= average.seconds <= max(times) + 1e-9
    for at in range(40):
        average = added(average, 7.0, 1000.0 + at)
    assert abs(average.seconds - 7.0) < 0.05


@given(
    averages=st.lists(st.none() | st.builds(Average, st.floats(0.001, 100), st.floats(0, 1000)), max_size=6),
    later=st.floats(0, 100_000),
)
def test_what_is_old_counts_less(averages: list[Average | None], later: float) -> None:
    """An estimate moves from what was measured towards the best one known, and never beyond; who is not known comes first."""
    now = 1000.0
    first, then = estimates(averages, now), estimates(averages, now + later)
    best = min((average.seconds for average in averages if average is not None), default=0.0)
    for average, early, late in zip(averages, first, then, strict=True):
        if average is None:
            assert early == late == 0.0
        else:
            assert best - 1e-9 <= late <= early + 1e-9 <= average.seconds + 2e-9


@given(agents=st.sets(st.text("abcdef", min_size=1), min_size=1, max_size=8), bucket=st.integers(0, BUCKETS - 1))
def test_only_what_belonged_to_an_agent_moves_when_it_goes(agents: set[str], bucket: int) -> None:
    """A bucket belongs to one agent, whatever their order; it moves only if that very agent goes, or to one that has just come."""
    home = home_of(bucket, sorted(agents))
    assert home == home_of(bucket, sorted(agents, reverse=True))
    assert home in agents
    for gone in agents:
        after = home_of(bucket, agents - {gone})
        assert after == (home if gone != home else after)
    assert home_of(bucket, [*agents, "newcomer"]) in (home, "newcomer")


def test_keys_spread_over_agents() -> None:
    """Many keys use all buckets, and every one of four agents gets a share of them."""
    buckets = {bucket_of(f"key-{number}") for number in range(2000)}
    assert buckets == set(range(BUCKETS))
    shares = Counter(home_of(bucket, ["a", "b", "c", "d"]) for bucket in buckets)
    assert min(shares.values()) >= 6
