"""Health: as bad as the worst critical part, whatever the checks do."""

import asyncio

import pytest

from mcp_control.monitoring.health import OK, Finding, Health


async def fine() -> Finding:
    return OK


async def slow() -> Finding:
    return Finding("degraded", "writes wait 3 s")


async def broken() -> Finding:
    raise RuntimeError("password=hunter2")


async def hanging() -> Finding:
    await asyncio.Event().wait()
    return OK


async def test_whole_is_as_bad_as_its_worst_critical_part() -> None:
    """A part that is not critical degrades; a critical one that failed takes the server out of traffic."""
    health = Health()
    health.add("store", fine)
    assert (await health.report()).state == "ok"
    health.add("plugins", broken, critical=False)
    report = await health.report()
    assert (report.state, report.ready) == ("degraded", True)
    health.add("disk", slow)
    assert (await health.report()).state == "degraded"
    health.add("lock", broken)
    report = await health.report()
    assert (report.state, report.ready) == ("failed", False)
    assert [(part.name, part.state) for part in report.components] == [
        ("store", "ok"),
        ("plugins", "failed"),
        ("disk", "degraded"),
        ("lock", "failed"),
    ]
    assert report.components[2].detail == "writes wait 3 s"


async def test_check_that_breaks_or_hangs_has_failed_and_tells_no_secret() -> None:
    """The view always answers in time; an exception shows its type only."""
    health = Health(timeout=0.01)
    health.add("broken", broken)
    health.add("hanging", hanging)
    report = await asyncio.wait_for(health.report(), 10)
    assert [part.state for part in report.components] == ["failed", "failed"]
    assert report.components[0].detail == "RuntimeError"
    assert "no answer" in report.components[1].detail


async def test_stopping_server_is_not_ready() -> None:
    """Traffic goes elsewhere before the doors close."""
    health = Health()
    health.add("store", fine)
    health.stopping()
    report = await health.report()
    assert not report.ready
    with pytest.raises(ValueError, match="exists"):
        health.add("store", fine)
