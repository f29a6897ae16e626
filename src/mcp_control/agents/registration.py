"""Checks of what an agent says of itself, and its states: pure."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from packaging.version import InvalidVersion, Version

from mcp_control.agents.model import MAX_CAPABILITIES, Agent, AgentSpec, AgentState
from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.kernel.text import label_errors, name_errors, range_errors, text_errors

S = AgentState

TRANSITIONS: Final[Mapping[str, Mapping[AgentState, tuple[AgentState, ...]]]] = MappingProxyType(
    {
        "connect": {S.OFFLINE: (S.ONLINE,), S.DRAINING: (S.ONLINE,)},
        "fill": {S.ONLINE: (S.BUSY,)},
        "free": {S.BUSY: (S.ONLINE,)},
        "stall": {S.ONLINE: (S.STALLED,), S.BUSY: (S.STALLED,)},
        "recover": {S.STALLED: (S.ONLINE, S.BUSY)},
        "disconnect": dict.fromkeys((S.ONLINE, S.BUSY, S.STALLED, S.DRAINING), (S.OFFLINE,)),
        "drain": dict.fromkeys((S.ONLINE, S.BUSY, S.STALLED, S.OFFLINE), (S.DRAINING,)),
        "quarantine": dict.fromkeys((S.ONLINE, S.BUSY, S.STALLED, S.OFFLINE, S.DRAINING), (S.QUARANTINED,)),
        "resume": dict.fromkeys((S.DRAINING, S.QUARANTINED), (S.ONLINE, S.BUSY, S.OFFLINE)),
        "retire": dict.fromkeys((S.ONLINE, S.BUSY, S.STALLED, S.OFFLINE, S.DRAINING, S.QUARANTINED), (S.RETIRED,)),
    }
)
"""verb -> state it starts from -> states it may end in. An agent begins `offline`; `retired` is final."""


def settle(agent: Agent, *, live: bool, free: int, stalled: bool, leaving: bool = False) -> AgentState:
    """Return the state an agent is in, from what operators ordered and what its instances do.

    Orders win over observations: retired, quarantined, draining; then offline without a live instance, draining where all of them
    are `leaving`, stalled, busy, online.
    """
    if agent.retired_at is not None:
        return S.RETIRED
    if agent.quarantine is not None:
        return S.QUARANTINED
    if agent.drain is not None:
        return S.DRAINING
    if not live:
        return S.OFFLINE
    if leaving:
        return S.DRAINING
    if stalled:
        return S.STALLED
    return S.ONLINE if free > 0 else S.BUSY


def check(spec: AgentSpec) -> None:
    """Raise Invalid with everything that is wrong with a registration."""
    found = name_errors("#/name", spec.name)
    if len(spec.capabilities) > MAX_CAPABILITIES:
        found.append(
            FieldError(
                pointer="#/capabilities", code="limit-exceeded", detail=f"at most {MAX_CAPABILITIES} capabilities"
            )
        )
    else:
        found += _capability_errors(spec)
    found += label_errors("#/labels", spec.labels)
    found += label_errors("#/endpoints", spec.endpoints)
    found += range_errors("#/slots", spec.slots, 1, 10_000)
    found += range_errors("#/lease_seconds", spec.lease_seconds, 2, 3600)
    for name, value in (
        ("cpu", spec.resources.cpu),
        ("memory_mb", spec.resources.memory_mb),
        ("gpu", spec.resources.gpu),
    ):
        found += range_errors(f"#/resources/{name}", value, 0, 1e9)
    for name, text, longest in (
        ("description", spec.description, 2000),
        ("version", spec.version, 64),
        ("owner", spec.owner, 128),
    ):
        found += text_errors(f"#/{name}", text, longest)
    if found:
        raise Invalid(found[0].detail, errors=found[:50])


def _capability_errors(spec: AgentSpec) -> list[FieldError]:
    found: list[FieldError] = []
    seen: set[str] = set()
    for place, capability in enumerate(spec.capabilities):
        pointer = f"#/capabilities/{place}"
        found += name_errors(f"{pointer}/name", capability.name)
        found += text_errors(f"{pointer}/description", capability.description, 2000)
        if capability.limit is not None:
            found += range_errors(f"{pointer}/limit", capability.limit, 1, 10_000)
        if capability.name in seen:
            found.append(
                FieldError(pointer=f"{pointer}/name", code="duplicate", detail="this capability is named twice")
            )
        seen.add(capability.name)
        try:
            Version(capability.version)
        except InvalidVersion:
            found.append(
                FieldError(
                    pointer=f"{pointer}/version",
                    code="invalid-version",
                    detail="a version is a number such as 1 or 2.4.1",
                )
            )
    return found
