-- Return how many entries of a lane come before this one; nil when it is not there.
-- KEYS: as in push.lua. ARGV: its id.
local order = redis.call('HGET', KEYS[2], ARGV[1])
return order and redis.call('ZRANK', KEYS[1], order .. ARGV[1])
