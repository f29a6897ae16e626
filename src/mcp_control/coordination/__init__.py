"""What several servers on one store agree on: which are there, which of them leads, and what time it is."""
