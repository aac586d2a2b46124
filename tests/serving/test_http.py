"""The HTTP service on a real socket: the images of `Pipeline`, errors that name a field, limits that hold."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serving_here import served, until

from alitok_fast import SamplingParams
from alitok_fast.data.transforms import centre_crop, to_tensor
from alitok_fast.serving.settings import ServeSettings
from alitok_fast.storage.images import to_uint8

httpx = pytest.importorskip("httpx")
LIMIT = 60
JSON = {"Content-Type": "application/json"}
GENERATIONS, COMPLETIONS = "/v1/images/generations", "/v1/images/completions"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=LIMIT) as client:
        yield client


@pytest.fixture(scope="module")
def photo() -> bytes:
    data = pytest.importorskip("skimage.data")
    file = io.BytesIO()
    Image.fromarray(data.astronaut()).save(file, "JPEG")
    return file.getvalue()


def head(path: str, length: int) -> bytes:
    """The head of a request with a body of so many bytes."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def narrow_connection(server) -> socket.socket:
    """A connection that takes little before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    connection.settimeout(LIMIT)
    return connection


def in_base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def pixels_of(picture: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        return np.asarray(image.convert("RGB"))


def events_of(lines) -> list[tuple[str, dict]]:
    found, kind = [], None
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: ") and line != "data: [DONE]":
            found.append((kind, json.loads(line.removeprefix("data: "))))
        elif line == "data: [DONE]":
            found.append(("done", {}))
    return found


@contextlib.contextmanager
def slow_passes(server, seconds: float):
    """While inside, each turn of the server's engine takes so long."""
    loop = server.service.engine._scheduler._loop
    turn = loop.turn

    def slowly():
        time.sleep(seconds)
        return turn()

    loop.turn = slowly
    try:
        yield
    finally:
        loop.turn = turn


# ---- images ----


def test_generations_are_images_of_the_pipeline(client, pipe):
    asked = dict(prompt="bag", n=3, seed=7, image_id=4, guidance_scale=2.0, temperature=0.9, top_k=50, top_p=0.95)
    answer = client.post(GENERATIONS, json={**asked, "return_tokens": True}).raise_for_status().json()
    settings = {name: asked[name] for name in ("seed", "guidance_scale", "temperature", "top_k", "top_p")}
    expected = pipe(["bag"] * 3, image_ids=[4, 5, 6], **settings)
    assert (answer["prompt"], answer["class_name"], answer["model"]) == (8, "bag", "demo")
    assert answer["settings"] == {**settings, "guidance_power": pipe.generator.config.guidance_power}
    assert [image["image_id"] for image in answer["data"]] == [4, 5, 6]
    for image, tokens, pixels in zip(answer["data"], expected.tokens, expected.pixels, strict=True):
        assert image["tokens"] == tokens.tolist() and image["seed"] == 7
        assert np.array_equal(pixels_of(image["b64_json"]), pixels)


def test_a_file_holds_what_it_was_made_with(client, pipe):
    """`png` is the file itself; its text is enough to make the image again."""
    answer = client.post(GENERATIONS, json=dict(prompt=3, seed=5, response_format="png")).raise_for_status()
    assert answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as image:
        pixels, made = np.asarray(image), json.loads(image.info["alitok_fast"])
    settings = {name: made[name] for name in SamplingParams().to_dict()}
    again = pipe([made["label"]], image_ids=[made["image_id"]], **settings)
    assert np.array_equal(again.pixels[0], pixels) and made["model"] == "demo"


def test_requests_at_the_same_time_share_passes(server, client, pipe):
    """What 24 clients ask for at once are the images of one at a time, in fewer passes than images have."""
    before = server.service.engine.stats()

    async def ask():
        async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT) as together:
            posts = [together.post(GENERATIONS, json=dict(prompt=i % 10, image_id=i)) for i in range(24)]
            return await asyncio.gather(*posts)

    answers = [answer.raise_for_status().json() for answer in asyncio.run(ask())]
    expected = pipe([i % 10 for i in range(24)])
    for answer, pixels in zip(answers, expected.pixels, strict=True):
        assert np.array_equal(pixels_of(answer["data"][0]["b64_json"]), pixels)
    after = server.service.engine.stats()
    assert after.image_passes - before.image_passes > 1.5 * (after.passes - before.passes)


def test_a_stream_shows_rows_and_ends_with_the_images(server, client, pipe, stage1):
    with (
        slow_passes(server, 0.01),
        client.stream("POST", GENERATIONS, json=dict(prompt="coat", n=2, seed=1, stream=True)) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.iter_lines())
    assert events.pop() == ("done", {})
    rows = [(event["index"], event["rows"]) for kind, event in events if kind == "image_generation.partial_image"]
    assert rows and all(of_rows == 8 for of_rows in {event.get("of_rows", 8) for _, event in events})
    for index in (0, 1):
        mine = [row for i, row in rows if i == index]
        assert mine == sorted(set(mine))
    for kind, event in events:
        assert event["type"] == kind
        if kind == "image_generation.partial_image":
            assert pixels_of(event["b64_json"]).shape == (event["rows"] * stage1.config.patch_size, 32, 3)
    completed = {event["index"]: event for kind, event in events if kind == "image_generation.completed"}
    for index, pixels in enumerate(pipe(["coat"] * 2, seed=1).pixels):
        assert np.array_equal(pixels_of(completed[index]["b64_json"]), pixels)
        assert completed[index]["class_name"] == "coat" and completed[index]["image_id"] == index


def test_completions_keep_the_upper_rows(client, pipe, photo):
    config = pipe.tokenizer.config
    for rows in (0, 3, config.grid):
        asked = dict(prompt="shirt", image=in_base64(photo), rows=rows, seed=2, n=2, return_tokens=True)
        answer = client.post(COMPLETIONS, json=asked).raise_for_status().json()
        with Image.open(io.BytesIO(photo)) as image:
            crop = centre_crop(np.asarray(image), config.image_size)
        tokens = pipe.tokenizer.encode(to_tensor(crop[None]))[:, : config.num_prefix_tokens + rows * config.grid]
        expected = pipe(["shirt"] * 2, seed=2, prompt_tokens=tokens.repeat(2, 1))
        assert answer["rows_kept"] == rows
        assert [image["tokens"] for image in answer["data"]] == expected.tokens.tolist()
    half = client.post(COMPLETIONS, json=dict(prompt="shirt", image=in_base64(photo))).raise_for_status().json()
    assert half["rows_kept"] == config.grid // 2


def test_photographs_to_tokens_and_back(client, pipe, photo):
    """The tokenizer's tokens; a reconstruction from the picture is that from its tokens."""
    picture = f"data:image/jpeg;base64,{in_base64(photo)}"
    tokens = client.post("/v1/tokens", json=dict(image=picture)).raise_for_status().json()["tokens"]
    with Image.open(io.BytesIO(photo)) as image:
        crop = centre_crop(np.asarray(image), 32)
    assert tokens == pipe.tokenizer.encode(to_tensor(crop[None]))[0].tolist()
    expected = to_uint8(pipe.image_decoder(torch.tensor([tokens])))[0]
    for asked in (dict(image=picture), dict(tokens=tokens)):
        answer = client.post("/v1/reconstructions", json=asked).raise_for_status().json()
        assert answer["tokens"] == tokens
        assert np.array_equal(pixels_of(answer["data"][0]["b64_json"]), expected)
        assert "crop_b64_json" not in answer["data"][0]
        more = client.post("/v1/reconstructions", json=asked | dict(return_crop=True)).raise_for_status().json()
        if "image" in asked:
            assert np.array_equal(pixels_of(more["data"][0].pop("crop_b64_json")), crop)
            error = ((crop.astype(float) - expected) ** 2).mean()
            assert answer["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
        else:
            assert answer["psnr"] is None
    file = client.post("/v1/reconstructions", json=dict(tokens=tokens, response_format="png")).raise_for_status()
    with Image.open(io.BytesIO(file.content)) as image:
        assert np.array_equal(np.asarray(image), expected)


# ---- what else there is ----


def test_models_health_and_metrics(client, pipe):
    (model,) = client.get("/v1/models").raise_for_status().json()["data"]
    assert model["id"] == "demo" and model["classes"] == list(pipe.classes) and model["rows_while_sampling"]
    assert client.get("/v1/models/demo").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json() == {"status": "ready"}
    client.post(GENERATIONS, json=dict(prompt=1)).raise_for_status()
    client.post(GENERATIONS, json=dict(prompt=99))
    # A request is counted just after its answer was sent.
    until(lambda: [line for line in client.get("/metrics").text.splitlines() if GENERATIONS in line and "400" in line])
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    parser = pytest.importorskip("prometheus_client.parser")
    found = {
        sample.name: [] for family in parser.text_string_to_metric_families(answer.text) for sample in family.samples
    }
    for family in parser.text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    for name in ("queue_length", "sequences_in_use", "passes_total", "tokens_total", "passes_per_token"):
        assert len(found[f"alitok_{name}"]) == 1
    assert dict((labels["end"], value) for labels, value in found["alitok_images_total"])["finished"] >= 1
    assert {labels["quantile"] for labels, _ in found["alitok_image_seconds_quantile"]} == {"0.5", "0.95", "0.99"}
    buckets = [value for labels, value in found["alitok_image_seconds_bucket"]]
    assert buckets == sorted(buckets) and buckets[-1] == found["alitok_image_seconds_count"][0][1]
    requests = {(labels["route"], labels["status"]): value for labels, value in found["alitok_http_requests_total"]}
    assert requests[GENERATIONS, "200"] >= 1 and requests[GENERATIONS, "400"] >= 1


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/").raise_for_status()
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in answer.text.replace("http://www.w3.org/", "") and "https://" not in answer.text


# ---- errors ----


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (GENERATIONS, {}, "prompt", "prompt: field required, got nothing"),
        (GENERATIONS, {"prompt": "hat"}, "prompt", "prompt: expected a number in 0..9 or a class name, such as"),
        (GENERATIONS, {"prompt": 10}, "prompt", "prompt: expected values in [0, 10), got 10"),
        (GENERATIONS, {"prompt": 1, "n": 0}, "n", "n: input should be greater than or equal to 1, got 0"),
        (GENERATIONS, {"prompt": 1, "n": 11}, "n", "n: expected at most 10, got 11"),
        (GENERATIONS, {"prompt": 1, "n": "2"}, "n", "n: input should be a valid integer, got '2'"),
        (GENERATIONS, {"prompt": 1, "size": "64x64"}, "size", "size: expected 'auto' or '32x32', got '64x64'"),
        (GENERATIONS, {"prompt": 1, "top_p": 1.5}, "top_p", "top_p: input should be less than or equal to 1, got 1.5"),
        (GENERATIONS, {"prompt": 1, "temperature": 1e-40}, "temperature", "temperature: expected 0 or a number in"),
        (GENERATIONS, {"prompt": 1, "seed": 2**63}, "seed", "seed: input should be less than"),
        (GENERATIONS, {"prompt": 1, "quality": "hd"}, "quality", "quality: expected one of the fields prompt, "),
        (
            GENERATIONS,
            {"prompt": True},
            "prompt",
            "prompt: input should be the number or the name of a class, got True",
        ),
        (GENERATIONS, {"prompt": [1]}, "prompt", "prompt: input should be the number or the name of a class, got list"),
        (GENERATIONS, {"prompt": "--5"}, "prompt", "prompt: expected a number in 0..9 or a class name, such as"),
        (GENERATIONS, {"prompt": "\u00b2"}, "prompt", "prompt: expected a number in 0..9 or a class name, such as"),
        (GENERATIONS, {"prompt": "9" * 900}, "prompt", "prompt: expected values in [0, 10), got 999"),
        (GENERATIONS, {"prompt": 1, "\ud800": 1}, "\\ud800", "\\ud800: expected one of the fields prompt, "),
        (GENERATIONS, [1], "body", "body: input should be"),
        (
            GENERATIONS,
            {"prompt": 1, "n": 2, "response_format": "png"},
            "response_format",
            "response_format: expected b64",
        ),
        (COMPLETIONS, {"prompt": 1}, "image", "image: field required"),
        (COMPLETIONS, {"prompt": 1, "image": "?"}, "image", "image: expected the picture in base64 or as a data URL"),
        (COMPLETIONS, {"prompt": 1, "image": "aGVsbG8="}, "image", "image: expected a readable image in one of"),
        (COMPLETIONS, {"prompt": 1, "image": "data:image/png"}, "image", "image: expected base64 after 'data:"),
        ("/v1/tokens", {"image": ""}, "image", "image: expected a readable image"),
        ("/v1/reconstructions", {}, "image", "image: expected image or tokens, got neither"),
        ("/v1/reconstructions", {"tokens": [1, 2]}, "tokens", "tokens: expected 73, got 2"),
        ("/v1/reconstructions", {"tokens": [5000] * 73}, "tokens", "tokens: expected numbers in [0, 1024), got 5000"),
    ],
    ids=str,
)
def test_errors_name_the_field(path, body, param, message, client):
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message) and error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("letter", ["x", "\ufdfa"])  # the second is 18 letters where names are compared
def test_a_long_prompt_is_not_compared_with_names(letter, client):
    """Which would take seconds, in which nobody else is answered."""
    answer = client.post(GENERATIONS, json=dict(prompt=letter * 2_000_000))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("prompt: input should be a class of at most 1000 characters")


def test_a_jpeg_of_many_scans_is_not_decoded(client):
    """Each scan costs a pass over all pixels and only some bytes: a small file could take minutes."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    scan, end = data[last:-2], data[-2:]
    for repeated, status in ((50, 200), (200, 400)):
        encoded = base64.b64encode(data[:last] + scan * repeated + end).decode()
        answer = client.post("/v1/tokens", json=dict(image=encoded))
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"].startswith("image: expected a JPEG of at most 100 scans, got 2")


def test_another_model_is_not_found(client):
    answer = client.post(GENERATIONS, json=dict(prompt=1, model="dall-e-3"))
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": 1, "n": 1e400}']
)
def test_bodies_that_are_no_request(body, client):
    answer = client.post(GENERATIONS, content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_other_methods_and_paths(client):
    assert client.get("/health/").json()["error"]["message"] == "Not Found"
    assert client.get(GENERATIONS).status_code == 405 and client.get("/v2").json()["error"]["message"] == "Not Found"
    for path in ("/", "/health", "/ready", "/metrics", "/v1/models"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == 200 and not head.content
        assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_what_a_page_of_another_origin_may_send_unasked_is_not_taken(kind, client):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post(GENERATIONS, content=b'{"prompt": 1}', headers=headers)
    assert answer.status_code == 415 and "expected application/json, got" in answer.text
    typed = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post(GENERATIONS, content=b'{"prompt": 1}', headers=typed).status_code == 200


def test_the_server_answers_to_its_names_alone(pipe, stage1, client):
    """On loopback to those of loopback: another name that leads there is that of a page which should not."""
    for name, status in (("localhost", 200), ("LOCALHOST:80", 200), ("[::1]:8000", 200), ("evil.example", 400)):
        answer = client.get("/v1/models", headers={"Host": name})
        assert answer.status_code == status, name
    assert answer.json()["error"]["param"] == "host" and "--allowed-hosts" in answer.text
    with served(pipe, stage1, allowed_hosts="images.example, other.example") as server:
        for name, status in (("images.example", 200), ("other.example.:443", 200), ("localhost", 400)):
            assert httpx.get(f"{server.url}/ready", headers={"Host": name}).status_code == status
    assert ServeSettings(host="0.0.0.0").host_names() == frozenset()
    assert "127.0.0.2" in ServeSettings(host="127.0.0.2").host_names() and ServeSettings(host="LOCALHOST").host_names()
    given = ServeSettings(allowed_hosts="A.example:8443, [::1]:80, ::1, 10.0.0.1").host_names()
    assert given == {"a.example", "::1", "10.0.0.1"}
    with socket.create_connection(("127.0.0.1", client.base_url.port), LIMIT) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # as a check of a load balancer may
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_poisoned_class_among_good_ones(pipe, stage1):
    from test_engine import poisoned

    with served(poisoned(pipe, "class"), stage1) as server, httpx.Client(base_url=server.url, timeout=LIMIT) as client:
        bad = client.post(GENERATIONS, json=dict(prompt=4, n=3))
        assert bad.status_code == 500 and bad.json()["error"]["type"] == "server_error"
        assert "expected finite logits" in bad.json()["error"]["message"]
        good = client.post(GENERATIONS, json=dict(prompt=2)).raise_for_status().json()
        assert np.array_equal(pixels_of(good["data"][0]["b64_json"]), pipe([2]).pixels[0])
        with client.stream("POST", GENERATIONS, json=dict(prompt=4, stream=True)) as answer:
            kinds = [kind for kind, _ in events_of(answer.iter_lines())]
        assert kinds[-2:] == ["error", "done"]


def test_many_errors_cost_little(client):
    """A list of wrong items, or thousands of unknown fields, is one error and not thousands."""
    many = client.post("/v1/reconstructions", json={"tokens": [""] * 100_000})
    assert many.status_code == 400 and many.json()["error"]["message"].startswith(
        "tokens: list should have at most 4096"
    )
    fields = client.post(GENERATIONS, json={"prompt": 1, **{f"x{i}": i for i in range(20_000)}})
    assert fields.status_code == 400 and "x0: expected one of the fields prompt," in fields.text
    long = client.post(GENERATIONS, json={"prompt": 1, "x" * 10_000: 1})
    assert long.status_code == 400 and len(long.content) < 2000


def test_methods_of_a_clients_own_are_one_series(client):
    client.request("BREW", "/health")
    assert "BREW" not in client.get("/metrics").text


# ---- limits ----


def test_bodies_and_pictures_have_limits(pipe, stage1, photo):
    with (
        served(pipe, stage1, max_body_mb=0.2, max_megapixels=0.2) as server,
        httpx.Client(base_url=server.url, timeout=LIMIT) as client,
    ):
        large = client.post("/v1/tokens", json=dict(image="A" * 300_000))
        assert large.status_code == 413 and large.json()["error"]["param"] == "body"

        def pieces():  # without a length in the header
            yield b'{"image": "'
            for _ in range(300):
                yield b"A" * 1000
            yield b'"}'

        chunked = client.post("/v1/tokens", content=pieces(), headers=JSON)
        assert chunked.status_code == 413
        # 512 x 512 pixels are more than 0.2 million; a picture of 30,000 x 30,000 is a small file.
        answer = client.post("/v1/tokens", json=dict(image=in_base64(photo)))
        assert answer.status_code == 400 and "expected at most 200000 pixels, got 262144" in answer.text
        bomb = io.BytesIO()
        Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
        answer = client.post("/v1/tokens", json=dict(image=in_base64(bomb.getvalue())))
        assert answer.status_code in (400, 413)
        client.post(GENERATIONS, json=dict(prompt=1)).raise_for_status()


def test_bodies_are_limited_together(pipe, stage1, photo):
    """What is read but not answered yet counts, and small ones do not; when it is answered, there is room again."""
    with Image.open(io.BytesIO(photo)) as picture:
        picture.save(file := io.BytesIO(), "PNG")
    body = json.dumps(dict(image=in_base64(file.getvalue()))).encode()
    limits = dict(max_body_mb=1.1 * len(body) / 1e6, max_bodies_mb=2.5 * len(body) / 1e6)
    with served(pipe, stage1, **limits) as server:

        def tokens():
            return httpx.post(f"{server.url}/v1/tokens", content=body, headers=JSON, timeout=LIMIT)

        with contextlib.ExitStack() as held:
            for _ in range(2):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", server.port), LIMIT))
                connection.sendall(head("/v1/tokens", len(body)) + body[:-1])
            until(lambda: tokens().status_code == 503)
            refused = tokens()
            assert refused.json()["error"] | {"message": ""} == {
                "message": "", "type": "overloaded_error", "param": "body", "code": "queue_full",
            }  # fmt: skip
            assert refused.headers["retry-after"] == "1"
            httpx.post(f"{server.url}{GENERATIONS}", json=dict(prompt=1), timeout=LIMIT).raise_for_status()
        until(lambda: tokens().status_code == 200)


@pytest.mark.parametrize("kind, status", [("application/json", 413), ("text/plain", 413), ("text/plain", 415)])
def test_a_refusal_reaches_a_client_that_still_sends(kind, status, server):
    """The rest of its body is read and dropped: to close the connection would take the answer back."""
    size = 40_000_000 if status == 413 else 15_000_000
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
    for _ in range(3):
        connection.request("POST", GENERATIONS, body=bytes(size), headers={"Content-Type": kind})
        answer = connection.getresponse()
        assert answer.status == status and json.loads(answer.read())["error"]["message"]
    connection.close()


@pytest.mark.parametrize(
    "sent", [b"", b"GET /ready HTTP/1.1\r\nHost: localh", b"\x16\x03\x01"], ids=["none", "half", "tls"]
)
def test_connections_that_ask_for_nothing_are_closed(sent, pipe, stage1):
    with served(pipe, stage1, stall_seconds=0.4) as server:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection:
            began = time.monotonic()
            connection.sendall(sent)
            connection.settimeout(LIMIT)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):  # what is no HTTP may be told so
                    pass
            assert time.monotonic() - began < 10
        httpx.get(f"{server.url}/ready").raise_for_status()


def test_connections_beyond_the_limit_are_refused_in_json(pipe, stage1):
    with served(pipe, stage1, max_connections=2) as server, contextlib.ExitStack() as kept:
        clients = [kept.enter_context(httpx.Client(base_url=server.url, timeout=LIMIT)) for _ in range(2)]
        for client in clients:
            client.get("/ready").raise_for_status()
        answer = httpx.get(f"{server.url}/ready")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["message"].startswith("connections: expected fewer at the same time")
        clients[0].close()
        until(lambda: len(server.connections) < 2)
        httpx.get(f"{server.url}/ready").raise_for_status()


def test_a_connection_in_use_is_kept(pipe, stage1):
    """Pauses shorter than `stall_seconds`, and an answer that takes longer, end no connection."""
    with served(pipe, stage1, stall_seconds=0.4) as server, httpx.Client(base_url=server.url, timeout=LIMIT) as client:
        ports = set()
        for _ in range(4):
            answer = client.get("/ready")
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(0.2)
        with slow_passes(server, 0.3):
            answer = client.post(GENERATIONS, json=dict(prompt=1)).raise_for_status()
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(ports) == 1


def test_an_answer_that_nobody_reads_frees_its_connection(pipe, stage1):
    """Also where all of it was written before it was noticed that nobody reads."""
    with served(pipe, stage1, stall_seconds=0.4, max_n=200, max_queue=200) as server:
        connection = narrow_connection(server)
        body = json.dumps(dict(prompt=1, n=200, guidance_scale=0, return_tokens=True)).encode()
        connection.sendall(head(GENERATIONS, len(body)) + body)
        until(lambda: server.connections)
        until(lambda: server.service.engine.stats().requests["finished"] >= 201)
        until(lambda: not server.connections)
        connection.close()


@pytest.mark.parametrize("path", ["/", "/v1/models"])
def test_a_client_that_asks_and_asks_and_reads_nothing_is_dropped(path, pipe, stage1, tmp_path):
    """Whoever answers: the application, or what stands before it."""
    (tmp_path / "keys").write_text("key")
    with served(pipe, stage1, stall_seconds=0.4, api_keys=str(tmp_path / "keys")) as server:
        connection = narrow_connection(server)
        connection.settimeout(0.2)
        asks = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 1000
        with contextlib.suppress(OSError):  # the server reads no more, or has dropped it
            for _ in range(200):
                connection.sendall(asks)
        until(lambda: not server.connections)
        connection.close()


def test_a_slow_reader_gets_all_of_its_answer(pipe, stage1):
    """As long as it reads at all: here for much longer than `stall_seconds`."""
    with served(pipe, stage1, stall_seconds=0.5) as server:
        tokens = pipe(["bag"]).tokens[0].tolist()
        body = json.dumps(dict(tokens=tokens)).encode()
        connection = narrow_connection(server)
        service, large = server.service, np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
        service._decode = lambda *_: (large, None)
        connection.sendall(head("/v1/reconstructions", len(body)) + body)
        began, answer = time.monotonic(), b""
        while time.monotonic() - began < 3:  # 8 MB would take 40 s
            answer += connection.recv(20_000)
            time.sleep(0.1)
        while len(answer) < 8_000_000:
            piece = connection.recv(1_000_000)
            assert piece, "the server has ended the connection"
            answer += piece
        connection.close()


def test_a_body_that_does_not_come(pipe, stage1):
    """A client that stops in the middle is answered and let go; nothing waits for it."""
    with served(pipe, stage1, stall_seconds=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection:
            connection.sendall(head("/v1/tokens", 99) + b"{")
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408")
        httpx.post(f"{server.url}{GENERATIONS}", json=dict(prompt=1), timeout=LIMIT).raise_for_status()


def test_keys(pipe, stage1, monkeypatch, tmp_path):
    """One out of the environment or of a file; without, nothing under /v1 answers, and the rest does."""
    (tmp_path / "keys").write_text("from a file\n\n")
    monkeypatch.setenv("ALITOK_API_KEYS", "first, second")
    with (
        served(pipe, stage1, api_keys=str(tmp_path / "keys")) as server,
        httpx.Client(base_url=server.url, timeout=LIMIT) as client,
    ):
        for key in ("first", "second", "from a file"):
            headers = {"Authorization": f"Bearer {key}"}
            client.post(GENERATIONS, json=dict(prompt=1), headers=headers).raise_for_status()
        for given, got in ((None, "none"), ("Bearer firs", "another"), ("first", "none"), ("Bearer", "none")):
            headers = {} if given is None else {"Authorization": given}
            for answer in (
                client.post(GENERATIONS, json={}, headers=headers),
                client.get("/v1/models", headers=headers),
            ):
                assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["message"].endswith(f"got {got}")
        assert client.get("/ready").status_code == 200 and client.get("/metrics").status_code == 200
        described = client.get("/openapi.json").json()
        assert described["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_settings_are_checked(tmp_path, monkeypatch):
    for options, message in (
        (dict(max_n=0), "max_n: expected at least 1, got 0"),
        (dict(port=70000), "port: expected a number in"),
        (dict(timeout=0.0), "timeout: expected a number above 0, at most 1e.06, got 0.0"),
        (dict(grace_seconds=1e7), "grace_seconds: expected a number above 0, at most 1e.06, got 10000000.0"),
        (dict(max_body_mb=float("nan")), "max_body_mb: expected a number above 0"),
        (dict(max_images=0), "max_images: expected at least 1"),
        (dict(max_bodies_mb=1.0), "max_bodies_mb: expected at least max_body_mb, 16, got 1.0"),
        (dict(allowed_hosts=" ,"), "allowed_hosts: expected names of hosts, got ' ,'"),
        (dict(allowed_hosts="*"), "allowed_hosts: expected names of hosts"),
        (dict(allowed_hosts="http://a.example"), "allowed_hosts: expected names of hosts"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeSettings(**options)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="api_keys: expected a file with a key per line"):
        ServeSettings(api_keys=str(tmp_path / "empty")).keys()
    with pytest.raises(ValueError, match="api_keys: expected a file with a key per line, got .*No such file"):
        ServeSettings(api_keys=str(tmp_path / "missing")).keys()
    for blank in ("", " , "):  # a secret that nobody filled in
        monkeypatch.setenv("ALITOK_API_KEYS", blank)
        with pytest.raises(ValueError, match="ALITOK_API_KEYS: expected keys with commas between them"):
            ServeSettings().keys()
    (tmp_path / "marked").write_text("a key", encoding="utf-8-sig")  # as some editors write
    monkeypatch.setitem(os.environb, b"ALITOK_API_KEYS", b"\xff\xfe")
    assert ServeSettings(api_keys=str(tmp_path / "marked")).keys() == (b"\xff\xfe", b"a key")


def test_clients_are_not_told_where_the_model_lies(pipe, stage1, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe, "source", str(tmp_path))
    with served(pipe, stage1) as server, httpx.Client(base_url=server.url, timeout=LIMIT) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == tmp_path.name
        body = client.post(GENERATIONS, json=dict(prompt=1, model=tmp_path.name)).raise_for_status().json()
        text = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))).info["alitok_fast"]
    assert body["model"] == json.loads(text)["model"] == tmp_path.name
    assert str(tmp_path) not in text + json.dumps(body)


def test_a_full_queue_is_told_at_once(pipe, stage1):
    """503 with Retry-After, all of a request's images or none; those that were taken are answered."""
    with (
        served(pipe, stage1, max_images=1, max_queue=5) as server,
        slow_passes(server, 0.05),
    ):

        async def ask():
            async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT) as client:
                posts = [client.post(GENERATIONS, json=dict(prompt=1, image_id=i)) for i in range(12)]
                answers = await asyncio.gather(*posts, client.post(GENERATIONS, json=dict(prompt=1, n=5)))
                too_many = await client.post(GENERATIONS, json=dict(prompt=1, n=6))
                assert too_many.status_code == 400 and "n: expected at most 5, got 6" in too_many.text
                return answers

        answers = asyncio.run(ask())
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 503} and statuses[200] >= 2 and statuses[503] >= 3
        assert answers[-1].status_code == 503
        for answer in answers:
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1" and answer.json()["error"]["code"] == "queue_full"
        until(lambda: server.service.engine.stats().sequences_in_use == 0)


def test_a_request_that_takes_too_long(pipe, stage1):
    with served(pipe, stage1, timeout=0.2) as server, slow_passes(server, 0.5):
        answer = httpx.post(f"{server.url}{GENERATIONS}", json=dict(prompt=1), timeout=LIMIT)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        until(lambda: server.service.engine.stats().sequences_in_use == 0)


def test_all_that_a_request_waits_for_has_one_timeout(pipe, stage1, photo):
    """A completion that is encoded for most of the time has the rest of it for its image, not as much again."""
    with served(pipe, stage1, timeout=1.5) as server, slow_passes(server, 0.3):
        call, began = server.service.engine.call, time.monotonic()

        def slowly(work):
            return call(lambda: (time.sleep(1.2), work())[1])

        server.service.engine.call = slowly
        asked = dict(prompt=1, image=in_base64(photo))
        answer = httpx.post(f"{server.url}{COMPLETIONS}", json=asked, timeout=LIMIT)
        assert answer.status_code == 504 and time.monotonic() - began < 2.6
        assert "expected an answer within 1.5 s" in answer.text


def test_what_goes_wrong_inside_is_the_servers_fault(pipe, stage1, caplog):
    """An error that names an argument is a request's fault only where the request's fields are checked."""
    with served(pipe, stage1) as server:

        def broken(work):
            raise ValueError("tokens: expected something else, got a secret")

        server.service.engine.call = broken
        answer = httpx.post(f"{server.url}/v1/reconstructions", json=dict(tokens=[1] * 73), timeout=LIMIT)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text and "got a secret" in caplog.text


# ---- clients ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_client_that_goes_frees_what_it_held(stream, pipelined, server, client, pipe):
    engine = server.service.engine
    before = engine.stats().requests
    with slow_passes(server, 0.05):
        body = json.dumps(dict(prompt=1, n=10, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection:
            connection.sendall(head(GENERATIONS, len(body)) + body)
            until(lambda: engine.stats().running > 0)
            if pipelined:  # in a packet of its own
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
                time.sleep(0.1)
        until(lambda: engine.stats().requests["cancelled"] - before["cancelled"] == 10)
        until(lambda: engine.stats().sequences_in_use == 0 and engine.stats().queue_length == 0)
    answer = client.post(GENERATIONS, json=dict(prompt=1)).raise_for_status().json()
    assert np.array_equal(pixels_of(answer["data"][0]["b64_json"]), pipe([1]).pixels[0])


def test_a_reader_that_reads_nothing_holds_up_nobody(pipe, stage1, caplog):
    """Its connection is dropped after a while, and its request is over; others are served meanwhile."""
    with served(pipe, stage1, stall_seconds=1.0, max_n=1000, max_queue=2000) as server:
        connection = narrow_connection(server)
        body = json.dumps(dict(prompt=1, n=1000, guidance_scale=0, stream=True)).encode()
        connection.sendall(head(GENERATIONS, len(body)) + body)
        engine = server.service.engine
        until(lambda: engine.stats().running > 0)
        for image_id in range(3):
            answer = httpx.post(f"{server.url}{GENERATIONS}", json=dict(prompt=2, image_id=image_id), timeout=LIMIT)
            answer.raise_for_status()
        until(lambda: engine.stats().sequences_in_use == 0 and engine.stats().queue_length == 0)
        stats = engine.stats().requests
        assert stats["finished"] + stats["cancelled"] == 1000 + 3 + 1 and stats["failed"] == 0
        until(lambda: 'status="499"' in httpx.get(f"{server.url}/metrics").text)
        connection.close()
    assert "a client read nothing for 1 s, and was dropped" in caplog.text and "Traceback" not in caplog.text


def test_many_clients_in_threads_get_their_own(server, pipe):
    """Nothing is lost, doubled or exchanged between 16 clients with 6 requests each on kept connections."""
    expected = pipe([2] * 96, seed=4).pixels
    found = Counter()

    def ask(number):
        with httpx.Client(base_url=server.url, timeout=LIMIT) as client:
            for image_id in range(number * 6, number * 6 + 6):
                asked = dict(prompt=2, seed=4, image_id=image_id)
                image = client.post(GENERATIONS, json=asked).raise_for_status().json()["data"][0]
                assert image["image_id"] == image_id
                assert np.array_equal(pixels_of(image["b64_json"]), expected[image_id])
                found[image_id] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert found == Counter(range(96))


def test_the_openai_client_as_documented(server, pipe):
    pytest.importorskip("openai")
    code = re.search(r"^```python\n(from openai.*?)^```", (ROOT / "docs/serving.md").read_text(), re.M | re.S).group(1)
    assert "http://localhost:8000/" in code
    names: dict = {}
    exec(compile(code.replace("http://localhost:8000", server.url), "docs/serving.md", "exec"), names)
    expected = pipe(["bag"] * 2, seed=3, guidance_scale=2.5).pixels
    for image, pixels in zip(names["images"], expected, strict=True):
        assert np.array_equal(pixels_of(image.b64_json), pixels)


# ---- the process ----


@pytest.fixture
def process():
    """The command on a free port, and its address once it is ready; killed in the end."""
    started = []

    def start(*options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "alitok_fast.cli", "serve", "--port", str(port), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield start
    for each in started:
        each.kill()
        each.wait()


def is_ready(url) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs(number, process, pipe):
    """Requests under way are answered with their images; then the process ends, and its port is free."""
    running, url = process("--max-images", "1", "--max-n", "50")
    until(lambda: is_ready(url))
    answers = []

    def ask(first):
        answers.append(httpx.post(f"{url}{GENERATIONS}", json=dict(prompt=1, n=50, image_id=first), timeout=LIMIT))

    def waiting() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("alitok_queue_length "))

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 50, 100)]
    for thread in threads:
        thread.start()
    until(lambda: waiting() > 100)  # all three have been read
    running.send_signal(number)
    for thread in threads:
        thread.join(LIMIT)
    assert running.wait(LIMIT) in (0, 130, -number)
    assert len(answers) == 3
    expected = pipe([1] * 150).pixels
    for answer in answers:
        for image in answer.raise_for_status().json()["data"]:
            assert np.array_equal(pixels_of(image["b64_json"]), expected[image["image_id"]])
    assert not is_ready(url)
    assert "Traceback" not in running.stderr.read()


@pytest.mark.slow
def test_what_takes_longer_than_the_grace_is_told_so(process):
    running, url = process("--max-images", "1", "--max-n", "100", "--grace-seconds", "0.5")
    until(lambda: is_ready(url))
    answers, events = [], []

    def ask(stream):
        asked = dict(prompt=1, n=100, stream=stream)
        with httpx.stream("POST", f"{url}{GENERATIONS}", json=asked, timeout=LIMIT) as answer:
            (events if stream else answers).extend(answer.iter_lines() if stream else [(answer, answer.read())])

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    until(lambda: "alitok_queue_length 0.0" not in httpx.get(f"{url}/metrics").text)
    time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(LIMIT)
    assert running.wait(LIMIT) in (0, -signal.SIGTERM)
    ((answer, body),) = answers
    assert answer.status_code == 503 and json.loads(body)["error"]["code"] == "stopping"
    assert '"stopping"' in "".join(events) and [line for line in events if line][-1] == "data: [DONE]"
    assert "Traceback" not in running.stderr.read()


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(process):
    running, url = process()
    until(lambda: is_ready(url))
    for options, message in (
        (("--model", "nowhere"), "path_or_name: expected"),
        (("--stage1", "demo"), "stage1: expected a causal decoder"),
        (("--port", url.rsplit(":", 1)[1]), "port: expected one that is free"),
        (("--max-images", "100000000"), "max_images: expected at most the"),
        (("--host", "nowhere.invalid"), "host: expected an address of this machine, got 'nowhere.invalid'"),
        (("--top", "1"), "No such option"),
    ):
        other, _ = process(*options)
        _, errors = other.communicate(timeout=LIMIT)
        assert other.returncode in (1, 2) and message in errors and "Traceback" not in errors
