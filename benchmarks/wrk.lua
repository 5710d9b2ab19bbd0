-- Sends the lines of a file as JSON bodies, one after the other, and prints the figures as one JSON line.
-- wrk -s wrk.lua URL -- FILE

local messages, number = {}, 0

function init(arguments)
  local headers = {["Content-Type"] = "application/json"}
  for line in io.lines(arguments[1]) do
    messages[#messages + 1] = wrk.format("POST", nil, headers, line)
  end
end

function request()
  number = number % #messages + 1
  return messages[number]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "p50_ms": %.4f, "p99_ms": %.4f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
