"""Telling operators how the server does: metrics, logs, health."""
