"""What a bench says that a process took."""

import pytest

from compressors.errors import DeltaError
from server.bench.report import used_by


@pytest.mark.slow
def test_a_process_is_charged_its_own_memory_and_time() -> None:
    ours = bytearray(400 << 20)  # of the parent, in whose memory a child is born
    small = used_by(["-c", "import time; time.sleep(0.3)"])
    large = used_by(["-c", "import time; a = bytearray(200 << 20); b = sum(range(3_000_000)); time.sleep(0.3)"])
    assert len(ours) == 400 << 20
    assert 1 < small.peak_mib < 100
    assert 200 < large.peak_mib < 300
    assert small.seconds >= 0.3
    assert large.cpu_s > small.cpu_s


def test_a_process_that_fails_is_told_with_its_words() -> None:
    with pytest.raises(DeltaError, match="it went wrong"):
        used_by(["-c", "raise SystemExit('it went wrong')"])
