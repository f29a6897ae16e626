"""What both sockets do with what comes in: who it is, from which page, and whether a frame can be read."""

from typing import Final

import msgspec

from mcp_control.api.call import Receive, Scope
from mcp_control.api.decode import MAX_DEPTH, check_json
from mcp_control.api.services import Services
from mcp_control.kernel.errors import Forbidden, MalformedJson, Unauthenticated
from mcp_control.kernel.shapes import field_errors
from mcp_control.security.model import Actor

PROBLEMS_MAX: Final = 10


class Gone(Exception):
    """The socket is over: left by the peer (code 0), or to be closed with a code."""

    def __init__(self, code: int = 0, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


async def authenticated(scope: Scope, services: Services) -> tuple[str, Actor]:
    """Return the Authorization header of a handshake and whom it stands for. Raises Unauthenticated, InvalidToken."""
    header = dict(scope["headers"]).get(b"authorization")
    if header is None:
        raise Unauthenticated
    text = header.decode("latin-1")
    return text, await services.authenticator.authenticate(text, services.clock.now())


def check_origin(scope: Scope, allowed: tuple[str, ...]) -> None:
    """Raise Forbidden where a browser page of another origin opens the socket; programs send no Origin."""
    for name, value in scope["headers"]:
        if name == b"origin" and value.decode("latin-1") not in allowed:
            raise Forbidden("this origin may not open a socket")


async def text_of(receive: Receive) -> str:
    """Return the next text frame. Raises Gone when the peer left, or with 1003 for a binary frame."""
    message = await receive()
    if message["type"] == "websocket.disconnect":
        raise Gone
    text: str | None = message.get("text")
    if text is None:
        raise Gone(1003, "text frames only")
    return text


def checked_json(raw: bytes, depth: int | None = MAX_DEPTH) -> None:
    """Raise Gone with 1007 for what is not JSON; TooDeep or Invalid for JSON that is not allowed here."""
    try:
        check_json(raw, depth)
    except MalformedJson:
        raise Gone(1007, "not JSON") from None


def frame_problem(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return code and detail for a frame that was not understood."""
    if str(error).endswith("`$.op`"):
        return "unknown-op", "no such op"
    found = field_errors(None, msgspec.Raw, error)[0]
    return found.code, f"{found.pointer}: {found.detail}"
