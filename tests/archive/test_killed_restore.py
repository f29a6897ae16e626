"""A restore that is killed in the middle: the old store or the new one, or none that a server opens; the next attempt succeeds."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.testing.server import running_server
from tests.archive.support import content, create, place_of, restored

TASKS = 500  # a page of the backup holds fewer


async def _filled(folder: Path, type: str, count: int) -> None:
    async with (
        running_server(folder) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=30) as client,
    ):
        tasks = [{"type": type, "payload": "x" * 1500} for _ in range(count)]
        answer = await client.post("/api/v1/tasks/batch", json={"tasks": tasks})
        assert answer.status_code == 200, answer.text
        await client.post("/api/v1/artifacts?name=a", content=type.encode() * 200_000)


def _killed(backup: Path, folder: Path, seen: str, later: float) -> bool:
    """Restore, and kill -9 it so many seconds after it said something; returns whether it had ended before."""
    command = [sys.executable, "-m", "tests.archive.restoring", str(backup), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == seen:
                break
        else:
            raise AssertionError(f"it never said {seen!r}: {lines}")
        try:
            process.wait(later)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.read()
        return process.wait() == 0


async def _types(folder: Path) -> set[str]:
    entities, facts = await content(place_of(folder))
    found = {str(entity.index["type"]) for (kind, _), entity in entities.items() if kind == "task"}
    assert sum(kind == "task" for kind, _ in entities) == TASKS
    queued = {fact.fact.subject for fact in facts if fact.fact.type == "task.queued"}
    assert queued == {key for kind, key in entities if kind == "task"}, "events of other tasks"
    return found


MOMENTS = [("restoring: agent", 0.0), ("restoring: task", 0.0), ("restoring: events", 0.02)]
RANDOM = random.Random(7)
MANY = [
    (seen, RANDOM.uniform(0, 0.3))
    for seen in ("begins", "restoring: user", "restoring: task", "restoring: events", "restoring: blobs")
    for _ in range(8)
]


@pytest.mark.parametrize(
    "moments",
    [MOMENTS[1:], pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
    ids=["few", "many"],
)
@pytest.mark.long_on_cluster
async def test_a_restore_that_is_killed_leaves_no_mixture(
    moments: list[tuple[str, float]], tmp_path: Path, backend: str
) -> None:
    """After each kill -9 there is the old store, or the new one, or one that every server refuses; repeating it ends well."""
    backup = tmp_path / "new.mcpbackup"
    await _filled(tmp_path / "new", "new", TASKS)
    await create(place_of(tmp_path / "new"), backup)
    target = tmp_path / "target"
    await _filled(target, "old", TASKS)
    before = await content(place_of(target))
    for seen, later in moments:
        if await asyncio.to_thread(_killed, backup, target, seen, later):
            assert await _types(target) == {"new"}
            continue
        if backend == "embedded":
            found = await _types(target)
            assert found in ({"old"}, {"new"})
            assert found == {"new"} or await content(place_of(target)) == before
        else:
            # The database was emptied first; until a restore has ended, no server opens what is there.
            refused = ""
            try:
                async with running_server(target):
                    pass
            except StoreUnavailable as refusal:
                refused = str(refusal)
            if refused:
                assert "broken off" in refused
            else:
                assert await _types(target) in ({"old"}, {"new"})
    await restored(backup, place_of(target), replace=True)
    assert await _types(target) == {"new"}
    async with (
        running_server(target) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        assert (await client.post("/api/v1/tasks", json={"type": "after"})).status_code == 201
        assert not [*target.glob("data/store-incoming*")]
