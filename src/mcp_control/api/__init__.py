"""The doors: REST, WebSocket and event streams over the services. Translates, and decides nothing that a service should decide."""
