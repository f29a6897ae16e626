"""`mcpctl backup`: the store of this machine's settings as a file, and back."""

import sys
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mcp_control import __version__
from mcp_control.cli.errors import CONFLICT, FAILED, USAGE, CliError
from mcp_control.cli.options import Json, confirm
from mcp_control.cli.output import View, say

if TYPE_CHECKING:
    from mcp_control.archive.model import Header, Manifest
    from mcp_control.offline import Place

T = TypeVar("T")
app = typer.Typer(name="backup", help="Back up and restore the store of a server.", no_args_is_help=True)
Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="PLACE",
        help="sqlite:FOLDER or mongodb://…; better in MONGODB_URI where it holds a password. Default: as in the settings.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="FOLDER", help="Short for --store sqlite:FOLDER.", show_default=False)
]


class Ticker:
    """Shows progress on a terminal, in one line that is written over; elsewhere it says nothing."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, text: str) -> None:
        """Show what goes on."""
        if self._shown and time.monotonic() >= self._next:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            self._next = time.monotonic() + 0.1

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def need_server() -> None:
    """Raise CliError where only the client is installed."""
    try:
        import_module("mcp_control.offline")
    except ImportError as error:
        raise CliError(
            f"the server is not installed: {error}", hint="pip install 'mcp-control-panel[server]'"
        ) from None


def found(store: str, data: Path | None) -> "Place":
    """Return the store that is meant. Raises CliError."""
    if store and data is not None:
        raise CliError("--store and --data exclude each other", USAGE)
    need_server()
    from mcp_control.configuration.settings import SettingsError, load
    from mcp_control.kernel.errors import StoreUnavailable
    from mcp_control.offline import in_database, in_folder, place

    try:
        if data is not None:
            return in_folder(data)
        if store:
            return place(store)
        settings = load().settings
        uri = settings.mongo.uri
        return in_folder(settings.data) if uri is None else in_database(uri.get_secret_value())
    except SettingsError as error:
        raise CliError(f"settings: {error}", USAGE) from None
    except StoreUnavailable as error:
        raise CliError(error.detail, USAGE) from None


def finished(work: Coroutine[Any, Any, T], ticker: Ticker) -> T:
    """Run work on stores and files to its end. Raises CliError for what went wrong."""
    import asyncio

    from mcp_control.archive.migrate import CopyDiffers
    from mcp_control.archive.model import BackupDamaged
    from mcp_control.kernel.errors import Problem

    try:
        return asyncio.run(work)
    except BackupDamaged as error:
        raise CliError(f"damaged: {error}", FAILED, "take another backup") from None
    except CopyDiffers as error:
        raise CliError(f"the copy is not what is there: {error}", FAILED, "nothing was finished; try again") from None
    except Problem as error:
        raise CliError(error.detail, CONFLICT) from None
    except OSError as error:
        raise CliError(f"{error.filename or 'the file'}: {error.strerror or error}") from None
    finally:
        ticker.clear()


@app.command("create")
def create(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Default: mcp-control-TIME.mcpbackup here.", show_default=False),
    ] = None,
    without_blobs: Annotated[bool, typer.Option("--without-blobs", help="Leave the bytes of artifacts out.")] = False,
    store: Store = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Write a backup of one moment; servers go on meanwhile.

    The file is readable by you alone (mode 0600): it holds the hashes of passwords and tokens, and the data of all tasks.
    """
    place = found(store, data)
    from mcp_control.archive import backup

    now = time.time_ns() // 1_000_000
    stamp = datetime.fromtimestamp(now / 1000, UTC).strftime("%Y%m%dT%H%M%SZ")
    path = (output or Path(f"mcp-control-{stamp}.mcpbackup")).absolute()
    ticker = Ticker()

    async def written() -> "Manifest":
        async with place.blobs() as blobs:
            return await backup.create(
                place.archive,
                None if without_blobs else blobs,
                path,
                store=place.kind,
                product=__version__,
                now=now,
                progress=ticker,
            )

    manifest = finished(written(), ticker)
    if manifest.blobs_missing:
        say(f"{len(manifest.blobs_missing)} artifacts were deleted while the backup was made; it names their digests")
    _show({"file": str(path), "bytes": path.stat().st_size, "store": place.name, **_counts(manifest)}, as_json)


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    as_json: Json = False,
) -> None:
    """Read a whole backup and compare every digest; names the first bad part, with exit code 1."""
    need_server()
    from mcp_control.archive import backup

    ticker = Ticker()

    async def check() -> "tuple[Header, Manifest]":
        return backup.verify(file, ticker)

    header, manifest = finished(check(), ticker)
    _show({"file": str(file), "sound": True, **_about(header), **_counts(manifest)}, as_json)


@app.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup, of whichever kind of store.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what the store holds now. Asks first, unless --yes.")
    ] = False,
    store: Store = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a store of a backup, all of it or nothing, while no server runs on it.

    All leases of then are void: agents connect anew, and their old reports are refused. Fences go on growing.
    """
    place = found(store, data)
    from mcp_control.app import KINDS
    from mcp_control.archive.restore import restore as restored

    if replace:
        confirm(f"Replace everything in {place.name} by {file}?")
    ticker = Ticker()
    header, manifest, generation = finished(
        restored(
            file,
            place.archive,
            place.own_blobs,
            KINDS,
            now=time.time_ns() // 1_000_000,
            replace_old=replace,
            progress=ticker,
        ),
        ticker,
    )
    if manifest.blobs_left_out:
        say("the backup was made without the bytes of artifacts; those that this store does not hold cannot be read")
    _show({"store": place.name, "generation": generation, **_about(header), **_counts(manifest)}, as_json)


def _about(header: "Header") -> dict[str, Any]:
    made = datetime.fromtimestamp(header.created_at / 1000, UTC).isoformat().replace("+00:00", "Z")
    return {"created_at": made, "product": header.product, "from": header.store, "format": header.format}


def _counts(manifest: "Manifest") -> dict[str, Any]:
    return {
        "entities": {count.name: count.count for count in manifest.kinds if count.count},
        "events": manifest.facts.count,
        "blobs": len(manifest.blobs),
    }


def _show(told: dict[str, Any], as_json: bool) -> None:
    View.of(None, as_json, "").one(told, tuple(told))
