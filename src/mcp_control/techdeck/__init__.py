"""techdeck: six deterministic stages that turn a file of conversations into checked, scored, exported data."""
