-- Add entries to a lane; one that is already there is replaced.
-- KEYS: the line (sorted set: priority negated -> order in 16 hexadecimal digits .. id), the places (hash: id -> order).
-- ARGV: MessagePack of [score, order, id, score, order, id, ...], each id once.
local entries = cmsgpack.unpack(ARGV[1])
for first = 1, #entries, 1500 do
  local last = math.min(first + 1499, #entries)
  local ids, adds, places = {}, {}, {}
  for at = first, last, 3 do
    ids[#ids + 1] = entries[at + 2]
  end
  local before = redis.call('HMGET', KEYS[2], unpack(ids))
  local gone = {}
  for n, order in ipairs(before) do
    if order then
      gone[#gone + 1] = order .. ids[n]
    end
  end
  if #gone > 0 then
    redis.call('ZREM', KEYS[1], unpack(gone))
  end
  for at = first, last, 3 do
    adds[#adds + 1] = entries[at]
    adds[#adds + 1] = entries[at + 1] .. entries[at + 2]
    places[#places + 1] = entries[at + 2]
    places[#places + 1] = entries[at + 1]
  end
  redis.call('ZADD', KEYS[1], unpack(adds))
  redis.call('HSET', KEYS[2], unpack(places))
end
return 1
