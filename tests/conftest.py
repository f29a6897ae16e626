"""Fixtures for all tests: real databases, started when the first test asks for them."""

from mcp_control.testing.databases import mongo_set, mongo_uri, redis_server, redis_url, shared_redis

__all__ = ["mongo_set", "mongo_uri", "redis_server", "redis_url", "shared_redis"]
