"""Settings: one tree, from defaults, a file, the environment and flags; each value knows where it came from."""
