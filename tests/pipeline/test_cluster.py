"""Builds on a Ray cluster of two nodes, both on this machine."""

import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.base.parallel import ignore_progress, open_pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own, of the nodes it ends
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def node_id(_task, _report_progress):
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()


def test_every_node_of_a_cluster_runs_tasks(cluster):
    with open_pool("ray", None, cluster.address) as pool:
        assert pool.workers == 2
        nodes = dict(pool.run(node_id, range(8), ignore_progress))

    assert nodes.keys() == set(range(8))
    assert len(set(nodes.values())) == 2


def test_tasks_of_a_node_that_goes_away_run_on_another(cluster):
    leaving_node = cluster.add_node(num_cpus=2)
    threads = []

    def remove_a_node_after_the_first(results):
        for task, result in results:
            if not threads:
                thread = threading.Thread(
                    target=cluster.remove_node,
                    args=(leaving_node,),
                    kwargs={"allow_graceful": False},
                )
                thread.start()
                threads.append(thread)
            yield task, result

    with open_pool("ray", 4, cluster.address) as pool:
        nodes = dict(remove_a_node_after_the_first(pool.run(node_id, range(16), ignore_progress)))
    threads[0].join()

    assert nodes.keys() == set(range(16))
    assert all(isinstance(node, str) for node in nodes.values())


def test_a_build_on_a_cluster_has_the_digest_of_a_local_build(cluster, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(28)])
    digests = []
    for name in ("local", "cluster"):
        write_rows(tmp_path / name / "raw", toy_rows(30))
        order = toy_source_build(tmp_path / name, toy_recipe(part_records=5), pictures=pictures)
        if name == "local":
            digests.append(toy_build(order).digest)
        else:
            with open_pool("ray", None, cluster.address) as pool:
                digests.append(toy_build(order, pool).digest)

    assert digests[0] == digests[1]
