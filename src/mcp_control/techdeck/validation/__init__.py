"""Stage 3: tiers of checks over conversations (structure, content, privacy, bias), redaction and additive counts."""
