-- Say that everything that waits is here again, unless something was lost since that refill began.
-- KEYS: the mark, the refill under way. ARGV: the token of this refill, the value of the mark.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2])
return 1
