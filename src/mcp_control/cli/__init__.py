"""The command line, `mcpctl`: one module per noun, each importing what it needs when it is called."""
