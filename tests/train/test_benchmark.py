import importlib.util
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
def test_without_a_gpu_the_benchmark_states_no_gpu_speed(pytestconfig):
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
    assert done.stdout.splitlines()[-1].startswith("no CUDA GPU used: its speed")


def test_the_benchmark_measures_the_given_card(pytestconfig, monkeypatch):
    path = pytestconfig.rootpath / "benchmarks" / "train_step.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_the_step", path)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(benchmark, "_time_masking", lambda: None)
    monkeypatch.setattr(benchmark, "_measure_on_gpu", lambda *_: calls.append("measured"))
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--device", "cuda:1"])

    benchmark.main()

    assert calls == [1, "measured"]
