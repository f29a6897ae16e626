"""Stage 3: tiers of checks over conversations (structure, content, privacy, bias), redaction and additive counts."""

from mcp_control.techdeck.validation.combine import CategoryBias, Finding, ValidationSummary, combine
from mcp_control.techdeck.validation.privacy import redact_quarantine, redact_text
from mcp_control.techdeck.validation.stage import Validated, validate

__all__ = [
    "CategoryBias",
    "Finding",
    "Validated",
    "ValidationSummary",
    "combine",
    "redact_quarantine",
    "redact_text",
    "validate",
]
