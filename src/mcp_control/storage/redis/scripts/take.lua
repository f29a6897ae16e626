-- Remove and return the first entries of a lane whose rank is low enough.
-- KEYS: as in push.lua. ARGV: how many at most, the highest rank.
-- Returns MessagePack of [id, rank, id, rank, ...]; an empty string when there is none.
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[1])
local count = #found / 2
if count == 0 then
  return ''
end
-- They are the first of the whole line, whatever the highest rank.
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, count - 1)
return cmsgpack.pack(found)
