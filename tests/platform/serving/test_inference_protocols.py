"""The V1 and V2 inference protocols of a running server, and its health endpoints."""

from __future__ import annotations

import struct
from typing import Any

import httpx
import pytest

V1 = "/v1/models/words:predict"
V2 = "/v2/models/words/infer"


def tensors(prompts: list[str], images: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    inputs = [{"name": "prompt", "datatype": "BYTES", "shape": [len(prompts)], "data": prompts}]
    if images is not None:
        inputs.append({"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": images})
    return {"inputs": inputs, **fields}


def test_v1_predict_answers_every_instance(http: httpx.Client, png_url: str) -> None:
    instances = [
        {"prompt": "what is this", "image": png_url},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "roles"}]},
    ]
    predictions = http.post(V1, json={"instances": instances}).json()["predictions"]
    assert [prediction["text"] for prediction in predictions] == ["30x20 what is this", "system user"]
    assert predictions[0]["usage"]["prompt_tokens_details"]["image_tokens"] == 16


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "text/plain"])
def test_v1_reads_json_under_any_media_type(http: httpx.Client, kind: str) -> None:
    body = b'{"instances": [{"prompt": "count 9"}], "parameters": {"max_tokens": 2}}'
    (prediction,) = http.post(V1, content=body, headers={"content-type": kind}).json()["predictions"]
    assert (prediction["text"], prediction["finish_reason"]) == ("0 1", "length")


@pytest.mark.parametrize("request_id", [None, "mine"])
def test_v2_infer_answers_in_tensors(http: httpx.Client, png_url: str, request_id: str | None) -> None:
    body = tensors(["what", "count 3"], [png_url, ""], parameters={"max_tokens": 2})
    answer = http.post(V2, json=body | ({"id": request_id} if request_id else {})).json()
    assert answer["id"] == request_id or (request_id is None and answer["id"])
    assert answer["model_version"] == "7"
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs == {"text": ["30x20 what", "0 1"], "finish_reason": ["stop", "length"]}


def binary_request(http: httpx.Client, **columns: bytes) -> httpx.Response:
    data = {name: struct.pack("<I", len(value)) + value for name, value in columns.items()}
    described = [
        {"name": name, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(value)}}
        for name, value in data.items()
    ]
    head = httpx.Request("POST", "http://x", json={"inputs": described}).content
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    return http.post(V2, content=head + b"".join(data.values()), headers=headers)


def test_v2_binary_tensors_hold_the_same_text(http: httpx.Client, png_url: str) -> None:
    answer = binary_request(http, prompt=b"what", image=png_url.encode())
    assert answer.json()["outputs"][0]["data"] == ["30x20 what"]


def test_v2_binary_tensors_with_a_file_are_refused_without_repeating_it(http: httpx.Client, png: bytes) -> None:
    answer = binary_request(http, prompt=b"what", image=png)
    assert answer.status_code == 400
    assert "data: URIs" in answer.json()["error"]
    assert "PNG" not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (V1, {}, 400, "instances"),
        (V1, {"instances": []}, 400, "instances"),
        (V1, {"instances": "x"}, 400, "instances"),
        (V1, {"instances": ["x"]}, 400, "instances[0]"),
        (V1, {"instances": [{"prompt": "x"}] * 65}, 400, "at most 64"),
        (V1, {"instances": [{"promt": "x"}]}, 400, "did you mean 'prompt'"),
        (V1, {"instances": [{"image": "data:"}]}, 400, "either 'messages'"),
        (V1, {"instances": [{"prompt": 3}]}, 400, "instances[0].messages[0]"),
        (V1, {"instances": [{"prompt": "x", "image": "http://h/i.png"}]}, 400, "remote images"),
        (V1, {"instances": [{"prompt": "x"}], "parameters": {"stream": True}}, 400, "stream"),
        (V1, {"instances": [{"prompt": "x"}], "parameters": []}, 400, "parameters"),
        (V1, {"instances": [{"prompt": "refuse"}]}, 400, "9000 tokens"),
        (V1, {"instances": [{"prompt": "crash"}]}, 500, "request id"),
        ("/v1/models/other:predict", {"instances": []}, 404, "other"),
        ("/v1/models/words:explain", {"instances": [{"prompt": "x"}]}, 501, ""),
        (V2, {}, 400, "inputs"),
        (V2, {"inputs": []}, 400, "'prompt' is required"),
        (V2, tensors(["x"], ["", ""]), 400, "2 elements"),
        (V2, tensors(["x"], parameters={"beams": 3}), 400, "beams"),
        (V2, {"inputs": [{"name": "prompt", "datatype": "INT32", "shape": [1], "data": [1]}]}, 400, "BYTES"),
        (V2, {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [3], "data": ["x"]}]}, 400, "shape"),
        (V2, {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [1]}]}, 400, "strings"),
        (V2, {"inputs": [{"name": "promt", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}, 400, "did you mean"),
        ("/v2/models/other/infer", tensors(["x"]), 404, "other"),
        ("/v2/repository/models/words/unload", {}, 403, "one model"),
        ("/v2/repository/models/words/load", {}, 403, "one model"),
    ],
)
def test_errors_are_the_protocols_text(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", [V1, V2])
def test_malformed_json_is_a_400(http: httpx.Client, path: str) -> None:
    answer = http.post(path, content=b'{"instances": [', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


def test_a_broken_binary_request_is_a_400(http: httpx.Client) -> None:
    headers = {"inference-header-content-length": "junk", "content-type": "application/octet-stream"}
    assert http.post(V2, content=b"{}", headers=headers).status_code == 400


def test_health_and_metadata(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    assert http.get("/v2/models/words/ready").json() == {"name": "words", "ready": True}
    assert http.get("/v1/models/words").json() == {"name": "words", "ready": True}
    metadata = http.get("/v2/models/words").json()
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["prompt", "image", "video"]
