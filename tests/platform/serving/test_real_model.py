"""A real model behind the server: media through both official clients, and the answers of the bare engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from nvila_platform.serving import RunningServer, start_server

# A real model and both SDKs: seconds to start on a free machine, minutes on a crowded one.
pytestmark = pytest.mark.timeout(600)
QUESTION = "what color is the shape ?"


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[RunningServer]:
    with start_server(tiny_model, "tiny", version="3", digest="sha256:cafe", timeout_s=300.0) as running:
        yield running


@pytest.fixture(scope="module")
def client(tiny: RunningServer) -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=tiny.openai_url, api_key="none", max_retries=0, http_client=http_client) as made:
        yield made


def noise(number: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def clip_url() -> str:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(16):
            pixels = np.asarray(noise(number, (64, 48)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return f"data:video/mp4;base64,{base64.b64encode(out.getvalue()).decode()}"


def ask(client: openai.OpenAI, *media: dict[str, Any], **options: Any) -> Any:
    content: Any = [*media, {"type": "text", "text": QUESTION}]
    messages: Any = [{"role": "user", "content": content}]
    create: Any = client.chat.completions.create
    return create(model="tiny", messages=messages, max_tokens=8, **options)


def test_an_answer_is_the_one_of_the_bare_engine(client: openai.OpenAI, tiny_model: Path) -> None:
    from nvila.data.records import Message, Part
    from nvila.inference.engine import Engine, SamplingParams

    image = noise(5)
    parts = (Part(type="image", value="it"), Part(type="text", value=QUESTION))
    engine = Engine.load(tiny_model)
    (expected,) = engine.generate(
        [([Message(role="user", content=parts)], {"it": image})], SamplingParams(max_tokens=8)
    )
    answer = ask(client, {"type": "image_url", "image_url": {"url": image_url(image)}})
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.model_extra == {"image_tokens": expected.usage.visual_tokens} or (
        answer.usage.prompt_tokens_details.image_tokens == expected.usage.visual_tokens
    )


def test_several_images_and_videos_in_one_message(client: openai.OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": image_url(noise(1))}}
    video = {"type": "video_url", "video_url": {"url": clip_url(), "num_frames": 4}}
    frames = {"type": "video", "video": [image_url(noise(number)) for number in range(3)]}
    one, two, all_of_them = ask(client, picture), ask(client, picture, picture), ask(client, picture, video, frames)
    assert one.usage.prompt_tokens < two.usage.prompt_tokens < all_of_them.usage.prompt_tokens
    assert all_of_them.choices[0].message.content is not None


def test_several_answers_differ_by_their_draws_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    options = {"n": 3, "temperature": 1.5, "seed": 9, "extra_body": {"top_k": 0}}
    first, again = (ask(client, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    streamed = ["", "", ""]
    for chunk in ask(client, **options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_text_completions_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=[QUESTION, "blue"], max_tokens=4, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.top_logprobs is not None
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs)
    assert "".join(logprobs.tokens) == answer.choices[0].text.replace(" ", "")
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(model="tiny", prompt=QUESTION, max_tokens=4, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == answer.choices[0].text


def test_chats_with_logprobs(client: openai.OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0]
    tokens = whole.logprobs.content
    assert tokens
    assert "".join(one.token for one in tokens) == whole.message.content.replace(" ", "")
    for one in tokens:
        assert len(one.top_logprobs) == 2
        # Greedy: the chosen one is the likeliest.
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)
        assert one.logprob <= 0
    streamed = [
        one
        for chunk in ask(client, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in tokens]
    assert ask(client).choices[0].logprobs is None


def test_a_tokenizer_of_words_cannot_follow_a_schema_and_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="need a tokenizer of bytes or pieces") as caught:
        ask(client, response_format={"type": "json_object"})
    assert (caught.value.status_code, caught.value.code) == (501, "capability")


@pytest.mark.slow
def test_an_answer_follows_the_schema_that_the_official_client_sends(tmp_path: Path) -> None:
    import torch

    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

    # A model whose tokens are bytes, so that it can spell any JSON.
    torch.manual_seed(1)
    NVILAForConditionalGeneration(NVILAConfig.from_preset("tiny-nvila-lite")).save_pretrained(tmp_path)
    NVILAProcessor.from_preset("tiny-nvila-lite").save_pretrained(tmp_path)
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}}
    messages: Any = [{"role": "user", "content": "which color, and how many?"}]
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with (
        start_server(tmp_path, "bytes", timeout_s=300.0) as server,
        openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0, http_client=http_client) as asking,
    ):
        create: Any = asking.chat.completions.create
        options = {"model": "bytes", "messages": messages, "max_tokens": 80, "temperature": 1.5}
        options["response_format"] = form
        whole = create(**options, seed=2).choices[0]
        pieces = [chunk.choices[0] for chunk in create(**options, seed=3, stream=True) if chunk.choices]
    for said, reason in (
        (whole.message.content, whole.finish_reason),
        ("".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason),
    ):
        found = json.loads(said)
        assert set(found) == {"color", "count"}
        assert found["color"] in ("red", "blue")
        assert found["count"] in range(10)
        assert reason == "stop"


def test_kserves_own_client_asks_in_both_protocols(tiny: RunningServer) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig

    async def check() -> None:
        v2 = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=30))
        assert await v2.is_server_ready(tiny.base_url)
        assert await v2.is_server_live(tiny.base_url)
        assert await v2.is_model_ready(tiny.base_url, "tiny")
        prompt = InferInput("prompt", [1], "BYTES", [QUESTION])
        image = InferInput("image", [1], "BYTES", [image_url(noise(2))])
        request = InferRequest("tiny", [prompt, image], request_id="mine", parameters={"max_tokens": 4})
        answer: Any = await v2.infer(tiny.base_url, request, model_name="tiny")
        assert answer.id == "mine"
        assert answer.outputs[0].name == "text"
        v1 = InferenceRESTClient(RESTConfig(protocol="v1", retries=0, timeout=30))
        body = {"instances": [{"prompt": QUESTION, "image": image_url(noise(2))}], "parameters": {"max_tokens": 4}}
        predicted: Any = await v1.infer(tiny.base_url, body, model_name="tiny")
        assert predicted["predictions"][0]["text"] == answer.outputs[0].data[0]
        await v1.close()
        await v2.close()

    asyncio.run(check())


def test_the_engines_caches_and_phases_are_measured(tiny: RunningServer, client: openai.OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": image_url(noise(77))}}
    for _ in range(2):
        ask(client, picture)
    text = httpx.get(f"{tiny.base_url}/metrics", trust_env=False).text
    values = {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("nvila:")
    }
    for name in (
        "mm_cache_queries_total",
        "vision_encode_seconds_total",
        "engine_steps_total",
        "prefix_cache_hits_total",
        "media_bytes_total",
        "media_load_seconds_count",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count",
    ):
        assert values[f"nvila:{name}"] > 0, name
    assert values["nvila:kv_cache_usage_perc"] == values["nvila:visual_load_tokens"] == 0
    for name in ("server_request_duration_seconds", "client_token_usage", "server_time_to_first_token_seconds"):
        assert f'gen_ai_{name}_bucket{{gen_ai_operation_name="chat",gen_ai_provider_name="nvila"' in text
