-- A lost call has its row: it need not be named again.
--
-- KEYS[1]  open
-- KEYS[2]  record

return call('ZREM', KEYS[1], KEYS[2])
