"""Agents: who can do what, who is there, and who is free."""
