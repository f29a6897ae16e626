"""What the security tests share: a real store, cheap password hashes, a clock that is told the time."""

from pathlib import Path

from mcp_control.events.broadcaster import Broadcaster
from mcp_control.kernel.errors import Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.security.accounts import Accounts
from mcp_control.security.authenticator import Authenticator
from mcp_control.security.credentials import Credentials
from mcp_control.security.passwords import Passwords
from mcp_control.security.records import KINDS
from mcp_control.security.throttle import LoginThrottle
from mcp_control.security.tokens import AccessTokens
from mcp_control.security.verified import VerifiedCache
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock

GOOD = "correct horse battery staple"


def _fatal(problem: Problem) -> None:
    raise AssertionError(problem)


class Server:
    """The access part of one server. Several may share a store, as servers of one deployment do."""

    def __init__(self, store: SqliteStore, clock: FakeClock) -> None:
        self.store = store
        self.clock = clock
        self.ids = IdSource(clock)
        self.tokens = AccessTokens(bytes(range(32)))
        self.verified = VerifiedCache()
        self.throttle = LoginThrottle(store)
        self.accounts = Accounts(
            store, clock, self.ids, Passwords(memory_kib=64), self.tokens, self.throttle, self.verified
        )
        self.credentials = Credentials(store, clock, self.ids, self.verified)
        self.authenticator = Authenticator(store, self.tokens, self.verified)

    async def administrator(self) -> None:
        """Create the first administrator, with the password GOOD."""
        once = await self.accounts.ensure_administrator()
        assert once is not None
        await self.accounts.change_password("admin", once, GOOD, "127.0.0.1")


async def open_store(folder: Path) -> SqliteStore:
    """Return a store with the kinds of this component."""
    store = SqliteStore(folder, fatal=_fatal)
    await store.open(KINDS, Broadcaster(store).committed)
    return store
