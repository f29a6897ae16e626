"""What `mcpctl doctor` looks at. Each check answers ok, warn or fail, and why."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from mcp_control.cli.errors import CliError

_ROOM_WARN: Final = 1 << 30
_ROOM_FAIL: Final = 64 << 20
_SKEW_SECONDS: Final = 10.0


class Check(NamedTuple):
    """A finding."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str


def all_checks(told: Callable[[Exception], CliError | None]) -> Iterator[Check]:
    """Yield all findings. `told` words an error of the SDK."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok" if sys.version_info >= (3, 11) else "fail", version)
    try:
        import apsw

        from mcp_control.configuration.settings import SettingsError, load
    except ImportError as error:
        yield Check("server", "warn", f"not installed here: {error}")
    else:
        yield Check("sqlite", "ok", f"{apsw.sqlite_lib_version()}, apsw {apsw.apsw_version()}")
        try:
            settings = load().settings
        except SettingsError as error:
            yield Check("settings", "fail", str(error))
        else:
            yield Check("settings", "ok", "valid")
            yield _folder(settings.data)
            yield _room(settings.data)
            yield _port(settings.host, settings.port)
    yield from _server(told)


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _folder(data: Path) -> Check:
    near = _nearest(data)
    if not os.access(near, os.W_OK | os.X_OK):
        return Check("data folder", "fail", f"{near} cannot be written")
    return Check("data folder", "ok", str(data) if near == data.absolute() else f"{data} (will be made)")


def _room(data: Path) -> Check:
    free = shutil.disk_usage(_nearest(data)).free
    state: Literal["ok", "warn", "fail"] = "fail" if free < _ROOM_FAIL else "warn" if free < _ROOM_WARN else "ok"
    return Check("disk", state, f"{free / 1e9:.1f} GB free")


def _port(host: str, port: int) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        return Check("port", "warn", f"{host}:{port}: {error.strerror or error} (a server runs there already?)")
    return Check("port", "ok", f"{host}:{port} is free")


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
    except Exception as error:
        found = told(error)
        if found is None:
            raise
        yield Check("server reachable" if found.code == 6 else "access", "warn", f"{found.what}. {found.hint}".strip())
        return
    yield Check("access", "ok", "the profile's token is accepted")
    for problem in status.get("problems", ()):
        yield Check("server health", "fail", str(problem))


def _clock(date: str) -> Check:
    if not date:
        return Check("clock", "warn", "the server did not say its time")
    away = abs((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds())
    return Check("clock", "ok" if away <= _SKEW_SECONDS else "warn", f"{away:.0f} s apart from the server's")
