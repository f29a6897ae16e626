-- Add to a counter that lives from its first addition. KEYS: the counter. ARGV: the amount, milliseconds to live.
local total = redis.call('INCRBY', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return total
