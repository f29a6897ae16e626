-- Return [how many wait, score and member of the first, member of the one that waits longest]; nil for an empty lane.
-- KEYS: the line, as in push.lua. The cost is that of the different priorities in it.
local count = redis.call('ZCARD', KEYS[1])
if count == 0 then
  return false
end
local head = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local first, score = head[1], head[2]
local oldest, here = first, score
while true do
  local next = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. here, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if #next == 0 then
    return {count, score, first, oldest}
  end
  if string.sub(next[1], 1, 16) < string.sub(oldest, 1, 16) then
    oldest = next[1]
  end
  here = next[2]
end
