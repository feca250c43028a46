"""A running Ray cluster of two machines, as far as one machine can play them."""

import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from toy import toy_build, toy_order, toy_recipe, toy_rows, write_pictures, write_rows

from pmd_pipeline.base.parallel import ignore_progress, open_pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own, of the nodes it ends
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def machine(_task, _tick):
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()


def test_all_machines_of_a_cluster_that_is_joined_work(cluster):
    with open_pool("ray", None, cluster.address) as pool:
        assert pool.workers == 2
        machines = dict(pool.run(machine, range(8), ignore_progress))

    assert machines.keys() == set(range(8))
    assert len(set(machines.values())) == 2


def test_what_a_machine_that_goes_away_was_at_is_done_by_another(cluster):
    going = cluster.add_node(num_cpus=2)
    left = []

    def watch(results):
        for task, result in results:
            if not left:
                leaving = threading.Thread(
                    target=cluster.remove_node, args=(going,), kwargs={"allow_graceful": False}
                )
                leaving.start()
                left.append(leaving)
            yield task, result

    with open_pool("ray", 4, cluster.address) as pool:
        found = dict(watch(pool.run(machine, range(16), ignore_progress)))
    left[0].join()

    assert found.keys() == set(range(16))
    assert all(isinstance(node, str) for node in found.values())


def test_a_cluster_builds_what_this_machine_builds(cluster, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(28)])
    digests = []
    for name in ("here", "there"):
        write_rows(tmp_path / name / "raw", toy_rows(30))
        order = toy_order(tmp_path / name, toy_recipe(part_records=5), pictures=pictures)
        if name == "here":
            digests.append(toy_build(order).digest)
        else:
            with open_pool("ray", None, cluster.address) as pool:
                digests.append(toy_build(order, pool).digest)

    assert digests[0] == digests[1]
