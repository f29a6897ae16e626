"""Conversation formats: how each is recognised and mapped. Pure rules over one decoded record."""
