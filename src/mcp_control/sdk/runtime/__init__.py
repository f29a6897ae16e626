"""The agent runtime: session with the server, work in hand, and the outbox between them."""
