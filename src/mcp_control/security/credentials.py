"""How agents prove who they are: one-time enrolment tokens, and the credential each agent gets for its own."""

import contextlib
from typing import Final

import msgspec

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Key, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, InvalidToken, field_error
from mcp_control.kernel.ids import IdSource
from mcp_control.security import opaque
from mcp_control.security.model import Actor
from mcp_control.security.policy import ENROLMENT, allow
from mcp_control.security.records import (
    CREDENTIAL_KIND,
    ENROLMENT_KIND,
    AgentCredential,
    Enrolment,
    to_credential,
    to_enrolment,
    to_entity,
)
from mcp_control.security.verified import VerifiedCache
from mcp_control.storage.ports import Store

MAX_ENROLMENT_SECONDS: Final = 600
MAX_USES: Final = 1000
_TRIES: Final = 10
_PAGE: Final = 500


class Credentials:
    """Enrolment tokens and agent credentials.

    Registering with an enrolment token is `redeem`, then register the agent with the actor it gives, then `issue`; when the
    registration is refused, `give_back`.
    """

    def __init__(self, store: Store, clock: Clock, ids: IdSource, verified: VerifiedCache) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._verified = verified

    async def create_enrolment(
        self, actor: Actor, *, ttl_seconds: int = MAX_ENROLMENT_SECONDS, uses: int = 1, name: str = ""
    ) -> tuple[Enrolment, str]:
        """Permit agents to enrol; returns the record and the token, which is shown this once.

        Args:
            actor: who permits it.
            ttl_seconds: 1 to 600.
            uses: how many agents it enrols, 1 to 1000.
            name: the one agent name it serves; empty for any.

        Raises:
            Invalid: `out-of-range`.
            Forbidden: the actor may not enrol agents.
        """
        allow(actor, "agents.enrol")
        if not 1 <= ttl_seconds <= MAX_ENROLMENT_SECONDS:
            raise field_error("#/ttl_seconds", "out-of-range", f"1 to {MAX_ENROLMENT_SECONDS} seconds")
        if not 1 <= uses <= MAX_USES:
            raise field_error("#/uses", "out-of-range", f"1 to {MAX_USES}")
        now = self._clock.now()
        secret = self._ids.secret()
        enrolment = Enrolment(
            id=self._ids.new(opaque.noun("mcpe")),
            version=1,
            tenant=actor.tenant,
            name=name,
            digest=opaque.digest(secret),
            created_at=now,
            created_by=actor.id,
            expires_at=now + ttl_seconds * 1000,
            uses_left=uses,
        )
        created = fact("enrolment.created", enrolment.id, actor.id, now, {"uses": uses}, tenant=actor.tenant)
        await self._apply(Change(writes=(to_entity(enrolment),), facts=(created,)))
        return enrolment, opaque.write("mcpe", enrolment.id, secret)

    async def redeem(self, token: str, agent_name: str) -> Actor:
        """Use an enrolment token up (by one) and return the actor that may register `agent_name`.

        However many use it at the same moment, it serves no more than it was made for.

        Raises:
            InvalidToken: it is unknown, expired, used up or for another name; the answer never says which.
        """
        presented = opaque.parse(token)
        if presented is None or presented.kind != "mcpe":
            raise InvalidToken
        for _ in range(_TRIES):
            (found,) = await self._store.get(ENROLMENT_KIND.name, [presented.id])
            enrolment = None if found is None else to_enrolment(found)
            right = opaque.same(presented.digest, enrolment.digest if enrolment else bytes(32))
            if (
                enrolment is None
                or not right
                or enrolment.uses_left < 1
                or self._clock.now() >= enrolment.expires_at
                or enrolment.name not in ("", agent_name)
            ):
                raise InvalidToken
            used = msgspec.structs.replace(enrolment, version=enrolment.version + 1, uses_left=enrolment.uses_left - 1)
            (problem,) = await self._store.commit([Change(writes=(to_entity(used),))])
            if problem is None:
                return Actor(
                    id=enrolment.id,
                    kind="agent",
                    tenant=enrolment.tenant,
                    display=agent_name,
                    roles=(ENROLMENT,),
                    credential=enrolment.id,
                    on_behalf_of=enrolment.created_by,
                    expires_at=enrolment.expires_at,
                )
            if not isinstance(problem, Conflict):
                raise problem
        raise Conflict("too many agents use this enrolment at once", retry_after=1)

    async def give_back(self, actor: Actor) -> None:
        """Return the use that `redeem` took, because the registration was refused and nothing came of it."""
        for _ in range(_TRIES):
            (found,) = await self._store.get(ENROLMENT_KIND.name, [actor.credential])
            if found is None:
                return
            enrolment = to_enrolment(found)
            whole = msgspec.structs.replace(enrolment, version=enrolment.version + 1, uses_left=enrolment.uses_left + 1)
            with contextlib.suppress(Conflict):
                await self._apply(Change(writes=(to_entity(whole),)))
                return

    async def issue(self, actor: Actor, agent_id: str, name: str) -> str:
        """Give an agent a credential of its own and return it, this once. Earlier ones stay valid until they are revoked.

        The caller has registered the agent and decided that the actor may speak for it.
        """
        now = self._clock.now()
        secret = self._ids.secret()
        credential = AgentCredential(
            id=self._ids.new(opaque.noun("mcpa")),
            version=1,
            tenant=actor.tenant,
            agent_id=agent_id,
            name=name,
            digest=opaque.digest(secret),
            created_at=now,
            created_by=actor.on_behalf_of or actor.id,
        )
        issued = fact("credential.issued", agent_id, actor.id, now, {"credential": credential.id}, tenant=actor.tenant)
        await self._apply(Change(writes=(to_entity(credential),), facts=(issued,)))
        return opaque.write("mcpa", credential.id, secret)

    async def revoke_agent(self, actor: Actor, agent_id: str) -> int:
        """End all credentials of an agent, as when it retires; returns how many there were."""
        allow(actor, "agents.retire", agent_id)
        revoked = 0
        for _ in range(_TRIES):
            found = await self._store.find(
                CREDENTIAL_KIND.name, Query(where=(Where("agent", "eq", agent_id),), limit=_PAGE)
            )
            if not found:
                break
            now = self._clock.now()
            changes = []
            for credential in map(to_credential, found):
                ended = msgspec.structs.replace(credential, version=credential.version + 1, revoked_at=now)
                about = fact(
                    "credential.revoked", agent_id, actor.id, now, {"credential": credential.id}, tenant=actor.tenant
                )
                changes.append(Change(writes=(to_entity(ended),), facts=(about,)))
            for problem in await self._store.commit(changes):
                if problem is None:
                    revoked += 1
                elif not isinstance(problem, Conflict):
                    raise problem
        self._verified.forget(agent_id)
        return revoked

    async def once(self, now: int) -> int:
        """Remove enrolments that ended; returns how many."""
        ended = Query(where=(Where("expires", "lt", now),), order="expires", limit=_PAGE)
        found = await self._store.find(ENROLMENT_KIND.name, ended)
        outcomes = await self._store.commit(
            [Change(deletes=(Key(ENROLMENT_KIND.name, entity.id),)) for entity in found]
        )
        return sum(problem is None for problem in outcomes)

    async def _apply(self, change: Change) -> None:
        (problem,) = await self._store.commit([change])
        if problem is not None:
            raise problem
