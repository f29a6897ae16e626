"""An agent without the SDK that reports whatever happened meanwhile: it takes one task, waits for a line on its input, and reports it done.

`python -m tests.integration.stubborn URL CREDENTIAL NAME LEASE` prints the task's id when it has one, then `STATUS CODE` of the answer.
"""

import sys

import httpx2


def main(url: str, credential: str, name: str, lease: str) -> None:
    """Take a task, wait for the word, report."""
    headers = {"Authorization": f"Bearer {credential}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=30) as http:
        spec = {"name": name, "capabilities": [{"name": "it.stubborn"}], "lease_seconds": float(lease)}
        welcome = http.post("/agents/session", json={"op": "hello", "protocol": 1, "agent": spec}).json()
        session = f"/agents/session/{welcome['instance_id']}"
        task = http.post(f"{session}/claim?wait=20").json()["tasks"][0]
        sys.stdout.write(task["task_id"] + "\n")
        sys.stdout.flush()
        sys.stdin.readline()
        done = {
            "task_id": task["task_id"],
            "lease_token": task["lease_token"],
            "outcome": "completed",
            "result": "late",
        }
        answer = http.post(f"{session}/report", json={"op": "report", "id": 1, "done": [done]})
        sys.stdout.write(f"{answer.status_code} {answer.json().get('code', '')}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
