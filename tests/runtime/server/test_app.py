"""The server: images are those of the pipeline, and whatever goes wrong is an answer that says so."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import Served, serving
from sharing import busy, until
from starlette.applications import Starlette
from starlette.routing import Mount

from par_runtime import Batcher, Pipeline, RequestError
from par_runtime.errors import CudaError
from par_runtime.server import application


@pytest.fixture(scope="module")
def pipeline(shared_pipelines: Callable[[str], Pipeline]) -> Pipeline:
    return shared_pipelines("ONNX Runtime")


@pytest.fixture
def batcher(pipeline: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipeline, max_waiting=6) as made:
        yield made


@pytest.fixture
def served(batcher: Batcher) -> Iterator[Served]:
    with serving(application(batcher)) as server:
        yield server


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_an_image_is_that_of_the_pipeline_and_a_file_that_can_be_made_again(served: Served, pipeline: Pipeline) -> None:
    answer = served.get("/v1/images?label=3&seed=7&guidance=2&top_k=5")
    wanted = pipeline.generate(3, seed=7, guidance=2.0, top_k=5)
    assert (answer.code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.body == wanted.to_bytes()
    assert answer.headers["x-parvis-seed"] == "7"
    assert answer.headers["content-disposition"] == 'inline; filename="sea-otter-7.png"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    larger = served.get("/v1/images?label=3&seed=7&guidance=2&top_k=5&scale=2")
    assert (pixels(larger.body) == wanted.images[0].repeat(2, 0).repeat(2, 1)).all()  # type: ignore[index]


def test_without_a_seed_each_image_is_another_one_and_says_its_seed(served: Served) -> None:
    first, second = (served.get("/v1/images?label=3") for _ in range(2))
    assert first.body != second.body
    assert first.headers["cache-control"] == "no-store"
    assert "etag" not in first.headers
    assert served.get(f"/v1/images?label=3&seed={first.headers['x-parvis-seed']}").body == first.body


def test_an_image_that_the_client_has_is_not_made_again(served: Served, batcher: Batcher) -> None:
    first = served.get("/v1/images?label=3&seed=7")
    made = batcher.images
    again = served.get("/v1/images?seed=7&label=3", If_None_Match=f'"other", {first.headers["etag"]}')
    assert (again.code, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert batcher.images == made
    path, tag = "/v1/images?label=3&seed=7", first.headers["etag"]
    assert [served.get(path, If_None_Match=each).code for each in ("*", f"W/{tag}")] == [304, 304]
    assert batcher.images == made
    others = [served.get(path, If_None_Match=each).code for each in (f"x{tag}", tag.strip('"'), '"other"')]
    assert [*others, served.get("/v1/images?label=3&seed=8", If_None_Match=tag).code] == [200] * 4
    assert batcher.images == made + 4


def test_openais_form_gives_images_with_their_seeds(served: Served, pipeline: Pipeline) -> None:
    answer = served.post("/v1/images/generations", {"prompt": "2", "n": 3, "seed": 4, "temperature": 0.5}).json()
    wanted = pipeline.generate([2] * 3, seed=4, temperature=0.5)
    assert answer["model"] == "tiny"
    assert answer["output_format"] == "png"
    assert answer["settings"]["temperature"] == 0.5
    assert [(each["seed"], each["label"], each["name"]) for each in answer["data"]] == [
        (s, 2, "otter") for s in (4, 5, 6)
    ]
    contents = [base64.b64decode(each["b64_json"]) for each in answer["data"]]
    assert contents == [each.to_bytes() for each in wanted]
    height, width = wanted.images.shape[1:3]  # type: ignore[union-attr]
    assert answer["size"] == f"{width}x{height}"
    twice = served.post(
        "/v1/images/generations", {"prompt": "2", "seed": 4, "size": f"{2 * width}x{2 * height}"}
    ).json()
    assert twice["size"] == f"{2 * width}x{2 * height}"
    assert pixels(base64.b64decode(twice["data"][0]["b64_json"])).shape == (2 * height, 2 * width, 3)


@contextmanager
def taken(batcher: Batcher) -> Iterator[None]:
    """The batcher has a call of its own that waits for the pipeline, until the end of the block: others queue up."""
    with busy(batcher.pipeline):
        batcher.submit(0)
        until(lambda: batcher.waiting == 0)
        yield


def test_many_users_at_once_have_their_own_images(served: Served, batcher: Batcher, pipeline: Pipeline) -> None:
    with ThreadPoolExecutor(6) as pool, taken(batcher):
        asked = [pool.submit(served.get, f"/v1/images?label={i % 3}&seed={i}") for i in range(6)]
        until(lambda: batcher.waiting == 6)
    answers = [each.result().body for each in asked]
    assert answers == [pipeline.generate(i % 3, seed=i).to_bytes() for i in range(6)]
    assert batcher.calls == 2


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("/v1/images", 400, "no label"),
        ("/v1/images?label=nobody", 400, "unknown label 'nobody'; this model has 6 classes: red fox, "),
        ("/v1/images?label=0&seed=x", 400, "seed 'x'"),
        ("/v1/image", 404, "nothing is at this path; expected one of /, /v1/images, "),
        ("/v1/models/gpt", 404, "no model of that name; expected tiny"),
        ("/x%0ay", 404, "nothing is at this path"),
        ("/v1/images/", 404, "nothing is at this path"),
    ],
)
def test_a_bad_address_is_answered_with_what_is_expected(served: Served, path: str, code: int, expected: str) -> None:
    answer = served.get(path)
    assert (answer.code, answer.headers["content-type"]) == (code, "application/json")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert expected in answer.error()


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        (b"prompt=0", 400, "the body: not valid JSON"),
        (b"", 400, "the body: not valid JSON"),
        (b'{"prompt": "0", "n": 7}', 400, "n 7: expected 1 to 6, as many as may wait here"),
        (b" " * 65537, 413, "the body has more than 65536 bytes"),
    ],
)
def test_a_bad_body_is_answered_with_what_is_expected(served: Served, body: bytes, code: int, expected: str) -> None:
    answer = served.post("/v1/images/generations", body)
    assert answer.code == code
    assert expected in answer.error()


def test_another_method_is_answered_with_the_right_one(served: Served) -> None:
    answer = served.get("/v1/images/generations")
    assert (answer.code, answer.headers["allow"]) == (405, "POST")
    assert answer.error() == "GET: expected POST at this path"
    assert served.post("/v1/images", {}).code == 405
    assert served.ask("HEAD", "/v1/images?label=0").code == 405  # it would make the image
    assert served.ask("HEAD", "/health").code == 200


def test_one_request_too_many_is_told_to_come_again(served: Served, batcher: Batcher) -> None:
    with ThreadPoolExecutor(8) as pool, taken(batcher):
        asked = [pool.submit(served.get, f"/v1/images?label=0&seed={i}") for i in range(6)]
        until(lambda: batcher.waiting == 6)
        many = served.post("/v1/images/generations", {"prompt": "0", "n": 2})
        for answer in (many, served.get("/v1/images?label=0")):
            assert (answer.code, answer.headers["retry-after"]) == (503, "1")
            assert answer.error() == "6 images wait already; try again later"
    assert [each.result().code for each in asked] == [200] * 6


def test_a_request_that_waits_too_long_is_answered_and_taken_back(
    batcher: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(application(batcher, timeout_s=0.2)) as served:
        with taken(batcher):
            answer = served.post("/v1/images/generations", {"prompt": "0", "n": 3})
            assert answer.code == 504
            assert answer.error() == "the images were not made within 0.2 s; ask for fewer, or later"
            until(lambda: batcher.waiting == 0)
        batcher.close()
    assert batcher.images == 1
    assert not caplog.records  # asyncio complains of errors that nobody has looked at


def test_nothing_is_made_for_a_client_that_has_left(
    served: Served, batcher: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    with taken(batcher):
        body = json.dumps({"prompt": "0", "n": 3}).encode()
        for head, waits in (
            (b"GET /v1/images?label=0 HTTP/1.1\r\nHost: x\r\n\r\n", 1),
            (b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body, 3),
        ):
            with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
                client.sendall(head)
                until(lambda waits=waits: batcher.waiting == waits)  # type: ignore[misc]
            until(lambda: batcher.waiting == 0)
    assert served.get("/v1/images?label=0&seed=1").code == 200
    assert batcher.images == 2
    assert not caplog.records


def test_what_the_pipeline_raises_is_logged_and_not_sent(
    served: Served, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert served.get("/health").json() == {"status": "ok", "waiting": 0}
    with monkeypatch.context() as broken:

        def fails(*_: Any, **__: Any) -> None:
            raise CudaError("/srv/secret/weights.data: an illegal address")

        broken.setattr(pipeline, "generate", fails)
        answer = served.get("/v1/images?label=0")
        assert answer.code == 500
        assert answer.error() == "the server could not make the images; its log says why"
        health = served.get("/health")
        assert (health.code, health.json()["status"]) == (503, "failing")
    assert "/srv/secret/weights.data: an illegal address" in caplog.text
    assert served.get("/v1/images?label=nobody").code == 400
    assert served.get("/health").code == 503  # a bad request says nothing about the pipeline
    assert served.get("/v1/images?label=0").code == 200
    assert served.get("/health").code == 200


def test_a_server_that_stops_says_so(served: Served, batcher: Batcher) -> None:
    batcher.close()
    answer = served.get("/v1/images?label=0")
    assert (answer.code, answer.headers["retry-after"]) == (503, "1")
    assert answer.error() == "the server is stopping"


def test_what_is_served_is_described(served: Served, pipeline: Pipeline) -> None:
    (model,) = served.get("/v1/models").json()["data"]
    assert model == served.get("/v1/models/tiny").json()
    assert model["object"] == "model"
    assert model["bundle"] == {"name": "tiny", "hash": pipeline.bundle.hash}
    assert (model["classes"], model["formats"], model["max_batch"]) == (6, ["png"], 8)
    labels = served.get("/v1/labels").json()["data"]
    assert labels[5] == {"index": 5, "name": "tree frog", "synset": None}
    page = served.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert b"<!doctype html>" in page.body


def test_counters_are_those_of_what_happened(served: Served) -> None:
    for path in ("/v1/images?label=0", "/v1/images?label=0", "/v1/images?label=x", "/x/1", "/x/2"):
        served.get(path)
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = answer.body.decode().splitlines()
    for line in (
        "parvis_images_total 2.0",
        "parvis_calls_total 2.0",
        "parvis_waiting 0.0",
        'parvis_requests_total{code="200",path="/v1/images"} 2.0',
        'parvis_requests_total{code="400",path="/v1/images"} 1.0',
        'parvis_requests_total{code="404",path="other"} 2.0',
        "parvis_request_seconds_count 2.0",
    ):
        assert line in lines
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


def test_it_can_be_a_part_of_another_application(batcher: Batcher, pipeline: Pipeline) -> None:
    with serving(Starlette(routes=[Mount("/images", application(batcher, name="mine"))])) as served:
        assert served.get("/images/v1/models").json()["data"][0]["id"] == "mine"
        assert served.get("/images/v1/images?label=0&seed=7").body == pipeline.generate(0, seed=7).to_bytes()
        assert served.get("/images/nothing").error().startswith("nothing is at this path")


def test_a_video_model_answers_with_clips(tiny_video: Path) -> None:
    with (
        Pipeline.load(tiny_video, threads=1, selftest=False) as pipeline,
        Batcher(pipeline) as batcher,
        serving(application(batcher)) as served,
    ):
        answer = served.get("/v1/images?label=0&seed=7")
        assert answer.headers["content-type"] == "image/gif"
        assert answer.body == pipeline.generate(0, seed=7).to_bytes()
        webp = served.post("/v1/images/generations", {"prompt": "0", "seed": 7, "output_format": "webp"}).json()
        assert webp["output_format"] == "webp"
        clip = Image.open(io.BytesIO(base64.b64decode(webp["data"][0]["b64_json"])))
        assert (clip.format, clip.n_frames) == ("WEBP", pipeline.bundle.frames)


@pytest.mark.parametrize(
    ("change", "settings", "expected"),
    [
        (lambda batcher: "x", {}, "batcher: expected a par_runtime.Batcher, not a str"),
        (lambda batcher: batcher, {"timeout_s": 0}, "timeout_s 0: expected 0.001 to 1000000 seconds"),
    ],
)
def test_an_application_of_nothing_useful_is_refused(
    batcher: Batcher, change: Callable[[Batcher], Any], settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RequestError) as refused:
        application(change(batcher), **settings)
    assert expected in str(refused.value)


def test_a_bundle_that_ends_at_tokens_is_refused(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher.pipeline, "bundle", replace(batcher.pipeline.bundle, image_size=None))
    with pytest.raises(RequestError, match="ends at tokens and makes no images, so there is nothing to serve"):
        application(batcher)


def test_a_slow_client_holds_up_nobody(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as slow:
        slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(served.get("/v1/images?label=0").code)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == [200] * 3


def test_it_belongs_to_no_loop(batcher: Batcher, pipeline: Pipeline) -> None:
    """Test clients of programs that have it as a part run each request in a loop of its own."""
    app = application(batcher)

    async def get() -> list[Any]:
        asked, said = asyncio.Event(), list[Any]()

        async def receive() -> dict[str, Any]:
            if not asked.is_set():
                asked.set()
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "GET", "path": "/v1/images", "query_string": b"label=0&seed=7"}
        await app(scope | {"headers": [], "http_version": "1.1", "root_path": "", "scheme": "http"}, receive, send)
        return said

    for _ in range(2):
        start, body = asyncio.run(get())
        assert start["status"] == 200
        assert body["body"] == pipeline.generate(0, seed=7).to_bytes()
