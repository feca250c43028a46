"""A build survives twenty kills of workers and drivers; `benchmarks/kills.py` runs any number."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_build_with_twenty_kills_has_the_digest_of_an_undisturbed_build():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "20"], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "with the digest of the undisturbed build" in done.stdout
