"""Everything the product keeps in its store."""

from typing import Final

from mcp_control.agents.model import AGENT_KIND, INSTANCE_KIND
from mcp_control.artifacts.service import KINDS as ARTIFACT_KINDS
from mcp_control.coordination.model import KINDS as COORDINATION_KINDS
from mcp_control.pipelines.input_model import APPROVAL_KIND
from mcp_control.pipelines.model import PIPELINE_KIND, RUN_KIND
from mcp_control.pipelines.result_model import STAGE_RESULT_KIND
from mcp_control.pipelines.schedule_model import KINDS as SCHEDULE_KINDS
from mcp_control.security.records import KINDS as SECURITY_KINDS
from mcp_control.tasks.budget_model import BUDGET_KIND
from mcp_control.tasks.group_model import GROUP_KIND
from mcp_control.tasks.limit_model import KINDS as LIMIT_KINDS
from mcp_control.tasks.model import GENERATION_KIND, LOG_KIND, TASK_KIND
from mcp_control.tasks.operation_model import OPERATION_KIND
from mcp_control.tasks.share_model import SHARE_KIND
from mcp_control.tasks.statistics import STATISTIC_KIND

KINDS: Final = (
    AGENT_KIND,
    INSTANCE_KIND,
    TASK_KIND,
    LOG_KIND,
    BUDGET_KIND,
    OPERATION_KIND,
    GROUP_KIND,
    GENERATION_KIND,
    PIPELINE_KIND,
    RUN_KIND,
    APPROVAL_KIND,
    STAGE_RESULT_KIND,
    STATISTIC_KIND,
    SHARE_KIND,
    *LIMIT_KINDS,
    *SCHEDULE_KINDS,
    *ARTIFACT_KINDS,
    *COORDINATION_KINDS,
    *SECURITY_KINDS,
)
