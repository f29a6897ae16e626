"""`mcpctl migrate-store`: the store of a product to another place, while it is in use. `mcpctl contract-store`: without what is old."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from mcp_control.cli.backup import Store, Ticker, finished, found, need_server
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Json, confirm, seconds
from mcp_control.cli.output import View, say

if TYPE_CHECKING:
    from mcp_control.kernel.errors import StoreUnavailable

_LOOK_SECONDS = 0.25


def migrate_store(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="sqlite:FOLDER or mongodb://…")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="sqlite:FOLDER or mongodb://…; must be empty.")],
    now: Annotated[
        bool, typer.Option("--now", help="No server runs on the source: fail if one does, rather than wait.")
    ] = False,
    timeout: Annotated[
        str,
        typer.Option(
            "--timeout", metavar="TIME", help="Give up when servers run that long (90, 2m, 1h).", show_default=False
        ),
    ] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what the target holds. Asks first, unless --yes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Move a store: copies it while servers run, then waits until they are stopped, brings what changed, and compares.

    Leases stay valid: agents that connect to the new servers go on with what they hold. The source is left as it is; start nothing on it.
    """
    need_server()
    import asyncio

    from mcp_control.app import KINDS
    from mcp_control.archive.migrate import migrate
    from mcp_control.kernel.errors import StoreUnavailable
    from mcp_control.offline import place

    limit = seconds(timeout)
    try:
        old, new = place(source), place(target)
    except StoreUnavailable as error:
        raise CliError(error.detail, USAGE) from None
    if source == target:
        raise CliError("source and target are the same", USAGE)
    if replace:
        confirm(f"Replace everything in {new.name}?")
    ticker = Ticker()
    waiting_since: list[float] = []

    async def wait(in_the_way: "StoreUnavailable") -> None:
        if now:
            raise in_the_way
        if not waiting_since:
            waiting_since.append(time.monotonic())
            ticker.clear()
            say(f"Copied. Stop the servers on {old.name} now: the rest takes a moment ({in_the_way.detail})")
        if limit is not None and time.monotonic() - waiting_since[0] > limit:
            raise in_the_way
        await asyncio.sleep(_LOOK_SECONDS)

    moved = finished(
        migrate(
            old.archive,
            old.blobs,
            new.archive,
            new.own_blobs,
            KINDS,
            replace=replace,
            wait=wait,
            progress=ticker,
        ),
        ticker,
    )
    told = {
        "store": new.name,
        "entities": {count.name: count.count for count in moved.kinds if count.count},
        "events": moved.facts.count,
        "newest": moved.newest_seq,
        "blobs": moved.blobs,
        "late": moved.late,
        "start": new.start,
    }
    View.of(None, as_json, "").one(told, tuple(told))


def contract_store(
    store: Store = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove from MongoDB the indexes and parts that only servers of an earlier version use, once the last of them has gone.

    Refused while a server of another version than this program runs, or was the last to start. Asks first, unless --yes. A data folder
    needs none of this: its server does it at the start.
    """
    place = found(store, None)
    if place.contract is None:
        raise CliError(f"{place.name} needs none of this: its server does it at the start", USAGE)
    ticker = Ticker()
    names = finished(place.contract(False), ticker)
    if names and not dry_run:
        confirm(f"Remove {', '.join(names)} from {place.name}?")
        names = finished(place.contract(True), ticker)
    told = {"store": place.name, "removed": [] if dry_run else names, "surplus": names if dry_run else []}
    View.of(None, as_json, "").one(told, tuple(told))
