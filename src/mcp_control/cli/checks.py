"""What `mcpctl doctor` looks at from where the command runs: the installation, and the server that commands go to."""

import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from mcp_control.cli.errors import CliError

State = Literal["ok", "warn", "fail"]
_SKEW_SECONDS: Final = 10.0


class Check(NamedTuple):
    """A finding: what was looked at, how it stands, what was seen, what to do about it (empty when nothing)."""

    check: str
    state: State
    detail: str
    advice: str = ""


def all_checks(told: Callable[[Exception], CliError | None], config: Path | None = None) -> Iterator[Check]:
    """Yield all findings. `told` words an error of the SDK."""
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Check("python", "fail", version, "use Python 3.11 or later") if old else Check("python", "ok", version)
    yield from _installed(config)
    yield from _server(told)


def _installed(config: Path | None) -> Iterator[Check]:
    """What a server would find here, where one is installed."""
    try:
        from mcp_control import doctor
        from mcp_control.configuration.settings import SettingsError, load
    except ImportError as error:
        advice = "none is needed to reach one elsewhere; pip install 'mcp-control-panel[server]' adds it"
        yield Check("server", "warn", f"not installed here: {error}", advice)
        return
    try:
        settings = load(file=config).settings
    except SettingsError as error:
        yield Check("settings", "fail", str(error), "`mcpctl settings show` lists what there is")
        return
    yield Check("settings", "ok", "a member of a cluster" if settings.mongo.uri is not None else "a single server")
    for found in doctor.checks(settings):
        yield Check(found.check, found.state, found.detail, found.advice)


def _server(told: Callable[[Exception], CliError | None]) -> Iterator[Check]:
    from mcp_control.cli.connection import connect
    from mcp_control.sdk.transport import Call

    try:
        with connect() as client:
            url = client.url
            began = time.monotonic()
            alive = client.transport.send(Call(path="//health/live"))
            took = time.monotonic() - began
            yield Check("server reachable", "ok", f"{url}, {took * 1000:.1f} ms")
            yield _clock(alive.headers.get("date", ""))
            status = client.status()
            waiting = [one for one in client.breakers.iter() if one.state != "closed"]
    except Exception as error:
        found = told(error)
        if found is None:
            raise
        yield Check("server reachable" if found.code == 6 else "access", "warn", found.what, found.hint)
        return
    yield Check("access", "ok", "the profile's token is accepted")
    for problem in status.get("problems", ()):
        yield Check("server health", "fail", str(problem), "`mcpctl status` shows more")
    for one in waiting:
        seen = f"{one.owner} leaves {one.name} alone since {one.since:%Y-%m-%d %H:%M:%S} UTC, after {one.failures} failures ({one.error})"
        yield Check(
            "breaker", "warn", seen, f"see why {one.name} fails; `mcpctl breakers ls` shows when it is tried again"
        )


def _clock(date: str) -> Check:
    if not date:
        return Check("clock of the server", "warn", "it did not say its time")
    away = abs((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds())
    seen = f"{away:.0f} s apart from ours"
    if away <= _SKEW_SECONDS:
        return Check("clock of the server", "ok", seen)
    return Check("clock of the server", "warn", seen, "let NTP set the clocks of both machines")
