"""A tether from parent to child process: the child ends when the parent is gone, however it went, kill -9 included.

The child holds the read end of a pipe whose only write end is the parent's; nothing is ever written, so the end of the parent is the end
of the file. On Linux the kernel's parent-death signal does the same a moment earlier.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

VARIABLE: Final = "MCP_CONTROL_TETHER_FD"
_PR_SET_PDEATHSIG: Final = 1
_SECOND_AFTER: Final = 1.0
_KILL_AFTER: Final = 4.0
# What a child has no use for, and must not know.
_KEPT_BACK: Final = (
    "JWT_SECRET",
    "MONGODB_URI",
    "REDIS_URL",
    "MCP_CONTROL_MONGO__URI",
    "MCP_CONTROL_REDIS__URL",
    "MCP_CONTROL_TOKEN",
    "MCP_CONTROL_SECURITY__JWT_SECRET",
    VARIABLE,
)


class Tether:
    """The parent's side. Children are started with `pass_fds=(tether.fd,)` and the environment of `environ`."""

    def __init__(self) -> None:
        self.fd, self._held = os.pipe()
        self._cut = False

    def environ(self, **more: str) -> dict[str, str]:
        """Return the environment for a child: ours without secrets, and the tether."""
        kept = {name: value for name, value in os.environ.items() if name not in _KEPT_BACK}
        return {**kept, VARIABLE: str(self.fd), **more}

    def cut(self) -> None:
        """Let go: children that still live end."""
        if not self._cut:
            self._cut = True
            os.close(self.fd)
            os.close(self._held)


def hold(environ: Mapping[str, str] | None = None) -> None:
    """In a child: end when the parent is gone. Does nothing in a process that was started by itself.

    First as if it was told to end (SIGTERM), a second later without patience, then at once.
    """
    given = os.environ if environ is None else environ
    if not given.get(VARIABLE, "").isdigit():
        return
    fd = int(given[VARIABLE])
    os.environ.pop(VARIABLE, None)
    os.set_inheritable(fd, False)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    threading.Thread(target=_watch, args=(fd,), name="tether", daemon=True).start()


def _watch(fd: int) -> None:
    with suppress(OSError):
        while os.read(fd, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECOND_AFTER)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_KILL_AFTER)
    if os.getsid(0) == os.getpid():  # we lead a session of our own: take what we started along
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
