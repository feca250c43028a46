import importlib.util
import subprocess
import sys

import pytest
import torch


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


def test_the_benchmark_waits_for_the_card_that_it_is_told(pytestconfig, monkeypatch):
    place = pytestconfig.rootpath / "benchmarks" / "train_step.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_the_step", place)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(benchmark, "_time_masking", lambda: None)
    monkeypatch.setattr(benchmark, "_measure_on_gpu", lambda *_: chosen.append("measured"))
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--device", "cuda:1"])

    benchmark.main()

    assert chosen == [1, "measured"]
