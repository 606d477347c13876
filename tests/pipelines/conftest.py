"""What the tests of the commands share."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_address():
    """Of a Ray that the tests share: a Ray of one's own takes longer to start and end than a test's extraction."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster.address
    cluster.shutdown()
