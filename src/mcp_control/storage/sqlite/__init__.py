"""The store on SQLite: one file, one writer, group commit (docs/decisions/0001-group-commit.md)."""
