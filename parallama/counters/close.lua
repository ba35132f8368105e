-- The usage row of a call is stored: charges what was not charged yet, and forgets the call.
--
-- KEYS[1]  open
-- KEYS[2]  record
-- ARGV[1]  now, in seconds
-- ARGV[2]  tokens used
-- ARGV[3]  compute used, in milliseconds
-- ARGV[4]  money used, in billionths
-- ARGV[5]  seconds for which the call stays known: what repeats it comes soon or never
-- returns  1 if closed, 0 if that was done before, -1 if nothing is known of the call

local now = tonumber(ARGV[1])
local amounts = { t = tonumber(ARGV[2]), c = tonumber(ARGV[3]), m = tonumber(ARGV[4]) }
local record = call('GET', KEYS[2])
if not record then return -1 end
local state, held, _, rest = read(record)
if state == 'd' then return 0 end

for bucket, kind, amount, keep in string.gmatch(rest, HELD) do
  if kind == 'l' then
    call('ZREM', bucket, KEYS[2])
  else
    charge(bucket, tonumber(amount), amounts[kind], tonumber(keep) - now, state ~= 'x')
  end
end
call('ZREM', KEYS[1], KEYS[2])
call('SET', KEYS[2], 'd ' .. held .. ' -', 'EX', ARGV[5])
return 1
