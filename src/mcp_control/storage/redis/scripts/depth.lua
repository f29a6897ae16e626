-- Return [how many wait, id and rank of the first]; nil for an empty lane. KEYS: the line, as in push.lua.
local count = redis.call('ZCARD', KEYS[1])
if count == 0 then
  return false
end
local head = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {count, head[1], head[2]}
