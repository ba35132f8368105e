-- The usage row of a call is stored: charges what was not charged yet, corrects the tokens
-- that settling charged, and forgets the call.
--
-- KEYS[1]  open
-- KEYS[2]  record
-- KEYS[3]  known
-- KEYS[4]  counted
-- ARGV[1]  now, in seconds
-- ARGV[2]  tokens used
-- ARGV[3]  compute used, in milliseconds
-- ARGV[4]  money used, in billionths
-- ARGV[5]  seconds for which the call stays known: what repeats it comes soon or never
-- ARGV[6]  when it began, in seconds
-- ARGV[7]  facts, or nothing: to be kept if the call is in no bucket, so that it is put there
-- returns  1 if closed, 0 if that was done before, -1 if nothing is known of the call, -2 if it is
--          in no bucket either, and should be

local now = tonumber(ARGV[1])
local amounts = { t = tonumber(ARGV[2]), c = tonumber(ARGV[3]), m = tonumber(ARGV[4]) }
local record = call('GET', KEYS[2])
local since = tonumber(call('GET', KEYS[3]) or nil)
local on_its_way = was_on_its_way(since, tonumber(ARGV[6]), now)
if not record then
  if not on_its_way or call('SISMEMBER', KEYS[4], KEYS[2]) == 1 then return -1 end
  if ARGV[7] == '' then return -2 end
  call('SET', KEYS[2], 'r 0 ' .. ARGV[2] .. '|' .. ARGV[7], 'EX', STAYS)
  call('ZADD', KEYS[1], now, KEYS[2])
  return 1
end
local state, held, _, rest = read(record)
if state == 'd' or state == 'r' then return 0 end

for bucket, kind, amount, keep in string.gmatch(rest, HELD) do
  if kind == 'l' then
    call('ZREM', bucket, KEYS[2])
  elseif kind == string.upper(kind) then
    correct(bucket, tonumber(amount), amounts[string.lower(kind)])
  else
    charge(bucket, tonumber(amount), amounts[kind], tonumber(keep) - now, state ~= 'x')
  end
end
call('ZREM', KEYS[1], KEYS[2])
call('SET', KEYS[2], 'd ' .. held .. ' -', 'EX', ARGV[5])
if on_its_way then note_counted(KEYS[4], KEYS[2]) end
return 1
