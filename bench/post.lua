-- Posts one body again and again, and prints what became of it as one line of JSON.
-- Arguments: the file with the body, and requests a second (0: as many as the server answers).

local ffi = require("ffi")
ffi.cdef([[
  struct moment { long seconds; long nanoseconds; };
  int clock_gettime(int clock, struct moment *now);
]])
local MONOTONIC = 1
local moment = ffi.new("struct moment")

local function milliseconds()
  ffi.C.clock_gettime(MONOTONIC, moment)
  return tonumber(moment.seconds) * 1000 + tonumber(moment.nanoseconds) / 1e6
end

-- Whichever connection is free takes the next place in one timetable; one that is late sends at once.
local function keep_pace(per_second)
  local due = milliseconds()
  function delay()
    due = due + 1000 / per_second
    return math.max(0, math.floor(due - milliseconds() + 0.5))
  end
end

function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  local per_second = tonumber(args[2])
  if per_second > 0 then keep_pace(per_second) end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"refused":%d,"lost":%d,"microseconds":%d,"median":%d,"p99":%d}\n',
    summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration, latency:percentile(50), latency:percentile(99)))
end
