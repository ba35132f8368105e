-- Shared by the scripts of this folder.
--
-- The keys of a script share one hash tag, "{<shard>}", and so do the records and buckets that a
-- script finds in what it reads.
--
--   open     ZSET of the records that are not done, by the end of their lease
--   record   "<state> <tokens held> <tokens used, or ->[ <bucket> <kind> <held> <kept until>]...|<facts>"
--            state o: the model may be working; s: settled, its usage row is still to come;
--            x: nobody told its end before the lease ended; d: done
--   bucket   of kind n (requests), t (tokens), c (compute), m (money): hash of `used`, `reserved`;
--            of kind l (calls at once): ZSET of records by the end of their lease
--   known    since when (seconds) everything that the user spent is in the buckets

local call = redis.call
local HELD = ' (%S+) (%a) (%d+) (%d+)'

-- Replaces what a call held in a bucket by what it used. `holds` is false where that was given back.
local function charge(bucket, held, used, keep, holds)
  if keep <= 0 then return end
  local reserved = call('HGET', bucket, 'reserved')
  if used > 0 or not reserved then call('HINCRBY', bucket, 'used', used) end
  if not reserved then
    call('EXPIRE', bucket, keep)
  elseif holds then
    call('HSET', bucket, 'reserved', math.max(tonumber(reserved) - held, 0))
  end
end

-- State, tokens held, tokens used (nil as long as nobody said), what is held, facts.
local function read(record)
  local head, facts = string.match(record, '^([^|]*)|?(.*)$')
  local state, held, used, rest = string.match(head, '^(%a) (%d+) (%S+)(.*)$')
  return state, tonumber(held), tonumber(used), rest, facts
end
