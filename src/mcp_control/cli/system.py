"""`mcpctl status`, `settings`, `doctor`, `api` and `commands`: the server and this program as a whole."""

import sys
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from mcp_control.cli.connection import connect
from mcp_control.cli.errors import MEANINGS, USAGE, CliError
from mcp_control.cli.options import Fields, Json, Out, json_bytes
from mcp_control.cli.output import View, write_json

settings_app = typer.Typer(name="settings", help="What a server started here would run with.", no_args_is_help=True)


def status(as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show the server at a glance."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        found: dict[str, Any] = {"url": client.url, **client.status()}
    view.one(found, tuple(found), key="node")


def api(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="GET, POST, PATCH, DELETE …")],
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Below /api/v1, with its query: /tasks?state=failed. //metrics is from the root."
        ),
    ],
    data: Annotated[
        str, typer.Option("--data", "-d", metavar="JSON", help="The body: JSON, @file, or -.", show_default=False)
    ] = "",
    header: Annotated[
        list[str] | None,
        typer.Option("--header", "-H", metavar="NAME:VALUE", help="A header; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Send one request to the API and print the answer's body as it is."""
    from urllib.parse import parse_qsl

    from mcp_control.sdk.transport import Call

    if not path.startswith("/"):
        raise CliError(f"{path!r} is no path", USAGE, "it begins with /")
    where, _, query = path.partition("?")
    headers: list[tuple[str, str]] = []
    for text in header or ():
        name, colon, value = text.partition(":")
        if not colon:
            raise CliError(f"--header {text}: write NAME:VALUE", USAGE)
        headers.append((name.strip(), value.strip()))
    call = Call(
        method=method.upper(),
        path=where.removeprefix("/api/v1"),
        params=tuple(parse_qsl(query, keep_blank_values=True)),
        headers=tuple(headers),
        body=json_bytes(data, "--data") if data else None,
        timeout=90.0,
    )
    with connect() as client:
        reply = client.transport.send(call)
    if not reply.body:
        return
    if "json" in reply.headers.get("content-type", "") and sys.stdout.isatty():
        write_json(reply.json())
    else:
        sys.stdout.buffer.write(reply.body if reply.body.endswith(b"\n") else reply.body + b"\n")
        sys.stdout.flush()


def commands(as_json: Json = False) -> None:
    """Describe all commands, for programs; --json is the form to read."""
    from mcp_control.cli.main import app

    tree = _described(typer.main.get_command(app), "mcpctl")
    tree["exit_codes"] = {str(code): meaning for code, meaning in MEANINGS.items()}
    if as_json:
        write_json(tree)
        return
    for path, about in _leaves(tree):
        sys.stdout.write(f"{path}\t{about}\n")


def _described(command: Any, path: str) -> dict[str, Any]:
    """A command as plain values. `command` is typer's own kind, which it does not export."""
    found: dict[str, Any] = {
        "name": path,
        "help": (command.help or "").strip(),
        "parameters": [
            {
                "name": one.name,
                "kind": "argument" if one.param_type_name == "argument" else "option",
                "flags": [*one.opts, *one.secondary_opts] if one.param_type_name == "option" else [],
                "required": bool(one.required),
                "repeatable": bool(one.multiple),
                "type": "flag" if getattr(one, "is_flag", False) else _type(one),
                "choices": [str(choice) for choice in get_args(one.type_descriptor.annotation)]
                if _type(one) == "choice"
                else [],
                "help": getattr(one, "help", None) or "",
            }
            for one in command.params
            if not one.name.endswith("_completion")
        ],
    }
    below = getattr(command, "commands", None)
    if below is not None:
        found["commands"] = [_described(one, f"{path} {name}") for name, one in below.items() if not one.hidden]
    return found


def _type(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    return "choice" if get_origin(annotation) is Literal else getattr(annotation, "__name__", "text")


def _leaves(tree: dict[str, Any]) -> list[tuple[str, str]]:
    below = tree.get("commands")
    if below is None:
        return [(tree["name"], tree["help"].partition("\n")[0])]
    return [leaf for one in below for leaf in _leaves(one)]


@settings_app.command("show")
def settings_show(as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List all settings: value, where it comes from, what it means. Secrets are hidden."""
    view = View.of(out, as_json, fields)
    try:
        from mcp_control.configuration.settings import SettingsError, load
    except ImportError as error:
        raise CliError(
            f"the server is not installed: {error}", hint="pip install 'mcp-control-panel[server]'"
        ) from None
    try:
        sources = load().sources()
    except SettingsError as error:
        raise CliError(f"settings: {error}", USAGE) from None
    view.many([one.model_dump() for one in sources], ("name", "value", "origin", "help"), key="name", limit=0)
