"""Metrics in the Prometheus text format: golden signals, the inside of the server, and invariants that must stay 0.

A label value comes from a set that is known when the server starts (routes, methods, states, names of built-in types). What users
choose, like names of tasks, agents or tenants, never becomes a label: everything else is counted under `other`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from typing_extensions import override

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "other"

INVARIANTS: Final = (
    "double_final",  # a task left a final state
    "fence_not_growing",  # a new attempt without a higher fencing token
    "stale_write_accepted",  # a report under an old lease changed something
    "orphaned_task",  # a task's holder had ended without it
    "slot_drift",  # what is counted as held by an agent was not what the leases say
    "facts_out_of_order",  # facts reached the broadcaster with a gap or backwards
    "unhandled_exception",  # an error that is no Problem reached a door
)
OUTCOMES: Final = ("completed", "failed", "cancelled", "expired", "rejected", "retried", "lost")
LIMITS: Final = ("wall_seconds", "attempts", "calls", "tokens", "money_micros")
_SHARES_SHOWN: Final = 100
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "WEBSOCKET"})
_FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LONG: Final = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0)
_LAG: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        routes: templates of all routes, e.g. `/api/v1/tasks/{id}`.
        types: task types that are known at start (those of the plugins); they name the lanes that are shown one by one.

    Attributes:
        task_waited: notes for a task's type how many seconds it waited for an agent.
        task_ran: notes for a task's type how many seconds an attempt took.
    """

    def __init__(self, routes: Iterable[str] = (), types: Iterable[str] = ()) -> None:
        self._routes = frozenset(routes)
        self._types = frozenset(types)
        self._registry = CollectorRegistry()
        self._request_children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._task_children: dict[tuple[str, str], Counter] = {}

        self._requests = self._counter("http_requests", "requests answered", ("route", "method", "status"))
        self._latency = self._histogram("http_request_seconds", "time to answer a request", _FAST, ("route", "method"))
        self._shed = self._counter("shed", "calls refused to protect accepted work", ("what",))
        self._tasks = self._counter("tasks", "attempts and tasks that ended, by outcome", ("type", "outcome"))
        self._share_tasks = self._counter(
            "share_tasks", "tasks given to agents, by share; empty is tasks without a key", ("share",)
        )
        self._shares: dict[str, Counter] = {}
        queued = _Times("mcp_control_task_queue_seconds", "time from due to assigned", _LONG, self._types)
        ran = _Times("mcp_control_task_run_seconds", "time from assigned to ended", _LONG, self._types)
        self._registry.register(queued)
        self._registry.register(ran)
        self.task_waited: Callable[[str, float], None] = queued.observe
        self.task_ran: Callable[[str, float], None] = ran.observe
        self._budgets = {
            what: self._counter(f"budgets_{what}", f"budgets of which {share} was used, by limit", ("limit",))
            for what, share in (("warned", "four fifths of a limit"), ("exhausted", "a limit"))
        }
        self._lag = self._histogram("event_loop_lag_seconds", "how late the event loop is", _LAG, ())
        self._logins = self._counter("logins", "logins, by outcome", ("outcome",))
        self._violations = self._counter("invariant_violations", "broken promises; each must stay 0", ("name",))
        for name in INVARIANTS:
            self._violations.labels(name)
        for outcome in OUTCOMES:
            self._tasks.labels(OTHER, outcome)

    # --- what happened --------------------------------------------------------------------------------------------

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an answered request. `route` is the template, never the path."""
        key = (route, method, status)
        children = self._request_children.get(key)
        if children is None:
            where = route if route in self._routes else OTHER
            how = method if method in _METHODS else OTHER
            children = (self._requests.labels(where, how, _status(status)), self._latency.labels(where, how))
            if len(self._request_children) < 10_000:
                self._request_children[key] = children
        children[0].inc()
        children[1].observe(seconds)

    def shed(self, what: str) -> None:
        """Count a refusal by overload: `submit`, `login`, `connection`, `subscription`."""
        self._shed.labels(what if what in ("submit", "login", "connection", "subscription") else OTHER).inc()

    def share_served(self, share: str) -> None:
        """Count a task that was given to an agent, by its share: the first hundred that are served by name, the others together."""
        child = self._shares.get(share)
        if child is None:
            known = len(self._shares) < _SHARES_SHOWN
            child = self._share_tasks.labels(share if known else OTHER)
            if known:
                self._shares[share] = child
        child.inc()

    def task_ended(self, type: str, outcome: str, count: int = 1) -> None:
        """Count ends of tasks or attempts, by outcome (one of `OUTCOMES`)."""
        key = (type if type in self._types else OTHER, outcome if outcome in OUTCOMES else OTHER)
        child = self._task_children.get(key)
        if child is None:
            child = self._task_children[key] = self._tasks.labels(*key)
        child.inc(count)

    def budget(self, what: str, limit: str) -> None:
        """Count a budget that was `warned` or `exhausted`, by limit (one of `LIMITS`)."""
        self._budgets[what].labels(limit if limit in LIMITS else OTHER).inc()

    def login(self, outcome: str) -> None:
        """Count a login: `accepted`, `refused` or `throttled`."""
        self._logins.labels(outcome if outcome in ("accepted", "refused", "throttled") else OTHER).inc()

    def loop_lag(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self._lag.observe(max(0.0, seconds))

    def violation(self, name: str) -> None:
        """Count a broken invariant, one of `INVARIANTS`. Raises ValueError for another name: a typing error must not hide one."""
        if name not in INVARIANTS:
            raise ValueError(f"no such invariant: {name}")
        self._violations.labels(name).inc()

    def violations(self) -> dict[str, int]:
        """Return the invariants that were broken, with how often."""
        found = {}
        for metric in self._violations.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total") and sample.value:
                    found[sample.labels["name"]] = int(sample.value)
        return found

    # --- what is -----------------------------------------------------------------------------------------------------

    def watch(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Show a figure that is read when the metrics are, e.g. `sessions`, `writer_queue`, `subscriptions`."""
        self._gauge(name, help).set_function(read)

    def watch_states(self, name: str, help: str, states: Sequence[str], read: Callable[[], dict[str, float]]) -> None:
        """Show figures by state; states that `read` leaves out are 0, those not named here are added up under `other`."""
        self._registry.register(_States(f"mcp_control_{name}", help, "state", tuple(states), read))

    def watch_lanes(self, read: Callable[[], Iterable[tuple[str, int, float]]]) -> None:
        """Show waiting tasks and the age of the oldest, per known type and for all others together.

        Args:
            read: returns (task type, waiting, seconds the oldest waits) for each lane that is not empty.
        """
        self._registry.register(_Lanes(self._types, read))

    def watch_total(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Show a counter that another part keeps, e.g. `store_commits`."""
        self._registry.register(_Total(f"mcp_control_{name}", help, read))

    def render(self) -> bytes:
        """Return the text of all metrics; its media type is `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _counter(self, name: str, help: str, labels: Sequence[str]) -> Counter:
        return Counter(f"mcp_control_{name}", help, labels, registry=self._registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"mcp_control_{name}", help, registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float], labels: Sequence[str]) -> Histogram:
        return Histogram(f"mcp_control_{name}", help, labels, buckets=buckets, registry=self._registry)


class _States(Collector):
    def __init__(
        self, name: str, help: str, label: str, states: tuple[str, ...], read: Callable[[], dict[str, float]]
    ) -> None:
        self._name, self._help, self._label, self._states, self._read = name, help, label, states, read

    @override
    def collect(self) -> Iterable[Metric]:
        found = self._read()
        family = GaugeMetricFamily(self._name, self._help, labels=[self._label])
        for state in self._states:
            family.add_metric([state], found.get(state, 0))
        rest = sum(value for state, value in found.items() if state not in self._states)
        if rest:
            family.add_metric([OTHER], rest)
        return [family]

    def describe(self) -> Iterable[Metric]:
        """Name the family without reading it, as the registry does at registration."""
        return [GaugeMetricFamily(self._name, self._help, labels=[self._label])]


class _Lanes(Collector):
    def __init__(self, types: frozenset[str], read: Callable[[], Iterable[tuple[str, int, float]]]) -> None:
        self._types, self._read = types, read

    @override
    def collect(self) -> Iterable[Metric]:
        totals: dict[str, tuple[int, float]] = dict.fromkeys([*sorted(self._types), OTHER], (0, 0.0))
        lanes = 0
        for lane, waiting, age in self._read():
            lanes += 1
            name = lane if lane in self._types else OTHER
            before, oldest = totals[name]
            totals[name] = (before + waiting, max(oldest, age))
        count, tasks, ages = self._families()
        count.add_metric([], lanes)
        for name, (waiting, oldest) in totals.items():
            tasks.add_metric([name], waiting)
            ages.add_metric([name], oldest)
        return [count, tasks, ages]

    def describe(self) -> Iterable[Metric]:
        """Name the families without reading them."""
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("mcp_control_lanes", "lanes with waiting tasks"),
            GaugeMetricFamily("mcp_control_lane_waiting", "tasks that wait for an agent", labels=["type"]),
            GaugeMetricFamily("mcp_control_lane_oldest_seconds", "how long the first of them waits", labels=["type"]),
        )


class _Times(Collector):
    """A histogram by task type that is written on the event loop alone: no locks, a tenth of the library's cost per task."""

    def __init__(self, name: str, help: str, buckets: Sequence[float], types: frozenset[str]) -> None:
        self._name, self._help, self._buckets, self._types = name, help, tuple(buckets), types
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, type: str, seconds: float) -> None:
        """Note a duration."""
        label = type if type in self._types else OTHER
        counts = self._counts.get(label)
        if counts is None:
            counts = self._counts[label] = [0] * (len(self._buckets) + 1)
            self._sums[label] = 0.0
        counts[bisect_left(self._buckets, seconds)] += 1
        if seconds > 0:
            self._sums[label] += seconds

    @override
    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=["type"])
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        for task_type, counts in self._counts.items():
            family.add_metric(
                [task_type],
                buckets=list(zip(bounds, accumulate(counts), strict=True)),
                sum_value=self._sums[task_type],
            )
        return [family]

    def describe(self) -> Iterable[Metric]:
        """Name the family without reading it."""
        return [HistogramMetricFamily(self._name, self._help, labels=["type"])]


class _Total(Collector):
    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self._name, self._help, self._read = name, help, read

    @override
    def collect(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._help, value=self._read())]

    def describe(self) -> Iterable[Metric]:
        """Name the family without reading it."""
        return [CounterMetricFamily(self._name, self._help)]


def _status(status: int) -> str:
    return str(status) if 100 <= status <= 599 else OTHER
