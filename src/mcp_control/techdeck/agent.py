"""The agent that does techdeck's tasks: `mcpctl agents start mcp_control.techdeck.agent:agent`.

Every task runs in a process of its own, which loads the data libraries when the first task arrives; the agent process
stays light and answers the server at once.
"""

from mcp_control.sdk.agent import Agent
from mcp_control.sdk.context import SyncContext
from mcp_control.techdeck.payloads import (
    CombineIn,
    ExportIn,
    ExportOut,
    IngestionIn,
    IngestionOut,
    PartIn,
    PartOut,
    ProcessingOut,
    QualityIn,
    QualityOut,
    StageOut,
)

TIMEOUT = 3600.0

agent = Agent("techdeck", description="Reads, checks, enriches, judges and exports conversation data.")


@agent.task("techdeck.ingestion", executor="process", timeout=TIMEOUT)
def ingestion(payload: IngestionIn, ctx: SyncContext) -> IngestionOut:
    """Read a file of any supported container, encoding and compression into raw partitions."""
    from mcp_control.techdeck import handlers  # the data libraries load in the worker process only

    return handlers.ingestion(payload, ctx)


@agent.task("techdeck.standardization", executor="process", timeout=TIMEOUT)
def standardization(payload: PartIn, ctx: SyncContext) -> PartOut:
    """Bring the records of a partition into one conversation schema."""
    from mcp_control.techdeck import handlers

    return handlers.standardization(payload, ctx)


@agent.task("techdeck.standardization.combine", executor="process", timeout=TIMEOUT)
def standardization_combine(payload: CombineIn, ctx: SyncContext) -> StageOut:
    """Add up what became of the raw partitions."""
    from mcp_control.techdeck import handlers

    return handlers.gather(payload, ctx)


@agent.task("techdeck.validation", executor="process", timeout=TIMEOUT)
def validation(payload: PartIn, ctx: SyncContext) -> PartOut:
    """Check structure, content, privacy and bias of a partition, and redact it."""
    from mcp_control.techdeck import handlers

    return handlers.validation(payload, ctx)


@agent.task("techdeck.validation.combine", executor="process", timeout=TIMEOUT)
def validation_combine(payload: CombineIn, ctx: SyncContext) -> StageOut:
    """Judge the checks over all partitions."""
    from mcp_control.techdeck import handlers

    return handlers.gather(payload, ctx)


@agent.task("techdeck.processing", executor="process", timeout=TIMEOUT)
def processing(payload: PartIn, ctx: SyncContext) -> PartOut:
    """Measure the conversations of a partition."""
    from mcp_control.techdeck import handlers

    return handlers.processing(payload, ctx)


@agent.task("techdeck.processing.combine", executor="process", timeout=TIMEOUT)
def processing_combine(payload: CombineIn, ctx: SyncContext) -> ProcessingOut:
    """Find duplicates over all partitions and divide the data into splits."""
    from mcp_control.techdeck import handlers

    return handlers.processing_combine(payload, ctx)


@agent.task("techdeck.quality_assessment", executor="process", timeout=TIMEOUT)
def quality_assessment(payload: QualityIn, ctx: SyncContext) -> QualityOut:
    """Score the data set, judge the gates and write the report."""
    from mcp_control.techdeck import handlers

    return handlers.quality_assessment(payload, ctx)


@agent.task("techdeck.export", executor="process", timeout=TIMEOUT)
def export(payload: ExportIn, ctx: SyncContext) -> ExportOut:
    """Write the data set in the wanted format and container, with manifest and data card."""
    from mcp_control.techdeck import handlers

    return handlers.export(payload, ctx)


if __name__ == "__main__":
    agent.run()
