-- Everything that RedisMeter asks of Redis. ARGV[1] is one of the verbs at the end.
--
--   {trunkline}:scope:<scope>          hash: `running` requests, `held` tokens reserved by them, and for each
--                                      slice of time the tokens used by those that were let in during it
--   {trunkline}:money:<scope>:<month>  hash: nano-dollars `spent` and `reserved`; `known` where `spent` has what
--                                      the ledger knew before, or else `asking`, the number of the question
--   {trunkline}:grant:<request>        what the request holds: its slice, then key, field, amount, key, ...
--   {trunkline}:leases                 sorted set: requests, by the microsecond until which they hold it
--
-- Amounts go from ARGV to commands as they are, and numbers are whole and below 2^53: nothing is rounded.
-- Keys that come out of grants are not named in KEYS; the braces keep all of them on one node of a cluster.

local LEASES = '{trunkline}:leases'
local GRANT = '{trunkline}:grant:'

local SLICES = 60
local SCOPE_KEPT_S = 86400
local MONEY_KEPT_S = 40 * 86400
local ENDED_AT_ONCE = 100

local REFUSED, GRANTED, UNKNOWN = 0, 1, 2

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function digits(number)
  return string.format('%.0f', number)
end

-- Where a key was lost, nothing must go below zero: that would be room which nobody has.
local function take_back(key, field, amount)
  if redis.call('HINCRBY', key, field, '-' .. amount) < 0 then
    redis.call('HSET', key, field, 0)
  end
end

local function recount(money)
  redis.call('HDEL', money, 'known', 'asking')
end

-- The parts of what a request held, which it holds no more; nil where it holds nothing.
local function give_back(request)
  redis.call('ZREM', LEASES, request)
  local packed = redis.call('GET', GRANT .. request)
  if not packed then
    return nil
  end
  redis.call('DEL', GRANT .. request)
  local grant = cmsgpack.unpack(packed)
  for at = 2, #grant, 3 do
    take_back(grant[at], grant[at + 1], grant[at + 2])
  end
  return grant
end

-- Whoever held an ended lease is gone. What it spent is in the ledger or was never told to a client.
local function end_leases(now)
  local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', digits(now), 'LIMIT', 0, ENDED_AT_ONCE)
  for _, request in ipairs(ended) do
    local grant = give_back(request) or {}
    for at = 2, #grant, 3 do
      if grant[at + 1] == 'reserved' then
        recount(grant[at])
      end
    end
  end
end

-- A scope's requests and tokens, with the slices of its window in their order.
local function read_scope(key, first, current)
  local scope = { running = 0, tokens = 0, oldest = current, slices = {} }
  local fields = redis.call('HGETALL', key)
  for at = 1, #fields, 2 do
    local name, amount = fields[at], tonumber(fields[at + 1])
    if name == 'running' then
      scope.running = amount
    elseif name == 'held' then
      scope.tokens = scope.tokens + amount
    elseif tonumber(name) < first then
      redis.call('HDEL', key, name)
    else
      scope.tokens = scope.tokens + amount
      scope.oldest = math.min(scope.oldest, tonumber(name))
      table.insert(scope.slices, { tonumber(name), amount })
    end
  end
  return scope
end

-- Microseconds until so many tokens have left the window; -1 where it has not as many.
local function room_in(scope, lacking, slice_us, now)
  table.sort(scope.slices, function(one, other) return one[1] < other[1] end)
  for _, slice in ipairs(scope.slices) do
    lacking = lacking - slice[2]
    if lacking <= 0 then
      return (slice[1] + SLICES + 1) * slice_us - now
    end
  end
  return -1
end

-- The number of the question that has to be asked before money can be counted; 0 where none has.
local function question(money, now)
  local known, asking = unpack(redis.call('HMGET', money, 'known', 'asking'))
  if known then
    return 0
  end
  if not asking then
    -- Of what has been charged so far the ledger knows, and it will tell.
    asking = digits(now)
    redis.call('HSET', money, 'spent', 0, 'asking', asking)
    redis.call('EXPIRE', money, MONEY_KEPT_S)
  end
  return tonumber(asking)
end

local verbs = {}

-- ARGV: request, lease_us, slice_us, tokens, nano, the slice in which the request has been let in already or
-- nothing, and for each claim its limits of tokens, money and requests, or nothing. KEYS: for each claim the
-- scope and its money.
-- Returns REFUSED or GRANTED, the slice, and for each claim how it stood: running, tokens, nano, microseconds
-- until its oldest tokens leave, and until there is room. Or UNKNOWN and for each claim a question's number.
function verbs.reserve()
  local request, lease_us, slice_us = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
  local tokens, nano, earlier = ARGV[5], ARGV[6], ARGV[7]
  local now = clock()
  local current = math.floor(now / slice_us)
  end_leases(now)
  local held = redis.call('GET', GRANT .. request)
  -- One that came twice, or that runs already, is not refused any more.
  local decided = held or earlier ~= ''

  local questions, unknown = { UNKNOWN }, false
  local answer = { GRANTED, held and tonumber(cmsgpack.unpack(held)[1]) or tonumber(earlier) or current }
  local grant = { digits(answer[2]) }
  for at = 1, #KEYS / 2 do
    local scope_key, money_key = KEYS[2 * at - 1], KEYS[2 * at]
    local tokens_limit, money_limit, running_limit = ARGV[5 + 3 * at], ARGV[6 + 3 * at], ARGV[7 + 3 * at]
    local scope = read_scope(scope_key, current - SLICES, current)
    local money, asking, room = 0, 0, 0
    if tokens_limit ~= '' then
      local lacking = scope.tokens + tonumber(tokens) - tonumber(tokens_limit)
      if lacking > 0 then
        answer[1] = REFUSED
        room = room_in(scope, lacking, slice_us, now)
      end
      if tokens ~= '0' then
        table.insert(grant, { scope_key, 'held', tokens })
      end
    end
    if running_limit ~= '' then
      if scope.running + 1 > tonumber(running_limit) then
        answer[1] = REFUSED
      end
      table.insert(grant, { scope_key, 'running', '1' })
    end
    if money_limit ~= '' then
      asking = question(money_key, now)
      local spent, reserved = unpack(redis.call('HMGET', money_key, 'spent', 'reserved'))
      money = tonumber(spent or 0) + tonumber(reserved or 0)
      if money + tonumber(nano) > tonumber(money_limit) then
        answer[1] = REFUSED
      end
      if nano ~= '0' then
        table.insert(grant, { money_key, 'reserved', nano })
      end
    end
    unknown = unknown or asking ~= 0
    table.insert(questions, asking)
    for _, number in ipairs({
      scope.running, scope.tokens, money, (scope.oldest + SLICES + 1) * slice_us - now, room,
    }) do
      table.insert(answer, number)
    end
  end

  if unknown and not decided then
    return questions
  end
  if decided then
    answer[1] = GRANTED
  end
  if answer[1] == GRANTED and not held then
    local packed = { grant[1] }
    for at = 2, #grant do
      local key, field, amount = unpack(grant[at])
      redis.call('HINCRBY', key, field, amount)
      redis.call('EXPIRE', key, field == 'reserved' and MONEY_KEPT_S or SCOPE_KEPT_S)
      for _, part in ipairs(grant[at]) do
        table.insert(packed, part)
      end
    end
    redis.call('SET', GRANT .. request, cmsgpack.pack(packed))
    redis.call('ZADD', LEASES, digits(now + lease_us), request)
  end
  return answer
end

-- ARGV: request, the slice in which it was let in, tokens, nano, and how many of KEYS are scopes whose tokens
-- were reserved; the others are money.
function verbs.settle()
  local request, slice, tokens, nano, scopes = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
  if not give_back(request) then
    -- It has been settled, or its lease has ended. What it cost is in the ledger.
    for at = scopes + 1, #KEYS do
      recount(KEYS[at])
    end
    return 0
  end
  if tokens ~= '0' then
    for at = 1, scopes do
      redis.call('HINCRBY', KEYS[at], slice, tokens)
    end
  end
  for at = scopes + 1, #KEYS do
    redis.call('HINCRBY', KEYS[at], 'spent', nano)
  end
  return 1
end

-- ARGV: request, which used nothing.
function verbs.drop()
  return give_back(ARGV[2]) and 1 or 0
end

-- ARGV: lease_us and requests. Returns those that hold nothing any more.
function verbs.renew()
  local lost = {}
  local until_us = digits(clock() + tonumber(ARGV[2]))
  for at = 3, #ARGV do
    if redis.call('ZSCORE', LEASES, ARGV[at]) then
      redis.call('ZADD', LEASES, until_us, ARGV[at])
    else
      table.insert(lost, ARGV[at])
    end
  end
  return lost
end

-- ARGV: the number of a question and the ledger's answer, in nano-dollars. KEYS: the money.
function verbs.learn()
  if redis.call('HGET', KEYS[1], 'asking') ~= ARGV[2] then
    return 0
  end
  redis.call('HINCRBY', KEYS[1], 'spent', ARGV[3])
  redis.call('HSET', KEYS[1], 'known', 1)
  redis.call('HDEL', KEYS[1], 'asking')
  return 1
end

-- KEYS: the money.
function verbs.recount()
  recount(KEYS[1])
  return 1
end

return verbs[ARGV[1]]()
