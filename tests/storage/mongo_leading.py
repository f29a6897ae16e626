"""A server reduced to its store, which leads: it commits facts and gives all facts their order until it is killed."""

import asyncio
import sys

from mcp_control.kernel.changes import Change
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.store_conformance import OTHER, THING, fact


async def main(uri: str) -> None:
    """Commit for ever; one line with the ids of its sessions is printed when the first commit is done."""
    store = MongoStore(uri, node="leader")
    store.lead = True
    await store.open((THING, OTHER), lambda facts: None)
    number = 0
    while True:
        await store.commit([Change((), (), [fact(f"theirs{number}")])])
        if number == 0:
            sys.stdout.write("sessions " + " ".join(one.hex() for one in store.session_ids()) + "\n")
            sys.stdout.flush()
        number += 1
        await asyncio.sleep(0.005)
