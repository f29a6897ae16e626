"""The SDK: clients for programs that submit work, and the agent runtime for programs that do it."""
