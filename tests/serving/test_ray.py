"""The service under Ray Serve: two replicas on this machine, one of which is killed; keys, limits, streams, scaling."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast import Pipeline

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]
KEY = "right"
ANSWERED = r'alitok_http_requests_total\{.*"/v1/images/generations",status="200"'
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def url():
    """Where Serve listens, in a Ray of our own: no dashboard, no statistics sent, workers that import this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.delenv("ALITOK_API_KEYS", raising=False)
        ray.init(
            num_cpus=4,  # a count that is handed out, not the cores
            object_store_memory=100_000_000,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def deploy(url):
    """deploy(name, **arguments) -> a client of the application, which is at /name."""
    from alitok_fast.serving.ray import build

    clients = []

    def make(name: str, **arguments):
        serve.run(build({"page": "false", **arguments}), name=name, route_prefix=f"/{name}")
        clients.append(httpx.Client(base_url=f"{url}/{name}", timeout=60))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def two(deploy):
    """A client of two replicas that sample an image each."""
    return deploy("two", min_replicas="2", max_replicas=2, max_images=1, max_queue="300")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("demo")


def ask(client, seed: int = 0, n: int = 1, **more):
    return client.post("/v1/images/generations", json={"prompt": "bag", "seed": seed, "n": n, **more})


def pictures(response) -> np.ndarray:
    files = [base64.b64decode(one["b64_json"]) for one in response.json()["data"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def expected(pipe: Pipeline, seed: int, n: int = 1) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(["bag"] * n, seed=seed).images])


def replicas(client, least: int, seconds: float = 60) -> set[str]:
    """Names of replicas, once so many of them have answered."""
    found, end = set(), time.monotonic() + seconds
    while len(found) < least and time.monotonic() < end:
        answer = client.get("/ready")
        if answer.status_code == 200:
            found.add(answer.headers["x-replica"])
    return found


def in_replica(name: str, work):
    """What a function returns in the process of a replica of `two`."""
    return ray.get(actor(name).__ray_call__.remote(lambda _: work()))


def actor(name: str):
    return ray.get_actor(f"SERVE_REPLICA::two#alitok#{name}", namespace="serve")


def metric(client, replica: str, name: str) -> float:
    """A number of one replica, 0 before there is one: the samples of each bear its name."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        answer = client.get("/metrics")
        if answer.headers.get("x-replica") == replica:
            samples = [line for line in answer.text.splitlines() if not line.startswith("#")]
            assert all(f'replica="{replica}"' in line for line in samples) and samples
            return next((float(line.split()[-1]) for line in samples if re.match(name, line)), 0.0)
    raise TimeoutError(f"no answer from {replica}")


def until(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


def test_images_are_the_same_from_every_replica(two, pipe):
    right = expected(pipe, 3, 2)
    found = set()
    end = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < end:
        response = ask(two, 3, 2)
        np.testing.assert_array_equal(pictures(response), right)
        found.add(response.headers["x-replica"])
    assert len(found) == 2


def test_answers_have_our_shape(two):
    wrong = ask(two, prompt="bagg")
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "prompt"
    assert two.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    large = two.post("/v1/images/generations", content=bytes(17_000_000))
    assert large.status_code == 413 and large.json()["error"]["param"] == "body"
    json = {"Content-Type": "application/json"}
    unknown = (bytes(100_000) for _ in range(170))  # of no length that is said beforehand
    pieces = two.post("/v1/images/generations", content=unknown, headers=json)
    assert pieces.status_code == 413 and pieces.json()["error"]["param"] == "body"
    assert two.get("/health").json() == {"status": "ok"}


def test_torch_has_the_threads_that_were_asked_for(two):
    for name in replicas(two, 2):
        assert in_replica(name, lambda: (os.environ["OMP_NUM_THREADS"], torch.get_num_threads())) == ("1", 1)


def test_rows_arrive_while_the_image_is_painted(two):
    with two.stream("POST", "/v1/images/generations", json={"prompt": "bag", "stream": True, "n": 4}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = [(time.monotonic(), piece) for piece in response.iter_raw()]
    kinds = re.findall(r"^event: image_generation\.(\w+)", b"".join(p for _, p in pieces).decode(), re.MULTILINE)
    assert kinds.count("completed") == 4 and "partial_image" in kinds
    assert len(pieces) > 4 and pieces[0][0] < pieces[-1][0]
    assert b"completed" not in pieces[0][1] and pieces[-1][1].endswith(b"data: [DONE]\n\n")


def test_who_hangs_up_frees_the_place(two):
    with two.stream("POST", "/v1/images/generations", json={"prompt": "bag", "stream": True, "n": 10}) as response:
        replica = response.headers["x-replica"]
        next(response.iter_raw())
    assert until(lambda: metric(two, replica, r"alitok_queue_length\{") == 0)
    assert metric(two, replica, r'alitok_images_total\{end="cancelled"') >= 1

    waiting = httpx.Client(base_url=two.base_url, timeout=0.3)
    before = {name: metric(two, name, r'alitok_images_total\{end="cancelled"') for name in replicas(two, 2)}
    with ThreadPoolExecutor(20) as pool:  # two seconds of work, which nobody waits for
        futures = [pool.submit(ask, waiting, seed, 10) for seed in range(20)]
    assert any(isinstance(future.exception(), httpx.TimeoutException) for future in futures)
    assert until(lambda: all(metric(two, name, r"alitok_queue_length\{") == 0 for name in before))
    assert any(metric(two, name, r'alitok_images_total\{end="cancelled"') > count for name, count in before.items())


def test_a_full_queue_is_said_in_json(deploy):
    small = deploy("small", max_images=1, max_queue=4, max_replicas=1)
    assert ask(small, n=10).status_code == 400, "more images than may wait"
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda seed: ask(small, seed, 2), range(24)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for refused in (answer for answer in answers if answer.status_code == 503):
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert refused.json()["error"]["code"] == "queue_full"
    serve.delete("small")


def test_every_request_ends_when_a_replica_is_killed(two, pipe):
    """With its image or with an error; afterwards there are two replicas again."""
    before = replicas(two, 2)
    victim, other = sorted(before)
    process = in_replica(victim, os.getpid)
    right = {seed: expected(pipe, seed, 10) for seed in range(24)}

    def request(seed: int):
        try:
            return ask(two, seed, 10)
        except httpx.HTTPError as error:
            return error

    with ThreadPoolExecutor(24) as pool:
        answered = metric(two, other, ANSWERED)
        futures = {seed: pool.submit(request, seed) for seed in right}
        assert until(lambda: metric(two, victim, r"alitok_queue_length\{") > 10)
        os.kill(process, signal.SIGKILL)
    ends = {seed: future.result() for seed, future in futures.items()}
    errors, by_other = 0, 0
    for seed, end in ends.items():
        if isinstance(end, httpx.Response) and end.status_code == 200:
            np.testing.assert_array_equal(pictures(end), right[seed])
            by_other += end.headers["x-replica"] == other
        else:
            errors += 1
            assert isinstance(end, httpx.HTTPError) or (end.status_code, end.text) == (500, "Internal Server Error")
    assert 0 < errors < len(ends), ends
    # The other replica has answered what came from it, and nothing else: nobody asked it again.
    assert metric(two, other, ANSWERED) - answered == by_other

    again = set()
    assert until(lambda: len(again.update(replicas(two, 1) - {victim}) or again) >= 2, 90)
    assert victim not in again
    np.testing.assert_array_equal(pictures(ask(two, 7)), expected(pipe, 7))


def test_a_stream_from_a_killed_replica_does_not_end_as_if_it_were_whole(two):
    with httpx.Client(base_url=two.base_url, timeout=60) as client:
        got = b""
        with client.stream("POST", "/v1/images/generations", json={"prompt": "bag", "stream": True, "n": 10}) as stream:
            alive = actor(stream.headers["x-replica"])
            with pytest.raises(httpx.HTTPError):
                for piece in stream.iter_raw():
                    got += piece
                    if alive is not None:
                        ray.kill(alive, no_restart=True)
                        alive = None
    assert b"[DONE]" not in got
    serve.delete("two")


def test_no_replica_starts_without_the_keys_that_were_there_when_it_was_deployed(deploy, monkeypatch):
    monkeypatch.setenv("ALITOK_API_KEYS", KEY)  # of this process, not of the replicas
    with pytest.raises(RuntimeError):
        deploy("open")
    assert "ALITOK_API_KEYS: expected in the environment of each replica" in str(serve.status().applications["open"])
    serve.delete("open")


def test_keys_hold_behind_a_prefix(deploy, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    keyed = deploy("keyed", api_keys=str(file))
    assert ask(keyed).status_code == 401 and ask(keyed).json()["error"]["type"] == "authentication_error"
    assert keyed.get("/ready").status_code == 200
    keyed.headers["Authorization"] = f"Bearer {KEY}"
    assert ask(keyed).status_code == 200
    serve.delete("keyed")


def test_a_model_that_is_not_there_is_said(deploy, tmp_path):
    with pytest.raises(RuntimeError):
        deploy("missing", model=str(tmp_path / "nothing"))
    assert "nothing" in str(serve.status().applications["missing"])
    serve.delete("missing")


def test_load_starts_a_second_replica(deploy):
    growing = deploy(
        "growing", max_images=1, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=0, downscale_delay_s=600
    )
    assert len(replicas(growing, 2, seconds=1)) == 1
    end, names = time.monotonic() + 60, set()

    def load(seed: int) -> None:
        while len(names) < 2 and time.monotonic() < end:
            names.add(ask(growing, seed, 4).headers["x-replica"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))
    assert len(names) == 2
    serve.delete("growing")
