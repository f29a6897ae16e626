"""`mcpctl pipelines`: definitions, and starting them."""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcp_control.cli.budgets import BudgetTexts, budget_from
from mcp_control.cli.connection import connect
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import (
    Fields,
    Json,
    Labels,
    Limit,
    Out,
    ResultsTo,
    Timeout,
    Wait,
    confirm,
    json_argument,
    loose,
    pairs,
    seconds,
)
from mcp_control.cli.output import View, plain, say, write_json
from mcp_control.cli.plans import changes, show
from mcp_control.cli.report import ended, follow, started

if TYPE_CHECKING:
    from mcp_control.pipelines.input_model import Param
    from mcp_control.pipelines.view_model import PipelineView

app = typer.Typer(
    name="pipelines",
    help="Definitions of work in stages: validate, plan, apply, run, compare, delete.",
    no_args_is_help=True,
)
COLUMNS = ("name", "version", "stages", "created_at", "description")
WIDE = ("id", "labels", "created_by")
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A definition in YAML or JSON; - for standard input.", allow_dash=True)
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the pipeline.")]
Version = Annotated[
    int | None, typer.Option("--version", min=1, help="Its version. Default: the newest.", show_default=False)
]
OneVersion = Annotated[
    int | None, typer.Option("--version", min=1, help="This version alone. Default: all.", show_default=False)
]
Before = Annotated[
    int | None, typer.Argument(metavar="A", min=1, help="A version. Default: the one before B.", show_default=False)
]
After = Annotated[
    int | None, typer.Argument(metavar="B", min=1, help="A version. Default: the newest.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=VALUE", help="A parameter, or a place inside one; repeatable.", show_default=False
    ),
]
Params = Annotated[
    str, typer.Option("--params", metavar="JSON", help="All parameters as JSON, @file, or -.", show_default=False)
]


def _definition(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{file}: {getattr(error, 'strerror', None) or error}", USAGE) from None


@app.command("validate")
def validate(file: File, as_json: Json = False) -> None:
    """Check a definition without keeping it: all that is wrong, each with line and column; exit code 0 when there is nothing."""
    definition = _definition(file)
    with connect() as client, _named(file, as_json):
        found = client.pipelines.validate(definition)
    if as_json:
        write_json(found)
        return
    for warning in found.get("warnings", ()):
        say(f"warning: {warning}")
    sys.stdout.write("valid\n")


@contextmanager
def _named(file: Path, as_json: bool = False) -> Iterator[None]:
    """Tell what is wrong with a file as compilers do: `file:line:column: …`; with `as_json` as one object."""
    from mcp_control.sdk.errors import InvalidRequest

    try:
        yield
    except InvalidRequest as problem:
        if as_json:
            write_json({"valid": False, "warnings": [], "errors": problem.errors})
            raise typer.Exit(USAGE) from None
        if not any("line" in error for error in problem.errors):
            raise
        lines = sorted(problem.errors, key=lambda error: (error.get("line", 0), error.get("column", 0)))
        shown = [
            f"{file}:{error.get('line', 1)}:{error.get('column', 1)}: {error['detail']} [{error['code']}] {error['pointer']}"
            for error in lines
        ]
        count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
        raise CliError(f"{file} has {count}\n" + "\n".join(shown), USAGE) from None


@app.command("apply")
def apply(
    file: File,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it.")] = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Make a definition the newest version of its name; one that is the same already changes nothing."""
    if dry_run:
        validate(file, as_json)
        return
    view = View.of(out, as_json, fields)
    definition = _definition(file)
    with connect() as client, _named(file):
        view.one(client.pipelines.apply(definition), COLUMNS, key="name")


@app.command("ls")
def ls(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List pipelines, the newest version of each."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.pipelines.iter(), COLUMNS, WIDE, key="name", limit=limit)


@app.command("get")
def get(name: Name, version: Version = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a pipeline; `-o yaml` with its whole definition."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.pipelines.get(name, version), COLUMNS, key="name")


@app.command("versions")
def versions(name: Name, limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List the versions of a pipeline, the newest first."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.pipelines.versions(name), COLUMNS, WIDE, key="version", limit=limit)


@app.command("delete")
def delete(name: Name, version: OneVersion = None) -> None:
    """Delete a version, or the pipeline with all of them; not while a run that has not ended or a schedule uses it."""
    confirm(f"Delete {f'version {version}' if version else 'all versions'} of the pipeline {name}?")
    with connect() as client:
        client.pipelines.delete(name, version)


@app.command("diff")
def diff(name: Name, before: Before = None, after: After = None, as_json: Json = False) -> None:
    """Show what changed between two versions: + added, - removed, ~ changed; by default between the newest and the one before."""
    with connect() as client:
        found = plain(client.pipelines.diff(name, before, after))
    if as_json:
        write_json(found)
        return
    sys.stdout.write("\n".join(changes(found)) + "\n")


@app.command("plan")
def plan(
    source: Annotated[
        str,
        typer.Argument(metavar="FILE|NAME", help="A definition in YAML or JSON, - for standard input, or a pipeline."),
    ],
    settings: Settings = None,
    params: Params = "",
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Say who could take each stage now, when a run would end going by history, and what one more agent would save."""
    given = json_argument(params, "--params") if params else {}
    if not isinstance(given, dict):
        raise CliError("--params is not a JSON object", USAGE)
    file = Path(source)
    named = source != "-" and not file.exists() and not file.suffix
    with connect() as client:
        if named:
            pipeline = client.pipelines.get(source, version)
            values = parameters(pipeline.name, declared(pipeline), given, settings or [])
            found = client.pipelines.plan(name=source, version=version, params=values)
        else:
            definition = _definition(file)
            values = parameters(source, _declared_in(definition), given, settings) if settings else given
            with _named(file, as_json):
                found = client.pipelines.plan(definition, values)
    if as_json:
        write_json(plain(found))
        return
    show(found)


@app.command("graph")
def graph(name: Name, version: Version = None) -> None:
    """Print a pipeline's stages and what each needs, as a Mermaid flow chart."""
    with connect() as client:
        spec = client.pipelines.get(name, version).spec
    assert spec is not None
    sys.stdout.write("flowchart LR\n")
    for stage in spec.spec.stages:
        sys.stdout.write(f'  {stage.id}["{stage.id}: {stage.uses}"]\n')
        for need in stage.needs:
            sys.stdout.write(f"  {need} --> {stage.id}\n")


@app.command("run")
def run(
    name: Name,
    input: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help="Upload this file and give it as the parameter `input`; an artifact's id does as well.",
            show_default=False,
        ),
    ] = "",
    output: ResultsTo = None,
    settings: Settings = None,
    params: Params = "",
    key: Annotated[
        str, typer.Option("--key", help="Idempotency key: repeating it returns the first run.", show_default=False)
    ] = "",
    label: Labels = None,
    priority: Annotated[
        int | None, typer.Option("--priority", min=0, max=100, help="0 to 100.", show_default=False)
    ] = None,
    version: Version = None,
    budget: BudgetTexts = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Take no results of earlier runs; those computed are kept anew.")
    ] = False,
    wait: Wait = False,
    timeout: Timeout = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Start a pipeline; with --wait follow it to its end, download what it made, and exit with 8 when it failed."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    if output is not None and not wait:
        raise CliError("--output needs --wait", USAGE, "or fetch them later: mcpctl runs artifacts RUN --output DIR")
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CliError(f"--output {output}: {error.strerror}", USAGE) from None
    given = json_argument(params, "--params") if params else {}
    if not isinstance(given, dict):
        raise CliError("--params is not a JSON object", USAGE)
    source = _source(input) if input else None
    with connect() as client:
        pipeline = client.pipelines.get(name, version)
        values = parameters(pipeline.name, declared(pipeline), given, settings or [])
        if source is not None:
            if "input" not in declared(pipeline):
                raise CliError(
                    f"the pipeline {name} has no parameter `input`", USAGE, f"mcpctl pipelines get {name} -o yaml"
                )
            values["input"] = source if isinstance(source, str) else client.artifacts.upload(source, role="input").id
        options: dict[str, Any] = {
            "key": key or None,
            "labels": pairs(label) or None,
            "priority": priority,
            "version": version,
            "no_cache": no_cache or None,
            "budget": budget_from(budget),
        }
        handle = client.pipelines.run(name, values, **{k: v for k, v in options.items() if v is not None})
        if not wait:
            started(view, handle.id)
            return
        say(f"run {handle.id}")
        raise typer.Exit(ended(client, follow(client, handle.id, limit), view, output))


def _source(text: str) -> Path | str:
    path = Path(text)
    if path.is_file():
        return path
    if text.startswith("art_") and not path.exists():
        return text
    raise CliError(f"--input {text}: {'not a file' if path.exists() else 'there is no such file'}", USAGE)


def declared(pipeline: "PipelineView") -> Mapping[str, "Param"]:
    """Return the parameters that a pipeline declares."""
    assert pipeline.spec is not None
    return pipeline.spec.spec.params


def _declared_in(definition: str) -> Mapping[str, "Param"]:
    """Return the parameters that a text declares, as far as it can be read: the server says what is wrong with it."""
    import msgspec
    import yaml

    from mcp_control.pipelines.input_model import Param

    try:
        found = yaml.safe_load(definition)
        return msgspec.convert(found["spec"].get("params", {}), dict[str, Param])
    except (yaml.YAMLError, msgspec.ValidationError, AttributeError, KeyError, TypeError):
        return {}


def parameters(
    pipeline: str, declared: Mapping[str, "Param"], given: Mapping[str, Any], settings: Collection[str]
) -> dict[str, Any]:
    """Return a run's parameters: `given`, and on top of them each `a.b=value`.

    `a` is a parameter of the pipeline, or else a part of its parameter `options`. Raises CliError for one that is neither.
    """
    values: dict[str, Any] = dict(plain(dict(given)))
    for text in settings:
        path, sign, value = text.partition("=")
        names = path.strip().split(".")
        if not sign or not all(names):
            raise CliError(f"--set {text}: write A.B=VALUE", USAGE)
        if names[0] not in declared:
            if "options" not in declared:
                known = ", ".join(declared) or "none"
                raise CliError(
                    f"--set {path}: the pipeline {pipeline} has no parameter {names[0]} (it has: {known})", USAGE
                )
            names.insert(0, "options")
        plain_text = len(names) == 1 and declared[names[0]].type in ("string", "artifact")
        _put(values, names, value if plain_text else loose(value), text)
    return values


def _put(tree: dict[str, Any], names: list[str], value: object, text: str) -> None:
    for name in names[:-1]:
        step = tree.setdefault(name, {})
        if not isinstance(step, dict):
            raise CliError(f"--set {text}: {name} has a value already", USAGE)
        tree = step
    tree[names[-1]] = value
