-- Add entries to a lane; one that is already there is replaced.
-- KEYS: the line (sorted set: rank -> id). ARGV: MessagePack of [rank, id, rank, id, ...], each id once.
local entries = cmsgpack.unpack(ARGV[1])
for first = 1, #entries, 1000 do
  redis.call('ZADD', KEYS[1], unpack(entries, first, math.min(first + 999, #entries)))
end
return 1
