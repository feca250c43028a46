"""Pools give every result once, and a crash concerns only the task that caused it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmd_pipeline.base import progress_channel
from pmd_pipeline.base.parallel import WorkerDied, ignore_progress, open_pool
from pmd_pipeline.base.progress_channel import ProgressChannel
from pmd_pipeline.contract.errors import PmdError, RecordError


def double(task, report_progress):
    report_progress({"done": task})
    return 2 * task


def kill_itself_on_seven(task, _report_progress):
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def raise_record_error(task, _report_progress):
    raise RecordError("kind", f"detail of {task}")


def sleep_in_steps(task, report_progress):
    for _ in range(8):
        report_progress({"done": task})
        time.sleep(0.1)
    return task


calls = []


def count_calls(task, _report_progress):
    """The process, and how many tasks have run in it."""
    calls.append(task)
    return os.getpid(), len(calls)


POOLS = [
    pytest.param("local", 1, id="this process"),
    pytest.param("local", 2, id="processes"),
    pytest.param("ray", 2, id="ray", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _workers_find_this_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.parametrize(("runner", "workers"), POOLS)
def test_every_task_gives_its_result_once(runner, workers):
    with open_pool(runner, workers, None) as pool:
        results = dict(pool.run(double, range(25), ignore_progress))

    assert results == {task: 2 * task for task in range(25)}


@pytest.mark.parametrize(("runner", "workers"), POOLS[1:])
def test_tasks_of_one_process_share_its_objects(runner, workers):
    with open_pool(runner, workers, None) as pool:
        results = dict(pool.run(count_calls, range(25), ignore_progress)).values()

    processes = {pid for pid, _ in results}
    assert len(processes) <= workers
    assert sorted(results) == [
        (pid, number + 1)
        for pid in sorted(processes)
        for number in range(sum(one == pid for one, _ in results))
    ]


@pytest.mark.parametrize(("runner", "workers"), POOLS)
def test_an_error_of_a_task_is_raised_unchanged(runner, workers):
    with open_pool(runner, workers, None) as pool, pytest.raises(RecordError) as caught:
        list(pool.run(raise_record_error, range(3), ignore_progress))

    assert caught.value.kind == "kind"
    assert caught.value.detail.startswith("detail of")


@pytest.mark.parametrize(("runner", "workers"), POOLS[1:])
def test_a_task_that_kills_its_worker_fails_alone(runner, workers):
    with open_pool(runner, workers, None) as pool:
        results = dict(pool.run(kill_itself_on_seven, range(12), ignore_progress))

    assert isinstance(results.pop(7), WorkerDied)
    assert results == {task: task for task in range(12) if task != 7}


@pytest.mark.parametrize(("runner", "workers"), POOLS[1:])
def test_progress_reaches_the_driver_under_the_name_of_its_task(runner, workers):
    received = {}
    with open_pool(runner, workers, None) as pool:
        list(
            pool.run(
                sleep_in_steps, [3, 4], lambda name, counts: received.update({name: dict(counts)})
            )
        )

    assert received == {"3": {"done": 3}, "4": {"done": 4}}


def test_progress_without_the_token_is_ignored():
    received = []
    with ProgressChannel("127.0.0.1", lambda *args: received.append(args)) as channel:
        sender = channel.sender("mine")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.sendto(json.dumps(["wrong", "theirs", {}]).encode(), sender.address)
            out.sendto(b"\xff\x00", sender.address)
            for one in (b"[1]", b"5", b"null", b"{}", b"[" * 4000, b'["wrong"]'):
                out.sendto(one, sender.address)
        sender({"rows": 1})
        time.sleep(0.05)
        channel.receive()

    assert received == [("mine", {"rows": 1})]


def test_progress_that_cannot_be_sent_is_lost_and_raises_nothing(monkeypatch):
    def unreachable(*_):
        raise OSError(101, "Network is unreachable")

    with ProgressChannel("127.0.0.1", ignore_progress) as channel:
        sender = channel.sender("mine")
        monkeypatch.setattr(progress_channel.socket, "socket", unreachable)
        sender({"rows": 1})


def test_a_single_task_starts_no_ray():
    with open_pool("ray", 2, None) as pool:
        assert dict(pool.run(double, [5], ignore_progress)) == {5: 10}

    assert "ray" not in sys.modules or not __import__("ray").is_initialized()


@pytest.mark.slow
def test_a_cluster_without_a_gpu_is_a_mistake_of_the_user():
    with (
        pytest.raises(PmdError, match="Ray has no GPU here"),
        open_pool("ray", 2, None, gpus=64) as pool,
    ):
        list(pool.run(double, [1, 2], ignore_progress))


def test_an_unreachable_cluster_is_a_mistake_of_the_user():
    with (
        pytest.raises(PmdError, match="cannot start or join Ray"),
        open_pool("ray", 2, "127.0.0.1:1") as pool,
    ):
        list(pool.run(double, [1, 2], ignore_progress))


@pytest.mark.slow
def test_workers_end_when_their_driver_is_killed(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from pmd_pipeline.base.parallel import ignore_progress, open_pool\n"
        "def work(task, report_progress):\n"
        f"    Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    with open_pool('local', 2, None) as pool:\n"
        "        list(pool.run(work, range(4), ignore_progress))\n"
    )
    driver = subprocess.Popen([sys.executable, str(script)])
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
        time.sleep(0.1)

    driver.kill()
    driver.wait()

    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_another_cluster_on_the_machine_is_joined_on_demand_only(monkeypatch):
    calls_of_init = []

    def init(**options):
        calls_of_init.append(options)
        raise ValueError("no Ray in this test")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.init", init)

    with open_pool("ray", None, None) as pool, pytest.raises(PmdError, match="no Ray in this test"):
        list(pool.run(double, [1, 2, 3], ignore_progress))

    assert [options["address"] for options in calls_of_init] == ["local"]
