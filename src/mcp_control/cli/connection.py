"""The server a command speaks to, and the things that short ids mean."""

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from mcp_control.cli.errors import NOT_FOUND, UNREACHABLE, USAGE, CliError

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client

ID_BODY: Final = 36
_SEARCHED: Final = 20_000
_CONNECT_SECONDS: Final = 5.0


def connect() -> "Client":
    """Return a client of the chosen server. Raises CliError at once where nothing listens there."""
    from mcp_control.sdk.client import Client

    client = Client()
    knock(client.url)
    return client


def knock(url: str) -> None:
    """Look whether something listens: the client itself is patient, a person at a terminal is told at once. Raises CliError."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise CliError(
            f"no server at {url}: {getattr(error, 'strerror', None) or error}",
            UNREACHABLE,
            "start one with `mcpctl up`, or choose another with --profile or MCP_CONTROL_URL",
        ) from None


def whole_id(noun: str, given: str, known: Iterable[str]) -> str:
    """Return the id that was meant: a whole one as it is, else the only known one that ends so. Raises CliError.

    Args:
        noun: the prefix of ids, e.g. `task`.
        given: an id or the end of one.
        known: ids to look among; read only where needed.
    """
    if given.startswith(f"{noun}_") and len(given) == len(noun) + 1 + ID_BODY:
        return given
    found: list[str] = []
    if given:
        for place, one in enumerate(known):
            if one.endswith(given):
                found.append(one)
            if place >= _SEARCHED:
                raise CliError(
                    f"there are too many {noun}s to look for one that ends in {given}", USAGE, "give the whole id"
                )
    if not found:
        raise CliError(f"there is no {noun} {given!r}", NOT_FOUND, f"`mcpctl {noun}s ls` lists them")
    if len(found) > 1:
        shown = "".join(f"\n  {one}" for one in found[:10])
        raise CliError(f"{len(found)} {noun}s end in {given}:{shown}", USAGE, "give more of the id")
    return found[0]


def task_id(client: "Client", given: str) -> str:
    """Return the whole id of a task."""
    return whole_id("task", given, (view.id for view in client.tasks.iter(limit=500)))


def run_id(client: "Client", given: str) -> str:
    """Return the whole id of a run."""
    return whole_id("run", given, (view.id for view in client.runs.iter(limit=500)))


def artifact_id(client: "Client", given: str) -> str:
    """Return the whole id of an artifact. The prefix of their ids is `art`."""
    if given.startswith("art_") and len(given) == len("art_") + ID_BODY:
        return given
    return whole_id("artifact", given, (view.id for view in client.artifacts.iter(limit=500)))


def agent_name(client: "Client", given: str) -> str:
    """Return the name or whole id of an agent."""
    from mcp_control.sdk.errors import Missing

    if not given.startswith("agent_"):
        try:
            return client.agents.get(given).id
        except Missing:
            pass
    return whole_id("agent", given, (view.id for view in client.agents.iter(limit=500)))
