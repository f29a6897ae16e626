"""The connection of an agent to the server: what the session needs of it, and the WebSocket that normally is it."""

import asyncio
from typing import Final, Protocol, Self

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from mcp_control.sdk.errors import SdkError
from mcp_control.tasks.wire import AgentFrame, Hello, ServerFrame, Trouble, Welcome, decode_server_frame, encode_frame

MAX_FRAME: Final = 64 << 20  # the server may send many tasks at once; it is trusted not to be hostile
HELLO_SECONDS: Final = 10.0
SUPERSEDED: Final = 4409  # close code: this instance is over, or has a newer connection


class LinkLost(SdkError):
    """The connection is gone. `code` is the WebSocket close code, 0 where there was none."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class LinkRefused(SdkError):
    """The server answered and did not open a session.

    Attributes:
        status: HTTP status, 0 when the refusal came in a frame.
        code: the problem's code.
        retry_after: seconds to wait, None where the server did not say.
    """

    def __init__(self, status: int, code: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class Link(Protocol):
    """An open session. Every method raises LinkLost once the connection is gone."""

    @property
    def welcome(self) -> Welcome:
        """What the server said when it opened the session."""
        ...

    async def send(self, frame: AgentFrame) -> None:
        """Hand over a frame."""
        ...

    async def receive(self) -> ServerFrame:
        """Return the next frame."""
        ...

    async def close(self) -> None:
        """Close the connection; never raises."""
        ...


class SocketLink:
    """The agent protocol over `/ws/agent`."""

    def __init__(self, connection: ClientConnection, welcome: Welcome) -> None:
        self._connection = connection
        self.welcome = welcome

    @classmethod
    async def open(cls, url: str, credential: str, hello: Hello) -> Self:
        """Connect and exchange hello and welcome. Raises LinkRefused, LinkLost."""
        target = "ws" + url.removeprefix("http") + "/ws/agent"
        try:
            connection = await connect(
                target,
                additional_headers={"Authorization": f"Bearer {credential}"},
                compression=None,  # frames are small or already dense, and latency counts
                max_size=MAX_FRAME,
                ping_interval=None,  # heartbeats say more
                open_timeout=HELLO_SECONDS,
                close_timeout=2,
            )
        except InvalidStatus as error:
            response = error.response
            code, detail = _problem(response.body)
            raise LinkRefused(
                response.status_code, code, detail, _seconds(response.headers.get("Retry-After"))
            ) from error
        except (InvalidHandshake, InvalidURI) as error:
            if isinstance(error.__cause__, (EOFError, OSError)):
                # It ended before an answer came, as when a server dies; that says nothing against sockets.
                raise LinkLost(f"cannot connect to {url}: {error}") from error
            raise LinkRefused(400, "no-upgrade", str(error)) from error
        except (OSError, EOFError, TimeoutError, WebSocketException) as error:
            raise LinkLost(f"cannot connect to {url}: {str(error) or type(error).__name__}") from error
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await connection.send(encode_frame(hello), text=True)
                frame = decode_server_frame(await connection.recv(decode=False))
        except (ConnectionClosed, TimeoutError, msgspec.MsgspecError) as error:
            await connection.close()
            raise _lost(error) from error
        if isinstance(frame, Welcome):
            return cls(connection, frame)
        await connection.close()
        if isinstance(frame, Trouble):
            raise LinkRefused(0, frame.code, frame.detail)
        raise LinkLost("the server did not begin with a welcome")

    async def send(self, frame: AgentFrame) -> None:
        """Send a frame."""
        try:
            await self._connection.send(encode_frame(frame), text=True)
        except ConnectionClosed as error:
            raise _lost(error) from error

    async def receive(self) -> ServerFrame:
        """Return the next frame."""
        try:
            frame: ServerFrame = decode_server_frame(await self._connection.recv(decode=False))
            return frame
        except (ConnectionClosed, msgspec.MsgspecError) as error:
            raise _lost(error) from error

    async def close(self) -> None:
        """Close the socket; a server that does not answer is not waited for longer than two seconds."""
        await self._connection.close()


def _lost(error: Exception) -> LinkLost:
    if isinstance(error, ConnectionClosed):
        received = error.rcvd
        return LinkLost(
            f"connection closed: {received.reason if received else 'no close frame'}", received.code if received else 0
        )
    return LinkLost(f"unreadable frame or no answer: {str(error) or type(error).__name__}")


def _problem(body: bytes | bytearray | memoryview | None) -> tuple[str, str]:
    try:
        document = msgspec.json.decode(bytes(body or b""), type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return "refused", ""
    return str(document.get("code", "refused")), str(document.get("detail", ""))


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
