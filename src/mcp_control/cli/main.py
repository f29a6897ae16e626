"""The entry point: puts the commands together, and ends each with the right exit code.

Nothing heavy is imported here: a command loads what it needs when it is called.
"""

import os
import sys
from typing import Annotated, Final

import typer

from mcp_control import __version__
from mcp_control.cli import (
    agents,
    approvals,
    artifacts,
    backup,
    breakers,
    bulk,
    bundles,
    dlq,
    events,
    groups,
    limits,
    migrate,
    pipelines,
    profiles,
    runs,
    schedules,
    shares,
    system,
    tasks,
)
from mcp_control.cli.demo import demo
from mcp_control.cli.doctor import doctor
from mcp_control.cli.errors import FAILED, INTERRUPTED, USAGE, CliError, tell, told
from mcp_control.cli.options import NO_INPUT, YES
from mcp_control.cli.up import up

PROFILE_OPTIONS: Final = ("--profile",)
FLAGS: Final = {"--no-input", "--yes", "-y", "--no-color"}

app = typer.Typer(
    name="mcpctl",
    help="MCP Server (Management Control Panel): run it, give it work, look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mcpctl {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            metavar="NAME|URL",
            help="The server to speak to. At any place of the line.",
            show_default=False,
        ),
    ] = "",
    no_input: Annotated[bool, typer.Option("--no-input", help="Never ask anything. At any place.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Answer questions with yes. At any place.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours, as NO_COLOR=1. At any place.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Environment: MCP_CONTROL_URL, MCP_CONTROL_TOKEN, MCP_CONTROL_CONFIG_DIR, NO_COLOR."""
    if profile:
        from mcp_control.sdk.profiles import TOKEN_VARIABLE, URL_VARIABLE, Profiles

        known = Profiles().all()
        if not any(profile in (one.name, one.url) for one in known) and not any(mark in profile for mark in ":./"):
            raise CliError(
                f"there is no profile {profile!r}", USAGE, "`mcpctl profile ls` lists them; a URL does as well"
            )
        os.environ[URL_VARIABLE] = profile
        os.environ.pop(TOKEN_VARIABLE, None)  # it belongs to the server of the environment
    for name, wanted in ((NO_INPUT, no_input), (YES, yes), ("NO_COLOR", no_color)):
        if wanted:
            os.environ[name] = "1"


app.command("up")(up)
app.command("demo")(demo)
app.command("status")(system.status)
app.command("login")(profiles.login)
app.command("migrate-store")(migrate.migrate_store)
app.command("contract-store")(migrate.contract_store)
runs.app.command("export")(bundles.export)
runs.app.command("import")(bundles.take_in)
for noun in (
    profiles.profile_app,
    profiles.tokens_app,
    tasks.app,
    groups.app,
    bulk.app,
    dlq.app,
    agents.app,
    pipelines.app,
    runs.app,
    approvals.app,
    schedules.app,
    limits.app,
    shares.app,
    breakers.app,
    artifacts.app,
    events.app,
    system.settings_app,
    backup.app,
):
    for one in list(noun.registered_commands):
        if one.name == "ls" and one.callback is not None:
            noun.command("list", hidden=True)(one.callback)  # what fingers type; neither shown nor documented
    app.add_typer(noun)
app.command("api")(system.api)
app.command("commands")(system.commands)
app.command("doctor")(doctor)


def ordered(arguments: list[str]) -> list[str]:
    """Return the arguments with the options that hold for every command in front, wherever they stood. Pure."""
    front: list[str] = []
    rest: list[str] = []
    given = iter(arguments)
    for one in given:
        if one == "--":
            rest += [one, *given]
        elif one in FLAGS or one.startswith("--profile="):
            front.append(one)
        elif one in PROFILE_OPTIONS:
            front += [one, *[value for value in [next(given, None)] if value is not None]]
        else:
            rest.append(one)
    return front + rest


def main() -> None:
    """Run `mcpctl` with the arguments of this process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    try:
        app(args=ordered(arguments), prog_name="mcpctl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED if end.code else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, e.g. `| head`. Python must not stumble over it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        found = told(error)
        if found is None:
            raise
        tell(found)
        return found.code
    return 0


if __name__ == "__main__":
    main()
