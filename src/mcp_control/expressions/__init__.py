"""Expressions that people write in definitions and rules."""
