"""What the worker frees leaves its process: measured in a process of its own, whose heap has holes below what is still in use."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import json, sys
import numpy as np
from pathlib import Path
from server.engine.worker.memory import release_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

found = [resident()]
parts = [np.ones(12_000, dtype=np.float32) for _ in range(2000)]  # 96 MB in parts below the size that is mapped alone
found.append(resident())
last = parts[-1]  # at the end of the heap
parts.clear()
found.append(resident())
release_memory()
found.append(resident())
print(json.dumps(found))
"""


def test_freed_memory_leaves_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    start, full, freed, released = json.loads(done.stdout)
    nbytes = 2000 * 12_000 * 4
    assert full - start > 0.9 * nbytes
    assert freed - start > 0.8 * nbytes  # why something has to be done at all
    assert released - start < 0.1 * nbytes
