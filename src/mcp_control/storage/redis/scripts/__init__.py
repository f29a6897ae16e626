"""The steps that have to be one step, as Lua scripts that Redis keeps by their digest."""
