"""The arguments of the service under Ray Serve, and keys where a service is behind a prefix; no Ray is started."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from alitok_fast.pipelines.load_options import LoadOptions
from alitok_fast.serving.engine import MOST_IMAGES
from alitok_fast.serving.replicas import SAMPLED_TOGETHER, ReplicaSettings, arguments
from alitok_fast.serving.settings import ServeSettings


def test_text_and_numbers_are_taken():
    made = arguments({"model": "m", "weight_dtype": "int8", "max_queue": "5", "page": "false", "max_replicas": 3})
    assert made.load == LoadOptions(model="m", weight_dtype="int8")
    assert made.settings == ServeSettings(max_queue=5, page=False)
    assert made.replicas == ReplicaSettings(max_replicas=3)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"modle": "demo"}, "arguments: expected one of activation_dtype, allowed_hosts, api_keys, .*, got 'modle'"),
        ({"port": "80"}, "port: expected none under Ray Serve .*, got '80'"),
        ({"max_queue": "many"}, "max_queue: expected int, got 'many'"),
        ({"stage1": 3}, r"stage1: expected str \| None, got 3"),
        ({"timeout": "0"}, "timeout: expected a number above 0, at most 1e.06, got 0.0"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas: expected at least 3, got 2"),
        ({"max_replicas": 0}, "max_replicas: expected at least 1, got 0"),
        ({"num_cpus": "nan"}, "num_cpus: expected a number above 0, got nan"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests: expected a number above 0, got 0"),
        ({"device": "cuda:1"}, "device: expected cpu or cuda, got 'cuda:1'"),
        ({"num_gpus": 1}, "num_gpus: expected as the device has, got 1"),
        ({"device": "cuda", "num_gpus": 0}, "num_gpus: expected as the device has, got 0"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        arguments(given)


def test_options_of_the_deployment():
    assert SAMPLED_TOGETHER == MOST_IMAGES
    plain = arguments({}).deployment()
    assert plain["num_replicas"] == 1 and "autoscaling_config" not in plain
    assert plain["ray_actor_options"] == {
        "num_cpus": 1.0, "num_gpus": 0.0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
    }  # fmt: skip
    assert plain["max_ongoing_requests"] > 8 + ServeSettings.max_queue  # a replica refuses what is too much by itself
    assert plain["graceful_shutdown_timeout_s"] > ServeSettings.grace_seconds

    gpu = arguments({"device": "cuda", "max_replicas": 4, "num_cpus": 2.5, "num_gpus": 0.5}).deployment()
    assert gpu["ray_actor_options"]["num_gpus"] == 0.5
    assert gpu["ray_actor_options"]["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": "2"}
    assert gpu["autoscaling_config"]["min_replicas"] == 1 and gpu["autoscaling_config"]["max_replicas"] == 4
    assert gpu["autoscaling_config"]["target_ongoing_requests"] == 64 and "num_replicas" not in gpu


def test_the_driver_loads_neither_torch_nor_a_model():
    pytest.importorskip("ray.serve")
    code = "import sys, alitok_fast.serving.ray as r; assert r.app is not None; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("root, path, status", [
    ("", "/v1/models", 401), ("", "/ready", 200), ("/a", "/a/v1/models", 401), ("/a", "/a/ready", 200),
    ("/a", "/v1/models", 401), ("/v1", "/v1/ready", 401),
])  # fmt: skip
def test_keys_are_asked_for_behind_a_prefix_too(root, path, status):
    pytest.importorskip("starlette")
    from alitok_fast.serving.limits import Gate

    sent = []

    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    limits = dict(hosts=frozenset(), max_body=10, max_bodies=20, stall_seconds=1)
    gate = Gate(behind, keys=(b"right",), observe=lambda *_: None, **limits)
    scope = {"type": "http", "method": "GET", "root_path": root, "path": path, "headers": []}
    asyncio.run(gate(scope, None, send))
    assert sent[0]["status"] == status


def test_metrics_bear_the_labels_of_their_service():
    pytest.importorskip("prometheus_client")
    from alitok_fast.serving.metrics import Metrics

    metrics = Metrics(lambda: None, {"replica": "a"})
    metrics.observe("/ready", "GET", 200, 0.1)
    samples = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    assert samples and all('replica="a"' in line for line in samples)
    assert b"replica" not in Metrics(lambda: None).text()
