"""Artifacts: named, content-addressed data that travels between stages and out to people."""
