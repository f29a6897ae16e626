"""Queue, bus and cache that several servers share on Redis. All of it can be rebuilt; losing it costs time only."""
