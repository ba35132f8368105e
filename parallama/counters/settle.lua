-- The answer has ended: charges its tokens, once, in the windows in which they were held. Never
-- refuses. Compute and money stay held until the usage row says what they were; where it says other
-- tokens than these, it corrects them.
--
-- KEYS[1]  open
-- KEYS[2]  record
-- ARGV[1]  now, in seconds
-- ARGV[2]  tokens used
-- ARGV[3]  seconds that its row may take
-- returns  1 if charged, 0 if that was done before, -1 if nothing is known of the call

local now, used = tonumber(ARGV[1]), tonumber(ARGV[2])
local record = call('GET', KEYS[2])
if not record then return -1 end
local state, held, before, rest, facts = read(record)
if before or state == 'd' then return 0 end

local left = {}
for bucket, kind, amount, keep in string.gmatch(rest, HELD) do
  if kind == 't' then
    charge(bucket, tonumber(amount), used, tonumber(keep) - now, state == 'o')
    left[#left + 1] = ' ' .. bucket .. ' T ' .. ARGV[2] .. ' ' .. keep
  elseif kind == 'l' then
    call('ZREM', bucket, KEYS[2])
  else
    left[#left + 1] = ' ' .. bucket .. ' ' .. kind .. ' ' .. amount .. ' ' .. keep
  end
end
local head = { state == 'o' and 's' or 'x', held, ARGV[2] }
call('SET', KEYS[2], table.concat(head, ' ') .. table.concat(left) .. '|' .. facts, 'KEEPTTL')
if state == 'o' then call('ZADD', KEYS[1], 'XX', now + tonumber(ARGV[3]), KEYS[2]) end
return 1
