"""Facts: what happened, in one order, for everybody who wants to know."""
