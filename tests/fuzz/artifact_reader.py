"""Fuzz of the delta file's reader: `python tests/fuzz/artifact_reader.py --inputs 10000` (no part of the suite).

Inputs are real files of every kind, method, mask and width, changed (mutation.py). Of each must hold:
- `verify`, with its base and without, returns or raises a DeltaError: no other error, none of the time and memory that it states;
- what it accepts with the base is served and decompressed without any error, and what it accepts without is inspected.
"""

import argparse
import faulthandler
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from compressors.artifact import Artifact  # noqa: E402
from compressors.decompress import delta_tensor  # noqa: E402
from compressors.errors import DeltaError  # noqa: E402
from compressors.execution import Shard, changed_rows, outside_projections, raw_delta, sparse_factor  # noqa: E402
from compressors.fingerprint import fingerprint, stored_tensors  # noqa: E402
from compressors.footprint import execution_nbytes  # noqa: E402
from compressors.inspect import summary, text  # noqa: E402
from compressors.verify import verify  # noqa: E402
from tests.fuzz.corpus import write_corpus  # noqa: E402
from tests.fuzz.mutation import mutated  # noqa: E402

MEMORY_FACTOR, MEMORY_CONSTANT = 64, 1 << 20  # bytes a byte of the file, and in all: what `verify` states
SECONDS = 5.0  # an input
ADDRESS_SPACE = 8 << 30  # of the process: an allocation beyond it fails


class TooSlowError(Exception):
    """An input that took more than its time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--only", type=int, help="run one input alone, by its number")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory(prefix="deltaworks-fuzz-") as folder:
        base, files = write_corpus(Path(folder))
        corpus = [file.read_bytes() for file in files]
        reader = Reader(Path(folder) / "input.safetensors", base)
        for file in files:
            problem = reader.problem_with(file.read_bytes())
            assert problem is None and reader.last == "accepted", f"{file.name}: {problem or reader.last}"  # noqa: PT018
        numbers = range(args.inputs) if args.only is None else [args.only]
        return _run(reader, corpus, args.seed, numbers, args.keep)


def _run(reader: "Reader", corpus: list[bytes], seed: int, numbers: Any, keep: Path) -> int:
    outcomes: Counter[str] = Counter()
    failed, started, slowest = 0, time.perf_counter(), 0.0
    for number in numbers:
        data = mutated(random.Random(f"{seed}-{number}"), corpus)
        began = time.perf_counter()
        problem = reader.problem_with(data)
        slowest = max(slowest, time.perf_counter() - began)
        outcomes[reader.last] += 1
        if problem is not None:
            failed += 1
            keep.mkdir(exist_ok=True)
            (keep / f"{seed}-{number}.safetensors").write_bytes(data)
            print(f"--- --seed {seed} --only {number}\n{problem}", flush=True)
    took = time.perf_counter() - started
    print(f"{sum(outcomes.values())} inputs in {took:.0f} s, {failed} failed; slowest {slowest:.2f} s;", end=" ")
    print(f"most memory {reader.most_memory:.1f} bytes a byte of the file beside {MEMORY_CONSTANT >> 10} KiB")
    for outcome, count in outcomes.most_common():
        print(f"{count:>8}  {outcome}")
    return 1 if failed else 0


class Reader:
    """Reads inputs as the gateway and the commands do. `last`: what became of the last one."""

    def __init__(self, path: Path, base: Path) -> None:
        self._path = path
        self._told = fingerprint(base), {name: tensor.shape for name, tensor in stored_tensors(base).items()}
        self.last = ""
        self.most_memory = 0.0

    def problem_with(self, data: bytes) -> str | None:
        """What of the promises does not hold, or None."""
        self._path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(20 * SECONDS, exit=True)  # where no signal is seen
        try:
            self._read(len(data))
        except Exception:  # noqa: BLE001  # any error at all is what is searched for
            self.last = "failed"
            return traceback.format_exc(limit=-6)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        return None

    def _read(self, size: int) -> None:
        alone, with_base = self._verified(size), self._verified(size, *self._told)
        if alone is None:
            with Artifact.open(self._path) as artifact:
                assert text(summary(artifact))
        if with_base is None:
            assert alone is None, "accepted with a base and refused without"
            assert execution_nbytes(self._path) >= 0
            self._serve()
        self.last = "accepted" if with_base is None else type(with_base).__name__

    def _verified(self, size: int, *base: Any) -> DeltaError | None:
        tracemalloc.start()
        try:
            verify(self._path, *base)
        except DeltaError as error:
            str(error).encode()  # it is sent over HTTP
            return error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.most_memory = max(self.most_memory, (peak - MEMORY_CONSTANT) / size)
            assert peak <= MEMORY_FACTOR * size + MEMORY_CONSTANT, f"{peak} bytes for a file of {size}"
        return None

    def _serve(self) -> None:
        with Artifact.open(self._path) as artifact:
            for name, record in artifact.records.items():
                assert delta_tensor(artifact, name).shape == record.shape
                if record.kind == "rows":
                    changed_rows(artifact, name)
                elif outside_projections(record):
                    raw_delta(artifact, name)
                elif record.kind != "zero" and len(record.shape) == 2:
                    sparse_factor(artifact, name, Shard((0, record.shape[0]), (0, record.shape[1])))


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"more than {SECONDS:g} s")


if __name__ == "__main__":
    sys.exit(main())
