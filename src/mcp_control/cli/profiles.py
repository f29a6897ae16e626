"""`mcpctl login`, `profile` and `tokens`: who we are, and where."""

import getpass
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcp_control.cli.connection import connect, knock, whole_id
from mcp_control.cli.errors import NOT_FOUND, USAGE, CliError
from mcp_control.cli.options import Fields, Json, Limit, Out, may_ask, seconds
from mcp_control.cli.output import View, say

if TYPE_CHECKING:
    from mcp_control.sdk.profiles import Profile
    from mcp_control.sdk.transport import Transport

profile_app = typer.Typer(
    name="profile", help="Servers this user knows, and the one used by default.", no_args_is_help=True
)
tokens_app = typer.Typer(name="tokens", help="API tokens, for programs and other machines.", no_args_is_help=True)
TOKEN_COLUMNS = ("id", "name", "created_at", "expires_at", "last_used_at")


def login(
    url: Annotated[
        str,
        typer.Argument(
            help="The server. Default: that of --profile, MCP_CONTROL_URL or the default profile.", show_default=False
        ),
    ] = "",
    username: Annotated[str, typer.Option("--username", "-u", help="Default: admin.")] = "admin",
    name: Annotated[str, typer.Option("--name", help="What to call the profile.", show_default=False)] = "",
    password_stdin: Annotated[
        bool,
        typer.Option(
            "--password-stdin",
            help="Read the password from the first line of standard input; a new one, where it must be changed, from the second.",
        ),
    ] = False,
    default: Annotated[bool, typer.Option("--default/--no-default", help="Use this server by default.")] = True,
) -> None:
    """Log in and keep a revocable token in the profile. A one-time password is changed on the way."""
    from mcp_control.sdk.errors import AccessDenied
    from mcp_control.sdk.profiles import Profile, Profiles
    from mcp_control.sdk.transport import Transport

    profiles = Profiles()
    known = profiles.resolve(url or None)
    knock(known.url)
    password = _secret(f"Password of {username} at {known.url}: ", password_stdin)
    transport = Transport(known.url, "")
    try:
        try:
            session = _post(transport, "/auth/login", {"username": username, "password": password})
        except AccessDenied as denied:
            if denied.code != "password-change-required":
                raise
            say("This password was for one use: choose a new one.")
            new = _new_password(password_stdin)
            _post(
                transport, "/auth/password", {"username": username, "current_password": password, "new_password": new}
            )
            session = _post(transport, "/auth/login", {"username": username, "password": new})
        transport.token = session["access_token"]
        made = _post(transport, "/auth/tokens", {"name": f"mcpctl login ({socket.gethostname()[:60]})"})
    finally:
        transport.close()
    profiles.save(Profile(url=known.url, token=made["token"], name=name or known.name), default)
    say(
        f"Logged in at {known.url} as {username}; the token {made['id']} is kept in {profiles.folder / 'profiles.json'}"
    )


def _post(transport: "Transport", path: str, body: dict[str, Any]) -> dict[str, Any]:
    import msgspec

    from mcp_control.sdk.transport import Call

    reply = transport.send(Call(method="POST", path=path, body=msgspec.json.encode(body)))
    found: dict[str, Any] = reply.json() if reply.body else {}
    return found


def _secret(question: str, from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    if not may_ask():
        raise CliError("there is nobody to ask for the password", USAGE, "use --password-stdin")
    return getpass.getpass(question)


def _new_password(from_stdin: bool) -> str:
    new = _secret("New password: ", from_stdin)
    if not new:
        raise CliError("no new password was given", USAGE, "with --password-stdin it is the second line")
    if not from_stdin and _secret("Once more: ", False) != new:
        raise CliError("the two differ", USAGE)
    return new


@profile_app.command("ls")
def profile_ls(as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List profiles; tokens are not shown."""
    from mcp_control.sdk.profiles import Profiles

    profiles = Profiles()
    default = profiles.default
    lines = [
        {"name": one.name, "url": one.url, "default": one.url == default, "token": bool(one.token)}
        for one in profiles.all()
    ]
    View.of(out, as_json, fields).many(lines, ("name", "url", "default", "token"), key="url")


def _chosen(given: str) -> "Profile":
    from mcp_control.sdk.profiles import Profiles, normal_url

    for one in Profiles().all():
        if given in (one.name, one.url) or normal_url(given) == one.url:
            return one
    raise CliError(f"there is no profile {given!r}", NOT_FOUND, "`mcpctl profile ls` lists them")


@profile_app.command("use")
def profile_use(
    profile: Annotated[str, typer.Argument(metavar="NAME|URL", help="The profile.")],
    name: Annotated[str, typer.Option("--name", help="Call it so from now on.", show_default=False)] = "",
) -> None:
    """Make a profile the default one."""
    import msgspec

    from mcp_control.sdk.profiles import Profiles

    found = _chosen(profile)
    Profiles().save(msgspec.structs.replace(found, name=name) if name else found, default=True)
    say(f"{found.url} is used by default")


@profile_app.command("rm")
def profile_rm(profile: Annotated[str, typer.Argument(metavar="NAME|URL", help="The profile.")]) -> None:
    """Forget a profile. Its token stays valid until it is revoked (`mcpctl tokens revoke`)."""
    from mcp_control.sdk.profiles import Profiles

    found = _chosen(profile)
    Profiles().remove(found.url)
    say(f"{found.url} is forgotten")


@tokens_app.command("create")
def tokens_create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    expires: Annotated[
        str,
        typer.Option(
            "--expires", metavar="TIME", help="How long it holds, e.g. 30d. Default: until revoked.", show_default=False
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Make an API token and print it, this once."""
    life = seconds(expires)
    with connect() as client:
        made = _post(
            client.transport,
            "/auth/tokens",
            {"name": name, "expires_in_seconds": None if life is None else round(life)},
        )
    if as_json:
        View("json").one(made)
    else:
        say(f"{made['id']}: keep it well, it is not shown again")
        sys.stdout.write(made["token"] + "\n")


def _tokens(transport: "Transport") -> list[dict[str, Any]]:
    from mcp_control.sdk.transport import Call

    found: list[dict[str, Any]] = transport.send(Call(path="/auth/tokens")).json()["items"]
    return found


@tokens_app.command("ls")
def tokens_ls(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List your API tokens."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(_tokens(client.transport), TOKEN_COLUMNS, limit=limit)


@tokens_app.command("revoke")
def tokens_revoke(id: Annotated[str, typer.Argument(metavar="ID", help="Id of a token, or the end of one.")]) -> None:
    """End an API token at once."""
    from urllib.parse import quote

    from mcp_control.sdk.transport import Call

    with connect() as client:
        found = whole_id("token", id, (one["id"] for one in _tokens(client.transport)))
        client.transport.send(Call(method="DELETE", path=f"/auth/tokens/{quote(found, safe='')}"))
    say(f"{found} is revoked")
