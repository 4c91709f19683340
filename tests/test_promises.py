"""What the service promises. Every promise has tests that are named after it: `test_r7_...` proves R7."""

import ast
import re
from pathlib import Path

PROMISES = {
    "r1": "A request runs wholly on the version that its name meant when it came, whatever the name means later.",
    "r2": "A row beside others, of any delta or edit, is the row alone.",
    "r3": "Keys and values of the cache never cross a delta's digest, an edit or a tenant's salt.",
    "r4": "Unloading and deleting wait for the requests that use a delta, and then memory falls.",
    "r5": "Fifty first requests of a delta are one load.",
    "r6": "A load that failed is remembered for a short time, and no longer than until the delta is uploaded again.",
    "r7": "Without room for a delta the least recently used one leaves, or the request is told to come back, in time.",
    "r8": "However hot one delta is, the wait of every other is bounded.",
    "r9": "A client that goes away ends its work within a step, streamed or not.",
    "r10": "A stream that fails ends with an error event and [DONE]: never cut silently, never hanging.",
    "r11": "SIGTERM: not ready at once, new requests 503 with Retry-After, running ones finish in their time, exit 0.",
    "r12": "A server that is killed at any step loses nothing that it acknowledged and shows nothing half done.",
    "r13": "Liveness answers while every place is taken.",
    "r14": "An upload is whole and as its digest says, or nothing of it stays.",
    "r15": "A delta of another base is refused at the upload, and at the load again.",
    "r16": "Success is told after a real check.",
    "r17": "Of two admins who change a name at once one wins, and the other changes nothing.",
    "s1": "No pickle is ever read.",
    "s2": "No path leaves its folder, by whatever name, link or archive.",
    "s3": "The admin plane takes admin keys alone, compared in constant time, and is closed without one.",
    "s4": "Every route is public, of inference or of admins, and guarded so.",
    "s5": "A delta that a key may not use does not exist for it.",
    "s6": "Everything that a client sends is bounded, and so is every answer to nonsense.",
    "s7": "No key and no prompt in logs, errors, metrics or printed settings.",
    "s8": "What is no number, and JSON that is none, is 400.",
    "s9": "No page of another origin is let in, and only this machine is listened to, unless the operator says so.",
    "s10": "Containers and units run as nobody, on a read-only root, without capabilities or tokens.",
    "s11": "What an image installs is locked: by version, and for GPUs by the hash of every file.",
    "o1": "Every documented metric is in a live scrape, and the other way round; promtool finds nothing.",
    "o2": "Names that clients invent make no series, and a scrape stays small.",
    "o3": "The API is what it is described and recorded to be.",
    "o4": "A client's trace goes on: its id is in the log, and in the spans.",
    "o5": "Every panel and alert names metrics that exist.",
    "o6": "Every alert has a case that fires and one that does not.",
}


def test_every_promise_has_a_test_of_its_name() -> None:
    named: dict[str, list[str]] = {}
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
                promise := re.match(r"test_([rso]\d+)_\w", node.name)
            ):
                named.setdefault(promise[1], []).append(node.name)
    assert sorted(PROMISES.keys() - named) == []
    assert sorted(named.keys() - PROMISES) == []
