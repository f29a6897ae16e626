"""How an agent gets and keeps its own credential: enrol once with a one-time token, then use what is stored."""

import msgspec
import structlog

from mcp_control.agents.model import AgentSpec
from mcp_control.sdk.errors import AccessDenied, NotNow, Unreachable
from mcp_control.sdk.profiles import Profile, Profiles
from mcp_control.sdk.runtime.links import LinkLost, LinkRefused
from mcp_control.sdk.transport import AsyncTransport, Call

log = structlog.get_logger("mcp_control.agent")


class _Registered(msgspec.Struct, frozen=True, kw_only=True):
    credential: str | None = None
    resumed: bool = False


class Enrolment:
    """The credential of one agent at one server."""

    def __init__(self, profiles: Profiles, profile: Profile, spec: AgentSpec) -> None:
        self._profiles = profiles
        self._profile = profile
        self._spec = spec
        self.credential = profiles.agent_credential(profile.url, spec.name)

    async def ensure(self) -> str:
        """Return the credential, enrolling when there is none. Raises LinkRefused, LinkLost."""
        return self.credential or await self._register()

    async def renew(self) -> str:
        """Enrol again: the credential was refused, or another process may have stored a newer one. Raises LinkRefused, LinkLost."""
        stored = self._profiles.agent_credential(self._profile.url, self._spec.name)
        if stored and stored != self.credential:
            self.credential = stored
            return stored
        return await self._register()

    async def _register(self) -> str:
        token = self._profiles.enrolment_token() or self._profile.token
        if not token:
            raise LinkRefused(
                401,
                "unauthenticated",
                "this agent has no credential; set MCP_CONTROL_ENROLMENT_TOKEN (mcpctl agents enrol makes one)",
            )
        http = AsyncTransport(self._profile.url, token, retry=False)
        try:
            call = Call(method="POST", path="/agents/register", body=msgspec.json.encode(self._spec))
            registered: _Registered = (await http.send(call)).json(_Registered)
        except NotNow as problem:
            raise LinkRefused(problem.status, problem.code, problem.detail, problem.retry_after) from problem
        except AccessDenied as problem:
            raise LinkRefused(problem.status, problem.code, problem.detail) from problem
        except Unreachable as error:
            raise LinkLost(str(error)) from error
        finally:
            await http.close()
        if not registered.credential:
            # Another process of this agent may have enrolled a moment ago.
            if self.credential != (stored := self._profiles.agent_credential(self._profile.url, self._spec.name)):
                self.credential = stored
                return stored
            raise LinkRefused(
                401, "name-taken", "the server knows this name and gave no new credential; enrol with a one-time token"
            )
        self.credential = registered.credential
        self._profiles.save_agent_credential(self._profile.url, self._spec.name, registered.credential)
        log.info("agent.enrolled", agent=self._spec.name, resumed=registered.resumed)
        return self.credential
