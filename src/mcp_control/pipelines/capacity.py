"""How much room agents have for the stages of adaptive runs and fan-outs."""

from mcp_control.agents.matching import misfit
from mcp_control.agents.model import AgentState
from mcp_control.agents.service import AgentManager
from mcp_control.pipelines.forecast import demand_of
from mcp_control.pipelines.plan import Plan


class Capacity:
    """Looks at the agents this server knows of; those of other servers as their last beats told."""

    def __init__(self, manager: AgentManager) -> None:
        self._manager = manager

    def free(self, tenant: str, plan: Plan) -> dict[str, int]:
        """Return by stage how many more of its tasks agents could take now; adaptive stages alone are looked at."""
        there = [
            (agent, shown.free_slots)
            for agent in self._manager.registry.registered(tenant)
            for shown in (self._manager.view(agent),)
            if shown.state is AgentState.ONLINE and shown.free_slots
        ]
        found: dict[str, int] = {}
        for place in plan.adaptive:
            stage = plan.stages[place].stage
            demand = demand_of(stage)
            found[stage.id] = sum(free for agent, free in there if misfit(agent.id, agent.spec, demand) is None)
        return found
