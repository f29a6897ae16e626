"""When schedules fire, as rules: time zones, slots that are due, and what is remembered of the past."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mcp_control.kernel.clock import to_millis
from mcp_control.pipelines.schedule_model import Schedule, ScheduledTask, ScheduleSpec
from mcp_control.pipelines.schedules import (
    FORGOTTEN_MAX,
    Timing,
    Unusable,
    between,
    covered,
    decide,
    due,
    following,
    local,
    newest,
    remember,
    stored,
    timing,
)

NOW = to_millis(datetime(2026, 1, 1, tzinfo=UTC))
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "America/Havana")
CRONS = ("* * * * *", "30 2 * * *", "0,30 1,2,3 * * *", "*/7 2 * * *", "15 */6 * * *", "0 0 * * *", "59 23 L * *")
START = st.integers(NOW, NOW + 400 * DAY)


def spec(**fields: object) -> ScheduleSpec:
    """A schedule of a task."""
    return ScheduleSpec(name="s", task=ScheduledTask(type="work"), **fields)  # type: ignore[arg-type]  # by name


def schedule(now: int = NOW, **fields: object) -> Schedule:
    """A stored schedule, made now."""
    return Schedule(id="sched_x", version=1, spec=spec(**fields), digest="", created_at=now, anchor=now, position=now)


def when(cron: str, zone: str) -> Timing:
    """When a cron expression has slots."""
    return timing(spec(cron=cron, timezone=zone), NOW)


def shown(cron: str, zone: str, day: datetime, count: int) -> list[str]:
    """The next slots as the clock on the wall shows them, from midnight on."""
    after = to_millis(day.replace(tzinfo=ZoneInfo(zone))) - 1
    return [local(slot, zone)[5:] for slot in between(when(cron, zone), after, after + 400 * DAY, count)]


def test_a_time_that_summer_time_leaves_out_is_moved_and_not_lost() -> None:
    """02:30 does not exist on that day: it fires at 03:00, once, also when 03:00 itself is a slot."""
    day = datetime(2026, 3, 29)  # noqa: DTZ001 - the zone is added
    assert shown("30 2 * * *", "Europe/Berlin", day, 2) == ["03-29T03:00:00+02:00", "03-30T02:30:00+02:00"]
    assert shown("0 2,3 * * *", "Europe/Berlin", day, 2) == ["03-29T03:00:00+02:00", "03-30T02:00:00+02:00"]


def test_a_time_that_comes_twice_fires_once() -> None:
    """02:30 comes twice on that day: the first one counts."""
    day = datetime(2026, 10, 25)  # noqa: DTZ001 - the zone is added
    assert shown("30 2 * * *", "Europe/Berlin", day, 2) == ["10-25T02:30:00+02:00", "10-26T02:30:00+01:00"]


def test_an_hourly_schedule_goes_by_elapsed_time() -> None:
    """With `*` in the hour, each real hour has its slot, on the days of change as well."""
    for day, count in ((datetime(2026, 3, 29), 23), (datetime(2026, 10, 25), 25)):  # noqa: DTZ001 - the zone is added
        found = shown("0 * * * *", "Europe/Berlin", day, 30)
        assert sum(one.startswith(f"{day:%m-%d}") for one in found) == count


@pytest.mark.parametrize(
    ("fields", "member"),
    [
        ({"cron": "61 * * * *"}, "cron"),
        ({"cron": "@every -1s"}, "cron"),
        ({"cron": "0 0 30 2 *"}, "cron"),
        ({"cron": "0 0 31 4,6 *"}, "cron"),
        ({"cron": "* * * * * *"}, "cron"),
        ({"cron": "* " * 300}, "cron"),
        ({"cron": "\N{ARABIC-INDIC DIGIT ONE} * * * *"}, "cron"),
        ({}, "cron"),
        ({"cron": "* * * * *", "every": 5.0}, "every"),
        ({"every": -1.0}, "every"),
        ({"every": 0.0}, "every"),
        ({"every": float("1e300")}, "every"),
        ({"at": datetime(2025, 1, 1, tzinfo=UTC)}, "at"),
        ({"at": datetime(2027, 1, 1)}, "at"),  # noqa: DTZ001 - the fault
        ({"at": datetime(9999, 12, 31, tzinfo=UTC)}, "at"),
        ({"cron": "* * * * *", "timezone": "Europe/Atlantis"}, "timezone"),
        ({"cron": "* * * * *", "timezone": "../../etc/passwd"}, "timezone"),
        ({"cron": "* * * * *", "timezone": "America"}, "timezone"),
        ({"cron": "* * * * *", "timezone": ""}, "timezone"),
        ({"cron": "* * * * *", "ends_at": datetime(2025, 1, 1, tzinfo=UTC)}, "cron"),
    ],
    ids=str,
)
def test_a_time_that_never_comes_is_refused(fields: dict[str, object], member: str) -> None:
    """What is no time, no zone, or never fires is named with its member."""
    with pytest.raises(Unusable) as refused:
        timing(spec(**fields), NOW)
    assert refused.value.member == member


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CRONS), st.sampled_from(ZONES), START)
def test_slots_grow_wherever_one_begins(cron: str, zone: str, after: int) -> None:
    """Slots are later than the moment asked for and strictly growing, and beginning in the middle changes none of them."""
    at = when(cron, zone)
    found = between(at, after, after + 10 * 366 * DAY, 40)
    assert len(found) == 40
    assert all(one < other for one, other in zip([after, *found], found, strict=False))
    for place in (1, 20, 38):
        assert following(at, found[place]) == found[place + 1]
        assert following(at, found[place + 1] - 1) == found[place + 1]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CRONS), st.sampled_from(ZONES), START, st.integers(0, 40), st.integers(1, 30))
def test_the_newest_slots_are_the_last_of_all(cron: str, zone: str, after: int, hours: int, limit: int) -> None:
    """Looking back from the end finds what going through all slots finds."""
    at, until = when(cron, zone), after + hours * HOUR
    assert newest(at, after, until, limit) == between(at, after, until, 10_000)[-limit:]


@given(st.integers(1, 10**6), START, st.integers(0, 10**9), st.integers(1, 50))
def test_intervals_count_from_their_anchor(every: int, after: int, span: int, limit: int) -> None:
    """Every slot is a whole number of intervals from the anchor; the newest are found without going through all."""
    at = timing(spec(every=float(every)), NOW)
    found = newest(at, after, after + span, limit)
    assert all((slot - NOW) % (every * 1000) == 0 and after < slot <= after + span for slot in found)
    assert len(found) == min(limit, (after + span - NOW) // (every * 1000) - (after - NOW) // (every * 1000))


def played(made: Schedule, moments: list[tuple[int, bool]]) -> tuple[Schedule, list[int]]:
    """Let a schedule be looked at at these moments, busy or not; returns it and the slots it started."""
    started: list[int] = []
    for now, busy in moments:
        for _ in range(500):
            turn = decide(made, now, busy)
            if turn is None:
                break
            made = turn.after
            started += [] if turn.start is None else [turn.start]
        else:
            pytest.fail("it never ends")
    return made, started


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["allow", "skip", "queue-one", "cancel-previous"]),
    st.sampled_from(["none", "last", "all"]),
    st.lists(st.tuples(st.integers(-3 * HOUR, 6 * HOUR), st.booleans()), max_size=25),
)
def test_no_slot_starts_twice_whatever_the_clock_does(
    overlap: str, catch_up: str, steps: list[tuple[int, bool]]
) -> None:
    """The wall clock jumps forth and back: slots start once, never before their time, in growing order."""
    made, now, moments = schedule(every=600.0, overlap=overlap, catch_up=catch_up, catch_up_limit=5), NOW, []
    for step, busy in steps:
        now += step
        moments.append((now, busy))
    after, started = played(made, moments)
    assert len(started) == len(set(started))
    assert started == sorted(started)
    latest = max([now for now, _ in moments], default=NOW)
    assert all(NOW < slot <= latest for slot in started)
    assert after.position <= max(latest, NOW)


@pytest.mark.parametrize(
    ("catch_up", "late", "expected"),
    [
        ("none", 0, [10]),
        ("none", 45_000, []),
        ("last", 45_000, [10]),
        ("all", 45_000, [8, 9, 10]),
    ],
)
def test_after_downtime_the_policy_says_which_slots_fire(catch_up: str, late: int, expected: list[int]) -> None:
    """Ten slots passed: none of them but one that is due just now, the last, or the newest three; the others count as missed."""
    made = schedule(every=60.0, catch_up=catch_up, catch_up_limit=3, overlap="allow")
    after, started = played(made, [(NOW + 10 * MINUTE + late, False)])
    assert started == [NOW + place * MINUTE for place in expected]
    assert after.missed == 10 - len(expected)
    assert after.position == NOW + 10 * MINUTE


@pytest.mark.parametrize(
    ("overlap", "expected", "queued"),
    [("allow", [1, 2, 3], None), ("skip", [], None), ("queue-one", [], 1), ("cancel-previous", [], 3)],
)
def test_overlap_says_what_happens_while_earlier_work_goes_on(
    overlap: str, expected: list[int], queued: int | None
) -> None:
    """Three slots come while work goes on; what was queued starts when it has ended, and only that."""
    made, moments = schedule(every=60.0, overlap=overlap), [(NOW + place * MINUTE, True) for place in (1, 2, 3)]
    after, started = played(made, moments)
    assert started == [NOW + place * MINUTE for place in expected]
    assert after.queued == (None if queued is None else NOW + queued * MINUTE)
    _, later = played(after, [(NOW + 3 * MINUTE + 1, False)])
    assert later == ([] if queued is None else [NOW + queued * MINUTE])


def test_a_paused_schedule_has_nothing_due() -> None:
    """Nothing is decided and no moment is set while it is paused or being removed."""
    made = replace(schedule(every=60.0), queued=NOW)
    assert due(made, NOW + MINUTE) == 1
    for quiet in (replace(made, pause={"at": NOW}), replace(made, deleted=True)):
        assert due(quiet, NOW + MINUTE) is None
        assert decide(quiet, NOW + DAY, False) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 600), unique=True, max_size=80), st.integers(1, 20))
def test_fired_slots_are_remembered_in_spans(places: list[int], batch: int) -> None:
    """What was fired is covered for ever; what was not is covered only where spans had to be joined."""
    at = stored(schedule(every=60.0))
    fired = [NOW + place * MINUTE for place in sorted(places)]
    spans: list[tuple[int, int]] = []
    for begin in range(0, len(fired), batch):
        spans = remember(spans, fired[begin : begin + batch], lambda slot: following(at, slot))
    every = [NOW + place * MINUTE for place in range(1, 601)]
    assert [slot for slot in every if covered(spans, slot)] == fired


def test_the_memory_of_fired_slots_is_bounded() -> None:
    """Every second slot of a long time: the number of spans has an end, and no fired slot is forgotten."""
    at = stored(schedule(every=60.0))
    fired = [NOW + place * MINUTE for place in range(2, 2000, 2)]
    spans = remember([], fired, lambda slot: following(at, slot))
    assert len(spans) == FORGOTTEN_MAX
    assert all(covered(spans, slot) for slot in fired)


def test_slots_lie_between_beginning_and_end() -> None:
    """`starts_at` and `ends_at` are both included; an interval counts from its beginning."""
    begin = datetime(2026, 1, 2, tzinfo=UTC)
    made = schedule(every=3600.0, starts_at=begin, ends_at=begin + timedelta(hours=2))
    assert between(stored(made), NOW, NOW + 10 * DAY, 100) == [NOW + DAY + place * HOUR for place in (0, 1, 2)]
