import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_of_the_step_claims_nothing_without_a_gpu(pytestconfig):
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/train_step.py",
            *("--device", "cpu", "--pairs", "2", "--rounds", "1"),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
    )

    assert done.returncode == 0, done.stderr
    assert "ours pairs float32" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("no CUDA GPU used: nothing is said")
