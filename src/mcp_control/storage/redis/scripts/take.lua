-- Remove and return the first entries of a lane that are urgent enough.
-- KEYS: as in push.lua. ARGV: how many at most, the negated lowest priority.
-- Returns MessagePack of [member, score, member, score, ...]; an empty string when there is none.
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[1])
local count = #found / 2
if count == 0 then
  return ''
end
for first = 1, count, 1000 do
  local ids = {}
  for n = first, math.min(first + 999, count) do
    ids[#ids + 1] = string.sub(found[2 * n - 1], 17)
  end
  redis.call('HDEL', KEYS[2], unpack(ids))
end
-- They are the first of the whole line: the lowest scores come first, whatever the floor.
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, count - 1)
return cmsgpack.pack(found)
