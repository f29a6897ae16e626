"""`mcpctl up`: the server in this process, local agents as its children, and a profile so that `mcpctl` works at once."""

from pathlib import Path
from typing import Annotated

import typer

from mcp_control.cli import tether
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Json


def up(
    data: Annotated[
        Path | None, typer.Option("--data", help="Data folder; one server at a time uses it.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port; 0 takes a free one. Default: 8640.", show_default=False)
    ] = None,
    agents: Annotated[
        int | None, typer.Option("--agents", min=0, max=64, help="Local agents to run. Default: 0.", show_default=False)
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with settings.", show_default=False)
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="debug, info, warning or error.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a server here until Ctrl-C, with agents as its child processes.

    The first start prints the first administrator's one-time password. Ctrl-C lets agents finish or hand back what they do.
    """
    tether.hold()
    try:
        from mcp_control.cli.serving import serve_here
        from mcp_control.configuration.settings import SettingsError, load
    except ImportError as error:
        raise CliError(
            f"the server is not installed: {error}", hint="pip install 'mcp-control-panel[server,techdeck]'"
        ) from None
    flags = {"data": data, "port": port, "agents": agents, "host": host, "log.level": log_level}
    try:
        settings = load(flags, file=config).settings
    except SettingsError as error:
        raise CliError(f"settings: {error}", USAGE, "`mcpctl settings show` lists them") from None
    raise typer.Exit(serve_here(settings, as_json=as_json))
