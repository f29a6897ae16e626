"""Stage 1, ingestion: containers, compression and encodings detected by content; records streamed into partitions."""

from mcp_control.techdeck.ingestion.again import only_rejected
from mcp_control.techdeck.ingestion.ingest import ingest

__all__ = ["ingest", "only_rejected"]
