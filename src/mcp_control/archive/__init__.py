"""Stores and runs as files: backups, restores, moves between stores, bundles of single runs."""
