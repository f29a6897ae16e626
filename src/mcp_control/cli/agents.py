"""`mcpctl agents`: who does the work."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mcp_control.cli import tether
from mcp_control.cli.connection import agent_name, connect
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Labels, Limit, Out, confirm, counts, pairs, seconds
from mcp_control.cli.output import View, say, write_json

if TYPE_CHECKING:
    from mcp_control.sdk.agent import Agent

app = typer.Typer(name="agents", help="Who does the work: list, start, drain, retire.", no_args_is_help=True)
COLUMNS = ("id", "name", "state", "health.verdict", "running", "slots", "completed", "failed", "last_beat_at")
WIDE = (
    "health.reason",
    "health.since",
    "kind",
    "instances",
    "lost",
    "cpu_percent",
    "memory_mb",
    "labels",
    "version",
    "note",
)
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["auto", "json", "console"]
Name = Annotated[str, typer.Argument(help="Name, id, or the end of an id.")]
Note = Annotated[str, typer.Option("--note", help="Why, for those who look later.", show_default=False)]


@app.command("ls")
def ls(
    state: Annotated[str, typer.Option("--state", help="Only agents in this state.", show_default=False)] = "",
    capability: Annotated[
        str, typer.Option("--capability", help="Only agents that do this task type.", show_default=False)
    ] = "",
    label: Labels = None,
    free: Annotated[bool, typer.Option("--free", help="Only agents with a free slot.")] = False,
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List agents."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        wanted = {
            "state": state or None,
            "capability": capability or None,
            "label": pairs(label) or None,
            "free": free or None,
        }
        view.many(client.agents.iter(**wanted), COLUMNS, WIDE, key="name", limit=limit)


@app.command("get")
def get(name: Name, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show an agent."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.agents.get(agent_name(client, name)), key="name")


@app.command("start")
def start(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:AGENT",
            help="Where the agent is, e.g. my_agents:cleaner; the current folder is searched first.",
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", help="Serve under this name instead of the agent's own.", show_default=False)
    ] = "",
    slots: Annotated[
        int | None,
        typer.Option("--slots", min=1, help="Tasks at once, instead of the agent's own number.", show_default=False),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--type-limit", metavar="TYPE=N", help="Tasks of one type at once; repeatable.", show_default=False
        ),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option("--drain-seconds", min=0, help="How long SIGTERM lets tasks in hand go on.", show_default=False),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option("--log-level", help="Least severe level logged.")] = "info",
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="How; auto is console on a terminal, else json.")
    ] = "auto",
) -> None:
    """Run an agent here until Ctrl-C or SIGTERM, which let it finish first."""
    import structlog

    from mcp_control.monitoring.logs import configure

    tether.hold()
    agent = load(target)
    if name:
        agent.name = name
    if slots is not None:
        agent.slots = slots
    agent.limits |= counts("--type-limit", limits)
    if drain_seconds is not None:
        agent.drain_seconds = drain_seconds
    if not structlog.is_configured():  # by the agent's own module
        configure(log_level, log_format)
    agent.run()


def load(target: str) -> "Agent":
    """Return the agent at `module:name`. Raises CliError."""
    from mcp_control.sdk.agent import Agent

    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise CliError(f"{target!r} does not name an agent", USAGE, "write MODULE:AGENT, e.g. my_agents:cleaner")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise CliError(
                f"there is no module {module_name}", USAGE, "run this where the module can be imported"
            ) from None
        raise CliError(f"{module_name} cannot be imported: {error}", USAGE) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, Agent):
        raise CliError(
            f"{target} is no Agent", USAGE, "it must be made with mcp_control.Agent(...) at the top of the module"
        )
    return found


@app.command("drain")
def drain(name: Name, note: Note = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Let an agent finish what it has and give it nothing new."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.agents.drain(agent_name(client, name), note or None), COLUMNS, key="name")


@app.command("quarantine")
def quarantine(name: Name, note: Note = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Keep an agent from work until it is resumed."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.agents.quarantine(agent_name(client, name), note or None), COLUMNS, key="name")


@app.command("resume")
def resume(name: Name, note: Note = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Give work to a drained or quarantined agent again."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.agents.resume(agent_name(client, name), note or None), COLUMNS, key="name")


@app.command("retire")
def retire(name: Name, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """End an agent for good; its credentials end with it."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        found = client.agents.get(agent_name(client, name))
        confirm(f"Retire agent {found.name} ({found.id}) for good?")
        view.one(client.agents.retire(found.id), COLUMNS, key="name")


@app.command("enrol")
def enrol(
    name: Annotated[
        str, typer.Option("--name", help="Only an agent of this name may use it.", show_default=False)
    ] = "",
    uses: Annotated[int, typer.Option("--uses", min=1, max=1000, help="How many agents it enrols.")] = 1,
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long it holds, 10m at most.")] = "10m",
    as_json: Json = False,
) -> None:
    """Print a one-time token with which agents enrol, for MCP_CONTROL_ENROLMENT_TOKEN."""
    with connect() as client:
        life = seconds(ttl)
        made = client.agents.enrol(name or None, uses=uses, ttl_seconds=None if life is None else round(life))
    if as_json:
        write_json({"token": made.token, "expires_at": made.expires_at})
    else:
        say(f"holds until {made.expires_at}, for {uses} agent(s)")
        sys.stdout.write(made.token + "\n")
