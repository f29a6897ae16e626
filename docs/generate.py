"""Writes those parts of the pages that the code decides: `python docs/generate.py`.

A page marks such a part with `<!-- begin: NAME -->` and `<!-- end: NAME -->`. The test suite fails where a part is not what this writes.
"""

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import typer
from prometheus_client.parser import text_string_to_metric_families

from mcp_control.agents.registration import TRANSITIONS as AGENT_TRANSITIONS
from mcp_control.api.assembly import routes
from mcp_control.cli.errors import MEANINGS
from mcp_control.cli.main import app
from mcp_control.configuration.settings import PREFIX, load
from mcp_control.kernel.breaker_rules import TRANSITIONS as BREAKER_TRANSITIONS
from mcp_control.kernel.errors import Problem
from mcp_control.monitoring.metrics import INVARIANTS
from mcp_control.pipelines.transitions import (
    APPROVAL_TRANSITIONS,
    COMPENSATION_TRANSITIONS,
    RUN_TRANSITIONS,
    SCHEDULE_TRANSITIONS,
    STAGE_TRANSITIONS,
)
from mcp_control.tasks.grouping import GROUP_TRANSITIONS
from mcp_control.tasks.operation_model import OPERATION_TRANSITIONS
from mcp_control.tasks.transitions import TRANSITIONS as TASK_TRANSITIONS
from mcp_control.techdeck.model import Options
from mcp_control.testing.server import running_server

sys.path.insert(0, str(Path(__file__).parent))
from states import picture

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src/mcp_control"
Edge = tuple[str, str, str]
"""From state, to state, label; `[*]` is the beginning."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


# --- states -------------------------------------------------------------------------------------------------------


def by_verb(verbs: Mapping[str, Mapping[Any, Iterable[Any]]]) -> set[Edge]:
    """Return the edges of a table from verbs to states to states."""
    return {
        (str(source), str(target), verb)
        for verb, moves in verbs.items()
        for source, targets in moves.items()
        for target in targets
    }


def by_state(states: Mapping[Any, Iterable[Any]]) -> set[Edge]:
    """Return the edges of a table from states to states."""
    return {(str(source), str(target), "") for source, targets in states.items() for target in targets}


def edges() -> dict[str, set[Edge]]:
    """Return the edges of every state diagram by its name."""
    return {
        "agent-states": by_verb(AGENT_TRANSITIONS) | {("[*]", "offline", "")},
        "breaker-states": by_verb(BREAKER_TRANSITIONS) | {("[*]", "closed", "")},
        "task-states": by_verb(TASK_TRANSITIONS)
        | {("[*]", state, "") for state in ("queued", "blocked", "scheduled", "rejected")},
        "group-states": by_verb(GROUP_TRANSITIONS) | {("[*]", state, "") for state in ("open", "sealed")},
        "run-states": by_state(RUN_TRANSITIONS) | {("[*]", "pending", "")},
        "stage-states": by_state(STAGE_TRANSITIONS) | {("[*]", "pending", "")},
        "approval-states": by_verb(APPROVAL_TRANSITIONS) | {("[*]", "pending", "")},
        "compensation-states": by_verb(COMPENSATION_TRANSITIONS) | {("[*]", "pending", "")},
        "operation-states": by_verb(OPERATION_TRANSITIONS) | {("[*]", "running", "")},
        "schedule-states": by_verb(SCHEDULE_TRANSITIONS) | {("[*]", "active", "")},
    }


def diagram(found: set[Edge]) -> str:
    """Return edges as a Mermaid state diagram; verbs between the same two states share a line."""
    verbs: dict[tuple[str, str], set[str]] = {}
    for source, target, verb in found:
        verbs.setdefault((source, target), set()).add(verb)
    lines = []
    for (source, target), names in sorted(verbs.items(), key=lambda item: (item[0][0] != "[*]", item[0])):
        label = ", ".join(sorted(names - {""}))
        lines.append(f"    {source} --> {target}" + (f": {label}" if label else ""))
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


# --- tables -------------------------------------------------------------------------------------------------------


def settings() -> str:
    """Return the table of settings with their defaults."""
    rows = []
    for source in load(environ={}).sources():
        variable = PREFIX + source.name.upper().replace(".", "__")
        value = "in the user's data folder" if source.name == "data" else source.value
        meaning = (
            source.help
            if in_force(source.name)
            else f"{source.help} (fixed in this version: what is set here has no effect)"
        )
        rows.append((f"`{source.name}`", f"`{variable}`", f"`{value}`" if value else "", meaning))
    return table(("setting", "environment", "default", "meaning"), rows)


def in_force(setting: str) -> bool:
    """Say whether the server reads a setting anywhere but where it is declared and checked."""
    attribute = re.compile(rf"\.{setting.rpartition('.')[2]}\b")
    sources = (path for path in PACKAGE.rglob("*.py") if path.name != "settings.py")
    return setting == "allow_insecure_bind" or any(
        attribute.search(path.read_text(encoding="utf-8")) for path in sources
    )


def commands() -> str:
    """Return a section for each command with its arguments and options."""
    return "\n\n".join(_command(path, each) for path, each in walk())


def walk() -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, with its whole name."""
    yield from _walk("mcpctl", typer.main.get_command(app))


def _walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        if not child.hidden:
            yield from _walk(f"{path} {name}", child)


def _command(path: str, command: Any) -> str:
    names = [
        (each.metavar or each.name.upper()) if each.required else f"[{each.metavar or each.name.upper()}]"
        for each in command.params
        if each.param_type_name == "argument"
    ]
    text = re.sub(r"\s*\n\s*\n\s*", "\n\n", (command.help or "").strip())
    lines = [f"### `{' '.join([path, *names])}`", "", text]
    rows = []
    for each in command.params:
        shown = ", ".join(f"`{flag}`" for flag in each.opts + each.secondary_opts)
        if each.param_type_name == "argument":
            if each.help:
                rows.append((f"`{each.metavar or each.name.upper()}`", each.help))
        elif not each.hidden:
            rows.append((shown, each.help or ""))
    if rows:
        lines += ["", table(("option", "meaning"), rows)]
    return "\n".join(lines)


def exit_codes() -> str:
    """Return the table of exit codes."""
    return table(("code", "meaning"), ((str(code), meaning) for code, meaning in MEANINGS.items()))


def route_table() -> str:
    """Return the table of routes."""
    access = {"open": "nobody", "actor": "any credential", "enrol": "enrolment token or credential"}
    rows = [
        (each.tag, f"`{each.method} {re.sub(r':name}', '}', each.full_path)}`", each.summary, access[each.access])
        for each in routes("")
        if not each.full_path.startswith("/docs/")
    ]
    return table(("part", "route", "does", "needs"), rows)


def problem_types(base: type[Problem] = Problem) -> Iterator[type[Problem]]:
    """Yield every kind of problem that answers have."""
    if base.__module__.startswith(("mcp_control.kernel.", "mcp_control.api.")):
        yield base
    for each in base.__subclasses__():
        yield from problem_types(each)


def problems() -> str:
    """Return the table of problem codes."""
    by_code = {each.code: each for each in reversed([each for each in problem_types() if each is not Problem])}
    rows = [
        (f"`{each.code}`", str(each.status), "yes" if each.retryable else "", (each.__doc__ or "").strip())
        for each in sorted(by_code.values(), key=lambda each: (each.status, each.code))
    ]
    return table(("code", "status", "worth repeating", "meaning"), rows)


def metrics() -> str:
    """Return the table of metrics, read from a server."""
    families = text_string_to_metric_families(asyncio.run(_rendered()))
    rows = []
    for family in families:
        if family.name.endswith("_created"):
            continue
        labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        suffix = "_total" if family.type == "counter" else ""
        rows.append((f"`{family.name}{suffix}`", family.type, ", ".join(labels), family.documentation))
    return table(("metric", "kind", "labels", "meaning"), sorted(rows))


async def _rendered() -> str:
    with tempfile.TemporaryDirectory() as folder:
        async with running_server(Path(folder)) as server:
            metrics = server.services.metrics
            # What has labels shows them once something was counted.
            metrics.request("", "GET", 200, 0)
            metrics.shed("submit")
            metrics.login("accepted")
            metrics.task_waited("", 0)
            metrics.task_ran("", 0)
            return metrics.render().decode()


def invariants() -> str:
    """Return the invariants that are counted."""
    source = (PACKAGE / "monitoring/metrics.py").read_text(encoding="utf-8")
    meanings = dict(re.findall(r'^    "(\w+)",  # (.+)$', source, re.MULTILINE))
    return table(("name", "what happened where it is not 0"), ((f"`{name}`", meanings[name]) for name in INVARIANTS))


def options() -> str:
    """Return the table of techdeck's options."""
    rows = []
    for group in msgspec.structs.fields(Options):
        for field in msgspec.structs.fields(group.type):
            made = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            kind = (
                str(field.type)
                if not isinstance(field.type, type) or hasattr(field.type, "__args__")
                else field.type.__name__
            )
            kind = re.sub(
                r"typing\.Literal\[(.*)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), kind
            )
            rows.append((f"`{group.name}.{field.name}`", kind, f"`{msgspec.json.encode(made).decode()}`"))
    return table(("option", "type", "default"), rows)


PARTS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "settings": ("configuration.md", settings),
    "commands": ("cli.md", commands),
    "exit-codes": ("cli.md", exit_codes),
    "routes": ("api.md", route_table),
    "problems": ("api.md", problems),
    "metrics": ("operations.md", metrics),
    "invariants": ("operations.md", invariants),
    "options": ("techdeck.md", options),
    "agent-states": ("agents.md", lambda: diagram(edges()["agent-states"])),
    "breaker-states": ("breakers.md", lambda: diagram(edges()["breaker-states"])),
    "task-states": ("tasks.md", lambda: diagram(edges()["task-states"])),
    "group-states": ("groups.md", lambda: diagram(edges()["group-states"])),
    "run-states": ("runs.md", lambda: diagram(edges()["run-states"])),
    "stage-states": ("runs.md", lambda: diagram(edges()["stage-states"])),
    "approval-states": ("approvals.md", lambda: diagram(edges()["approval-states"])),
    "compensation-states": ("runs.md", lambda: diagram(edges()["compensation-states"])),
    "operation-states": ("failures.md", lambda: diagram(edges()["operation-states"])),
    "schedule-states": ("schedules.md", lambda: diagram(edges()["schedule-states"])),
}
"""The page and the writer of every part."""


def part(name: str) -> re.Pattern[str]:
    """Return the pattern of a part in its page; its group is what stands there."""
    return re.compile(rf"(?<=<!-- begin: {name} -->\n)(.*?)(?=<!-- end: {name} -->)", re.DOTALL)


def pictures() -> dict[str, str]:
    """Return the state diagrams as pictures, by file name."""
    return {
        f"{name}.svg": picture(name, ((source, target) for source, target, _ in found if source != "[*]"))
        for name, found in edges().items()
    }


def main() -> int:
    """Write all parts and pictures, and name what changed."""
    for name, text in pictures().items():
        if not (HERE / name).exists() or (HERE / name).read_text(encoding="utf-8") != text:
            (HERE / name).write_text(text, encoding="utf-8")
            sys.stdout.write(f"{name}\n")
    for name, (page, write) in PARTS.items():
        path = HERE / page
        before = path.read_text(encoding="utf-8")
        text = f"\n{write()}\n\n"
        after, found = part(name).subn(lambda _, text=text: text, before)
        if found != 1:
            sys.stderr.write(f"{page}: no part named {name}\n")
            return 1
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page}: {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
