"""Who may do what: deny by default, decided in one place for every door.

An action is `noun.verb` (`tasks.submit`, `agents.drain`). First layer: an administrator may do everything in the tenant; an agent
may do its own work, on itself, and use artifacts; an enrolment may register one agent and nothing else.
"""

from typing import Final

from mcp_control.kernel.errors import Forbidden
from mcp_control.security.model import Actor

ADMINISTRATOR: Final = "administrator"
AGENT: Final = "agent"
ENROLMENT: Final = "enrolment"
_EVERYTHING: Final = frozenset({ADMINISTRATOR, "system"})

# What an agent does with itself; the resource is its own id.
_AGENT_ITSELF: Final = frozenset(
    {
        "agents.register",
        "agents.get",
        "agents.session",
        "agents.heartbeat",
        "agents.drain",
        "tasks.claim",
        "tasks.report",
    }
)
# What an agent needs for its tasks. Which artifacts it may write for a task, and whether it may submit a child of it, is decided by the
# lease it presents.
_AGENT_ANY: Final = frozenset(
    {"artifacts.create", "artifacts.get", "artifacts.list", "artifacts.read", "auth.me", "tasks.submit_child"}
)


def allow(actor: Actor, action: str, resource: str | None = None) -> None:
    """Let the actor pass, or not.

    Args:
        actor: who wants to.
        action: `noun.verb`.
        resource: id of the thing acted on, None where the action is about none in particular.

    Raises:
        Forbidden: the actor may not do this.
    """
    for role in actor.roles:
        if role in _EVERYTHING:
            return
        if (
            role == AGENT
            and actor.kind == "agent"
            and (action in _AGENT_ANY or (action in _AGENT_ITSELF and resource == actor.id))
        ):
            return
        if role == ENROLMENT and action == "agents.register" and resource is None:
            return
    raise Forbidden(f"{action} is not allowed for this account")
