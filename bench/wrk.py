"""HTTP (H): wrk against the submit and read routes, 32 connections."""

import asyncio
import json
import re
import shutil
from typing import Any, Final

from bench.loads import TEXT, payload
from bench.stand import Stand, Usage, stand
from bench.statistics import Line, median, rounded

CONNECTIONS: Final = 32
_THREADS: Final = 2
_READ: Final = 1000
_PARKED: Final = {"name": "absent", "capabilities": [{"name": "bench.parked"}]}

# Every request has its own payload. The last lines of wrk's output are read as JSON.
_REPORT: Final = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\n{"requests":%d,"us":%d,"p50_us":%d,"p99_us":%d,"refused":%d,"broken":%d}\\n', summary.requests,
    summary.duration, latency:percentile(50), latency:percentile(99), e.status, e.connect + e.read + e.write + e.timeout))
end
"""
_POST: Final = """
local threads = 0
function setup(thread) thread:set("number", threads); threads = threads + 1 end
function init(args) count = 0 end
function request()
  count = count + 1
  return wrk.format("POST", nil, nil, '{"type":"%s","payload":{"i":' .. (count * 16 + number) .. ',"text":"%s"}}')
end
"""
_GET: Final = """
local ids = {%s}
function init(args) count = 0 end
function request()
  count = count + 1
  return wrk.format("GET", "/api/v1/tasks/" .. ids[count %% #ids + 1])
end
"""


async def _wrk(there: Stand, script: str, seconds: int) -> dict[str, Any]:
    path = there.folder / "wrk.lua"
    path.write_text(script + _REPORT)
    process = await asyncio.create_subprocess_exec(
        "wrk", f"-t{_THREADS}", f"-c{CONNECTIONS}", f"-d{seconds}s", "-H", f"Authorization: Bearer {there.token}",
        "-H", "Content-Type: application/json", "-s", str(path), f"{there.url}/api/v1/tasks", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    found = re.search(rb"^\{.*\}$", out, re.MULTILINE)
    if process.returncode or found is None:
        raise RuntimeError(out.decode(errors="replace")[-1000:])
    answer: dict[str, Any] = json.loads(found[0])
    return answer


async def http(reps: int, seconds: int = 5) -> list[Line]:
    """H: requests per second, p50, p99 and errors.

    `post` only accepts (the one agent of that type is away), `post-worked` has an agent that does the tasks as they come, `get` reads
    tasks with payload and result.
    """
    if shutil.which("wrk") is None:
        raise FileNotFoundError("wrk is not installed: make system-packages")
    lines: list[Line] = []
    async with stand("noop") as there:
        await there.api.json("POST", "/agents/register", _PARKED)
        tasks = [{"type": "bench.noop", "payload": payload(number)} for number in range(_READ)]
        answer = await there.api.json("POST", "/tasks/batch", {"tasks": tasks})
        ids = [item["id"] for item in answer["items"]]
        await there.api.json("GET", f"/tasks/{ids[-1]}?wait=30")
        scripts = {
            "get": _GET % ",".join(f'"{one}"' for one in ids),
            "post": _POST % ("bench.parked", TEXT),
            "post-worked": _POST % ("bench.noop", TEXT),
        }
        for mode, script in scripts.items():
            await _wrk(there, script, 1)
            runs: list[dict[str, Any]] = []
            usages: list[Usage] = []
            for _ in range(reps):
                with there.metered() as usage:
                    runs.append(await _wrk(there, script, seconds))
                usages.append(usage)
            rates = [run["requests"] / run["us"] * 1e6 for run in runs]
            each = [usage.per_task(run["requests"]) for usage, run in zip(usages, runs, strict=True)]
            lines.append(
                {
                    "bench": "H",
                    "mode": mode,
                    "connections": CONNECTIONS,
                    "requests_per_s": round(median(rates)),
                    "p50_ms": rounded(median(run["p50_us"] for run in runs) / 1000),
                    "p99_ms": rounded(median(run["p99_us"] for run in runs) / 1000),
                    "errors": sum(run["refused"] + run["broken"] for run in runs),
                    "server_cpu_us": round(median(one["server_cpu_us"] for one in each), 1),
                    "agent_cpu_us": round(median(one["agent_cpu_us"] for one in each), 1),
                    "runs": [round(rate) for rate in rates],
                }
            )
    return lines
