-- Ends the leases that are over: what was held is given back, or charged where the tokens are known.
--
-- KEYS[1]  open
-- ARGV[1]  now, in seconds
-- ARGV[2]  most records to look at
-- ARGV[3]  seconds after which one is named again, unless it is dropped
-- returns  for each: facts, tokens used or -1 if nobody said, 1 if it has a row that is in no bucket

local now = tonumber(ARGV[1])
local answer = {}
for _, key in ipairs(call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[2])) do
  local record = call('GET', key)
  local state, held, used, rest, facts
  if record then state, held, used, rest, facts = read(record) end
  if not record or state == 'd' then
    call('ZREM', KEYS[1], key)
  else
    local left = {}
    if state == 'o' or state == 's' then
      for bucket, kind, amount, keep in string.gmatch(rest, HELD) do
        local count = tonumber(amount)
        if kind == 'l' then
          call('ZREM', bucket, key)
        elseif kind == string.upper(kind) then
          left[#left + 1] = ' ' .. bucket .. ' ' .. kind .. ' ' .. amount .. ' ' .. keep
        else
          local spent = state == 's' and count or 0
          charge(bucket, count, spent, tonumber(keep) - now, true)
          if state == 's' then kind = string.upper(kind) end
          left[#left + 1] = ' ' .. bucket .. ' ' .. kind .. ' ' .. amount .. ' ' .. keep
        end
      end
      local head = { 'x', held, used and string.format('%d', used) or '-' }
      call('SET', key, table.concat(head, ' ') .. table.concat(left) .. '|' .. facts, 'KEEPTTL')
    end
    call('ZADD', KEYS[1], now + tonumber(ARGV[3]), key)
    local n = #answer
    answer[n + 1], answer[n + 2], answer[n + 3] = facts, used or -1, state == 'r' and 1 or 0
  end
end
return answer
