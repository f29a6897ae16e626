"""Tasks: durable units of work, from submission to one final result."""
