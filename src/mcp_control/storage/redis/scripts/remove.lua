-- Remove entries from a lane; those that are not there are ignored.
-- KEYS: as in push.lua. ARGV: MessagePack of the ids.
local ids = cmsgpack.unpack(ARGV[1])
for first = 1, #ids, 1000 do
  local some = {unpack(ids, first, math.min(first + 999, #ids))}
  local members = {}
  for n, order in ipairs(redis.call('HMGET', KEYS[2], unpack(some))) do
    if order then
      members[#members + 1] = order .. some[n]
    end
  end
  if #members > 0 then
    redis.call('ZREM', KEYS[1], unpack(members))
    redis.call('HDEL', KEYS[2], unpack(some))
  end
end
return 1
