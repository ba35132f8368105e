-- How many calls had no room in some buckets. Changes nothing.
--
-- KEYS[1..] buckets
-- ARGV[1..] their kinds

local answer = {}
for i = 1, #KEYS do
  local found
  if ARGV[i] == 'l' then
    found = call('GET', KEYS[i] .. ':no_room')
  else
    found = call('HGET', KEYS[i], 'no_room')
  end
  answer[i] = tonumber(found or 0)
end
return answer
