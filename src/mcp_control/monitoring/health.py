"""Health: is the process alive, may it get traffic, and which part ails.

Live means the event loop answers; a server that waits for its disk is alive, and killing it would help nobody. Ready means that
every critical check passes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

HealthState = Literal["ok", "degraded", "failed"]
_WORST: Final[dict[HealthState, int]] = {"ok": 0, "degraded": 1, "failed": 2}


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the server as a check saw it. `detail` holds no secret: the view is shown without login."""

    name: str
    state: HealthState
    detail: str = ""


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole and its parts; the whole is as bad as its worst critical part, and at most degraded by the others."""

    state: HealthState
    components: list[Component]

    @property
    def ready(self) -> bool:
        """Whether traffic should come here."""
        return self.state != "failed"


class Finding(msgspec.Struct, frozen=True):
    """What a check returns."""

    state: HealthState
    detail: str = ""


OK: Final = Finding("ok")
Check = Callable[[], Awaitable[Finding]]


class Health:
    """Runs the checks that the composition root adds.

    Args:
        timeout: seconds one check may take; a check that takes longer has failed.
    """

    def __init__(self, timeout: float = 2.0) -> None:
        self._timeout = timeout
        self._checks: dict[str, tuple[Check, bool]] = {}
        self._stopping = False

    def add(self, name: str, check: Check, *, critical: bool = True) -> None:
        """Add a check. Raises ValueError when the name is taken."""
        if name in self._checks:
            raise ValueError(f"a check named {name} exists")
        self._checks[name] = (check, critical)

    def stopping(self) -> None:
        """Say not ready from now on, so that traffic goes elsewhere before the doors close."""
        self._stopping = True

    async def report(self) -> HealthReport:
        """Run all checks at once and return what they found."""
        found = await asyncio.gather(*[self._one(name, check) for name, (check, _) in self._checks.items()])
        worst: HealthState = "failed" if self._stopping else "ok"
        for component in found:
            critical = self._checks[component.name][1]
            state: HealthState = component.state if critical or component.state == "ok" else "degraded"
            worst = max(worst, state, key=_WORST.__getitem__)
        components = list(found)
        if self._stopping:
            components.append(Component(name="server", state="failed", detail="stopping"))
        return HealthReport(state=worst, components=components)

    async def _one(self, name: str, check: Check) -> Component:
        try:
            async with asyncio.timeout(self._timeout):
                finding = await check()
        except TimeoutError:
            return Component(name=name, state="failed", detail=f"no answer within {self._timeout:g} s")
        except Exception as error:  # a check that breaks is a part that ails, not a broken health view
            return Component(name=name, state="failed", detail=type(error).__name__)
        return Component(name=name, state=finding.state, detail=finding.detail)
