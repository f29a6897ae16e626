"""What clients saw of a cluster, and whether it keeps the invariants I1 to I9 (reliability, section 3).

The checker looks at client-side histories only: acknowledgements, answers to reads, the event stream, and what agents wrote down of the
work they were given.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, Final, Self

import msgspec

FINAL: Final = frozenset({"completed", "failed", "cancelled", "expired", "rejected"})
_HELD_ENDS: Final = frozenset({"task.queued", "task.retrying", "task.lost", "task.released"})


class Seen(msgspec.Struct, frozen=True):
    """An event as a client saw it."""

    seq: int
    type: str
    subject: str
    run: str | None = None
    stage: str | None = None
    attempt: int = 0

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Read the JSON form of an event."""
        event = msgspec.json.decode(text)
        data = event.get("data") or {}
        return cls(
            seq=int(event["id"].removeprefix("evt_")),
            type=event["type"],
            subject=event["subject"],
            run=event.get("run"),
            stage=data.get("stage"),
            attempt=data.get("attempt", 0),
        )


class Executed(msgspec.Struct, frozen=True):
    """An agent process began to work on an attempt."""

    task_id: str
    attempt: int
    pid: int


class History(msgspec.Struct):
    """What clients saw.

    Attributes:
        acknowledged: ids that were answered for an idempotency key, in the order of the answers.
        reads: what each task looked like, in the order of the reads.
        events: in the order in which they came.
        executions: of the agents' own journals.
        stages: for the stages of runs, those that must be completed before they may begin.
    """

    acknowledged: dict[str, list[str]] = {}
    reads: dict[str, list[dict[str, Any]]] = {}
    events: list[Seen] = []
    executions: list[Executed] = []
    stages: Mapping[str, Sequence[str]] = {}

    def acked(self, key: str, task_id: str) -> None:
        """Note that a submit was acknowledged."""
        self.acknowledged.setdefault(key, []).append(task_id)

    def read(self, task: dict[str, Any]) -> None:
        """Note what a read answered."""
        self.reads.setdefault(task["id"], []).append(task)

    def journal(self, lines: Iterable[str]) -> None:
        """Note what agents wrote down: task, attempt and process id in a line each."""
        for line in lines:
            task_id, attempt, pid = line.split()
            self.executions.append(Executed(task_id, int(attempt), int(pid)))


def check(history: History) -> None:
    """Assert that a history keeps all invariants."""
    found = violations(history)
    assert not found, f"{len(found)} violations: {found[:10]}"


def violations(history: History) -> list[str]:
    """Return what is wrong with a history, each beginning with the invariant that it breaks."""
    return [
        *_acknowledged(history),
        *_ends(history),
        *_fences(history),
        *_leases(history),
        *_stream(history),
        *_parents(history),
        *_bounded(history),
    ]


def _last(history: History) -> dict[str, dict[str, Any]]:
    return {task_id: reads[-1] for task_id, reads in history.reads.items()}


def _acknowledged(history: History) -> list[str]:
    """I1: what was acknowledged exists, once."""
    found: list[str] = []
    tasks = _last(history)
    by_id: dict[str, str] = {}
    for key, ids in history.acknowledged.items():
        if len(set(ids)) > 1:
            found.append(f"I1 {key} was acknowledged as {sorted(set(ids))}")
        for task_id in set(ids):
            if by_id.setdefault(task_id, key) != key:
                found.append(f"I1 {task_id} answers for {by_id[task_id]} and {key}")
            if task_id not in tasks:
                found.append(f"I1 {task_id} ({key}) was acknowledged and is gone")
            elif tasks[task_id].get("idempotency_key") != key:
                found.append(f"I1 {task_id} has another key than {key}")
    keys: dict[str, str] = {}
    for task_id, task in tasks.items():
        key = task.get("idempotency_key")
        if key is not None and keys.setdefault(key, task_id) != task_id:
            found.append(f"I1 {key} made {keys[key]} and {task_id}")
    return found


def _ends(history: History) -> list[str]:
    """I2: a task ends once, and nothing it ended with changes."""
    found: list[str] = []
    ended: dict[str, list[str]] = defaultdict(list)
    for event in history.events:
        verb = event.type.removeprefix("task.")
        if event.type.startswith("task.") and verb in FINAL:
            ended[event.subject].append(verb)
    for task_id, verbs in ended.items():
        if len(verbs) > 1:
            found.append(f"I2 {task_id} ended {len(verbs)} times: {verbs}")
    for task_id, reads in history.reads.items():
        final = [read for read in reads if read["state"] in FINAL]
        if final and (len({read["state"] for read in final}) > 1 or reads[-1]["state"] not in FINAL):
            found.append(f"I2 {task_id} was {final[0]['state']} and then {reads[-1]['state']}")
        if len({str(read["result"]) for read in final if "result" in read}) > 1:
            found.append(f"I2 {task_id} showed two results")
        if final and ended.get(task_id, [final[-1]["state"]])[-1] != final[-1]["state"]:
            found.append(f"I2 {task_id} is {final[-1]['state']} and its event says {ended[task_id][-1]}")
        outcomes = [attempt["outcome"] for attempt in reads[-1].get("attempts", ())]
        if outcomes.count("completed") > 1:
            found.append(f"I2 {task_id} completed in {outcomes.count('completed')} attempts")
    return found


def _fence(read: Mapping[str, Any]) -> tuple[int, int]:
    generation, _, epoch = str(read["fence"]).partition(".")
    return int(generation), int(epoch)


def _fences(history: History) -> list[str]:
    """I3: fences grow, and no attempt is given out twice."""
    found: list[str] = []
    for task_id, reads in history.reads.items():
        seen = [(_fence(read), read.get("attempt", 0)) for read in reads]
        for before, after in pairwise(seen):
            if after[0] < before[0] or after[1] < before[1]:
                found.append(f"I3 {task_id} went from fence {before} back to {after}")
            elif after[1] > before[1] and after[0] == before[0]:
                found.append(f"I3 {task_id} has attempt {after[1]} under the fence of attempt {before[1]}")
    given: dict[tuple[str, int], int] = {}
    for one in history.executions:
        place = one.task_id, one.attempt
        if place in given:
            found.append(
                f"I3 attempt {one.attempt} of {one.task_id} was given out twice, to {given[place]} and {one.pid}"
            )
        given[place] = one.pid
    return found


def _leases(history: History) -> list[str]:
    """I4: the leases of a task do not overlap, by the store's order of events and by its times."""
    found: list[str] = []
    held: dict[str, int] = {}
    newest: dict[str, int] = {}
    for event in history.events:
        task_id = event.subject
        if event.type == "task.assigned":
            if task_id in held:
                found.append(f"I4 {task_id}: attempt {event.attempt} began while {held[task_id]} was under way")
            if event.attempt <= newest.get(task_id, 0):
                found.append(f"I3 {task_id}: attempt {event.attempt} began after {newest[task_id]}")
            held[task_id] = newest[task_id] = event.attempt
        elif event.type in _HELD_ENDS or event.type.removeprefix("task.") in FINAL:
            held.pop(task_id, None)
    for task_id, reads in history.reads.items():
        attempts = reads[-1].get("attempts", [])
        for before, after in pairwise(attempts):
            if datetime.fromisoformat(_moment(before["ended_at"])) > datetime.fromisoformat(
                _moment(after["assigned_at"])
            ):
                found.append(f"I4 {task_id}: attempts {before['number']} and {after['number']} overlap")
    return found


def _moment(value: object) -> str:
    """Times are RFC 3339 text, or milliseconds since the epoch."""
    if isinstance(value, str):
        return value
    assert isinstance(value, int | float)
    return datetime.fromtimestamp(value / 1000).astimezone().isoformat()


def _stream(history: History) -> list[str]:
    """I5 and I9: one event for each transition, in one order without gaps, and all of them arrive."""
    found: list[str] = []
    seqs = [event.seq for event in history.events]
    for before, after in pairwise(seqs):
        if after != before + 1:
            found.append(f"I9 event {after} came after {before}")
    events: dict[str, list[Seen]] = defaultdict(list)
    for event in history.events:
        events[event.subject].append(event)
    for task_id, task in _last(history).items():
        seen = events.get(task_id, [])
        if not seen or seen[0].type not in ("task.queued", "task.scheduled"):
            continue  # from before the stream was followed
        given = [event.attempt for event in seen if event.type == "task.assigned"]
        if given != [*range(1, task.get("attempt", 0) + 1)]:
            found.append(f"I5 {task_id} is at attempt {task.get('attempt', 0)} and its events tell of {given}")
        if task["state"] in FINAL and not any(event.type == f"task.{task['state']}" for event in seen):
            found.append(f"I5 {task_id} is {task['state']} and no event says so")
    if history.events:
        missing = [task_id for ids in history.acknowledged.values() for task_id in ids[:1] if task_id not in events]
        if missing:
            found.append(f"I9 no event tells of {len(missing)} acknowledged tasks, e.g. {missing[0]}")
    return found


def _parents(history: History) -> list[str]:
    """I6: no task of a stage is given out before the stages it needs are completed."""
    found: list[str] = []
    open_tasks: dict[tuple[str, str], int] = defaultdict(int)
    done: dict[tuple[str, str], int] = defaultdict(int)
    for event in history.events:
        if event.run is None or event.stage is None:
            continue
        place = event.run, event.stage
        if event.type == "task.assigned":
            found += [
                f"I6 {event.subject} of stage {event.stage} was given out before {parent} was completed"
                for parent in history.stages.get(event.stage, ())
                if open_tasks[event.run, parent] or not done[event.run, parent]
            ]
        elif event.type in ("task.queued", "task.scheduled") and not event.attempt:
            open_tasks[place] += 1
        elif event.type == "task.completed":
            open_tasks[place] -= 1
            done[place] += 1
    return found


def _bounded(history: History) -> list[str]:
    """I7: everything has ended."""
    tasks = _last(history)
    waiting = [task for task in tasks.values() if task["state"] not in FINAL]
    states = Counter(task["state"] for task in waiting)
    first = [
        {name: task.get(name) for name in ("id", "state", "attempt", "reason", "agent_id")} for task in waiting[:1]
    ]
    return [f"I7 {len(waiting)} tasks have not ended: {dict(states)}, e.g. {first}"] if waiting else []
