-- Shared by the scripts of this folder.
--
-- The keys of a script share one hash tag, "{<shard>}", and so do the records and buckets that a
-- script finds in what it reads.
--
--   open     ZSET of the records that are not done, by the end of their lease
--   record   "<state> <tokens held> <tokens used, or ->[ <bucket> <kind> <held> <kept until>]...|<facts>"
--            state o: the model may be working; s: settled, its usage row is still to come;
--            x: nobody told its end before the lease ended; r: its row came, and it is in no bucket
--            yet; d: done
--            a kind in capitals: so much was charged there already, and the row has the last word
--   bucket   of kind n (requests), t (tokens), c (compute), m (money): hash of `used`, `reserved`
--            and `no_room`, how many calls had none; of kind l (calls at once): ZSET of records by
--            the end of their lease, beside it "<bucket>:no_room"
--   known    since when (seconds) everything that the user spent is in the buckets
--   counted  set of the records of calls around that time which are in the buckets

local call = redis.call
local HELD = ' (%S+) (%a) (%d+) (%d+)'
-- Lua's numbers are exact up to here, and more than this nobody has to spend.
local MOST = 2 ^ 53

-- Replaces what a call held in a bucket by what it used. `holds` is false where that was given back.
local function charge(bucket, held, used, keep, holds)
  local now = call('HMGET', bucket, 'used', 'reserved')
  local fresh = not now[1] and not now[2]
  -- Its window is over, and so is its count; unless it is only a clock that jumped.
  if fresh and keep <= 0 then return end
  if used > 0 or fresh then
    call('HSET', bucket, 'used', math.min((tonumber(now[1]) or 0) + used, MOST))
  end
  if fresh then
    call('EXPIRE', bucket, keep)
  elseif holds and now[2] then
    call('HSET', bucket, 'reserved', math.max(tonumber(now[2]) - held, 0))
  end
end

-- So much was charged `before`, and the usage row says `used`. A bucket that is lost is rebuilt from
-- rows.
local function correct(bucket, before, used)
  local charged = used ~= before and call('HGET', bucket, 'used')
  if charged then
    local now = math.min(tonumber(charged) + used - before, MOST)
    call('HSET', bucket, 'used', math.max(now, 0))
  end
end

-- State, tokens held, tokens used (nil as long as nobody said), what is held, facts.
local function read(record)
  local head, facts = string.match(record, '^([^|]*)|?(.*)$')
  local state, held, used, rest = string.match(head, '^(%a) (%d+) (%S+)(.*)$')
  return state, tonumber(held), tonumber(used), rest, facts
end

-- Whether a call that began then may have been on its way when the buckets were built.
local function was_on_its_way(since, began, now)
  return since and began >= since - BEFORE and began < since + AFTER and now < since + STAYS
end

local function note_counted(counted, record)
  call('SADD', counted, record)
  call('EXPIRE', counted, STAYS)
end
