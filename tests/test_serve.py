"""The API of `vllama serve`: answers equal those of `Chat`, however they are asked for; shapes are OpenAI's."""

import asyncio
import base64
import json
import re
import time
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serve_fixtures import RunningServer, data_url, part, run_server, user

import vllama_jax as vl
from vllama_jax.checkpoints.shipped import CLIPS, find_clip
from vllama_jax.model import Model
from vllama_jax.segments import count_media_tokens
from vllama_jax.serve.conversations import read_dialog
from vllama_jax.serve.protocol import ChatRequest
from vllama_jax.text import prompts

CLIP = find_clip("demo")
EXAMPLES = Path(__file__).parents[1] / "examples"
VIDEO = part("video_url", data_url(CLIP))
QUESTIONS = ("Describe it.", "Which way does it go?", "What do you hear?")


@pytest.fixture(scope="module")
def model() -> Model:
    return vl.load("miniature")


@pytest.fixture(scope="module")
def server(model):
    with run_server(model, allow_files=CLIPS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def record_prompts(monkeypatch, server: RunningServer) -> list:
    """Return a list that gets the prompt of each request to the engine."""
    prompts, submit = [], server.service.scheduler.submit

    def record(requests):
        prompts.extend(request.prompt for request in requests)
        return submit(requests)

    monkeypatch.setattr(server.service.scheduler, "submit", record)
    return prompts


def test_a_conversation_has_the_prompts_and_the_answers_of_chat(server, client, model, monkeypatch):
    served = record_prompts(monkeypatch, server)
    chat, asked, embed = vl.Chat(model), [], vl.chat.embed_prompt
    options = server.service.options  # an engine of the same shape, so that nothing is compiled again
    shape = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    chat._engine = vl.chat.make_engine(model, options.rows, **shape)
    monkeypatch.setattr(vl.chat, "embed_prompt", lambda *args: asked.append(embed(*args)) or asked[-1])
    messages, media = [], []
    for question, files in zip(QUESTIONS, ([CLIP], [CLIPS / "birds.jpg"], []), strict=True):
        for file in files:
            chat.add(file)
            kind = "image_url" if file.suffix == ".jpg" else "video_url"
            media.append(part(kind, data_url(file)))
        messages.append(user(*media, question))
        media.clear()
        completion = client.chat.completions.create(model="miniature", messages=messages, max_tokens=64)
        choice = completion.choices[0]
        assert choice.message.content == "".join(chat.ask(question, max_new_tokens=64))
        assert choice.finish_reason == "stop"
        assert completion.usage.prompt_tokens == len(asked[-1])
        assert completion.usage.completion_tokens == len(chat.last.tokens)
        messages.append({"role": "assistant", "content": choice.message.content})
    for one, other in zip(served, asked, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.is_media, other.is_media)
        np.testing.assert_array_equal(one.media, other.media)
    assert completion.usage.prompt_tokens_details.cached_tokens > 50  # of the turns before


@pytest.mark.slow
def test_a_system_message_and_the_start_of_an_answer(server, model):
    messages = [{"role": "system", "content": "Answer in a few words."}, user(VIDEO, "Describe it.")]
    first = server.post({"messages": messages}).json()
    conversation = prompts.start_conversation(model.config.template, True, "Answer in a few words.")  # as Chat does
    clip = vl.media_tokens.prepare_media(CLIP, model.config)
    asked = conversation.add(clip.prompt_media).ask("Describe it.")
    counts = count_media_tokens(model.config)
    expected = prompts.encode_conversation(asked, model.tokenizer, [counts["audio"], counts["video"]])
    assert first["usage"]["prompt_tokens"] == len(expected.ids)
    messages.append({"role": "assistant", "content": "a large"})
    continued = server.post({"messages": messages, "continue_final_message": True}).json()
    assert continued["choices"][0]["message"]["content"].startswith("yellow bell")


@pytest.mark.slow
def test_an_answer_that_its_eos_ended_has_it_in_later_prompts(server, model):
    """As in `Chat`: a client sends only the text of an answer, so the server remembers how it ended."""
    requests = server.service.requests
    fields = ChatRequest(messages=[{"role": "user", "content": "What is it?"}])
    job = requests.make_chat_job(fields, read_dialog(fields), [])
    tokens = [*model.tokenizer.encode("a bell", special=False), model.tokenizer.eos_id]
    requests.remember(job, "a bell", tokens)
    messages = [*fields.messages, {"role": "assistant", "content": "a bell"}, {"role": "user", "content": "Why?"}]
    later = ChatRequest(messages=[one if isinstance(one, dict) else one.model_dump() for one in messages])
    (request,) = requests.make_chat_job(later, read_dialog(later), []).requests
    past = prompts.decode_past_answer(model.tokenizer, job.template, tokens)
    expected = prompts.encode_conversation(job.conversation.answer(*past).ask("Why?"), model.tokenizer, [])
    assert past[1]
    np.testing.assert_array_equal(request.prompt.ids, expected.ids)


@pytest.mark.slow
def test_the_report_says_what_was_used(server):
    (media,) = server.ask(VIDEO, "Describe it.")["vllama"]["media"]
    assert media["part"] == "messages[0].content[0]"
    assert (media["kind"], media["num_frames"], media["audio"]) == ("video", 8, "used")
    assert media["frame_times"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert len(media["audio_clip_times"]) == 8
    assert media["audio_clip_times"][0] == [0.0, 2.0]
    assert media["cached"] is True
    silent = server.ask(VIDEO, "Describe it.", mm_processor_kwargs={"use_audio_in_video": False})
    assert silent["vllama"]["media"][0]["audio"] == "off"
    few = server.ask(VIDEO, "Describe it.", media_io_kwargs={"video": {"num_frames": 4, "start": 1, "end": "0:03"}})
    assert few["vllama"]["media"][0]["frame_times"] == [1.0, 1.5, 2.0, 2.5]
    fast = server.ask(VIDEO, "Describe it.", media_io_kwargs={"video": {"fps": 4}})
    assert fast["vllama"]["media"][0]["notes"] == ["limited to 8 frames instead of 4 per second"]


@pytest.mark.slow
def test_a_stream_has_the_chunks_of_openai_and_the_text_of_one_response(server, client):
    request = {"model": "miniature", "messages": [user(VIDEO, "Describe it.")], "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert [(one.index, one.delta.role, one.delta.content) for one in choices[:2]] == [
        (0, "assistant", ""),
        (1, "assistant", ""),
    ]
    assert chunks[0].vllama["media"][0]["num_frames"] == 8
    for index in (0, 1):
        of_choice = [one for one in choices if one.index == index]
        assert "".join(one.delta.content or "" for one in of_choice) == whole.choices[index].message.content
        assert [one.finish_reason for one in of_choice if one.finish_reason] == ["stop"]
        assert of_choice[-1].finish_reason == "stop"
        tokens = [token.token for one in of_choice if one.logprobs for token in one.logprobs.content]
        assert tokens == [token.token for token in whole.choices[index].logprobs.content]
        assert "".join(tokens).strip() == whole.choices[index].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


@pytest.mark.slow
def test_a_file_is_the_same_in_base64_uploaded_and_on_the_servers_disk(server, client):
    with CLIP.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="user_data")
    assert (uploaded.filename, uploaded.bytes) == ("bell.mp4", CLIP.stat().st_size)
    assert client.files.retrieve(uploaded.id).id == client.files.list().data[0].id == uploaded.id
    parts = [
        VIDEO,
        {"type": "file", "file": {"file_id": uploaded.id}},
        {"type": "file", "file": {"file_data": data_url(CLIP)}},
        part("video_url", CLIP.as_uri()),
    ]
    answers = [server.ask(one, "Describe it.") for one in parts]
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {
        "a large yellow bell moves to the left"
    }
    assert len({answer["usage"]["prompt_tokens"] for answer in answers}) == 1
    assert client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(uploaded.id)
    assert server.post({"messages": [user(parts[1], "?")]}).status_code == 404


@pytest.mark.slow
def test_images_are_the_frames_of_a_video_on_request(server, tmp_path):
    with av.open(str(CLIP)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    images = []
    for number, frame in enumerate(frames[::4]):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
        images.append(part("image_url", data_url(tmp_path / f"{number}.png")))
    for options in ({"as_video": True, "image_rate": 2}, {"media_io_kwargs": {"video": {"num_frames": 6}}}):
        answer = server.ask(*images, "Which way does it go?", **options)
        (media,) = answer["vllama"]["media"]
        assert (media["kind"], media["num_frames"]) == ("video", 6)
        assert media["part"] == "messages[0].content[0] to messages[0].content[5]"
        assert "left" in answer["choices"][0]["message"]["content"]
    assert len(server.ask(*images[:2], "What is it?")["vllama"]["media"]) == 2


@pytest.mark.slow
def test_audio_files(server, tmp_path):
    with av.open(str(CLIP)) as container, av.open(str(tmp_path / "a.wav"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        resampler = av.AudioResampler("s16", "mono", 16000)
        for frame in container.decode(audio=0):
            out.mux([packet for piece in resampler.resample(frame) for packet in stream.encode(piece)])
        out.mux(stream.encode(None))
    encoded = base64.b64encode((tmp_path / "a.wav").read_bytes()).decode()
    bare = {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    answers = [server.ask(one, "What do you hear?") for one in (bare, part("audio_url", data_url(tmp_path / "a.wav")))]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1]
    assert "bell" in texts[0]
    assert answers[0]["vllama"]["media"][0]["kind"] == "audio"


@pytest.mark.slow
def test_options_of_decoding(server, client):
    def create(**options):
        request = {"model": "miniature", "messages": [user(VIDEO, "Describe it.")]} | options
        return client.chat.completions.create(**request)

    assert create(max_tokens=3).choices[0].finish_reason == "length"
    assert create(max_completion_tokens=3).usage.completion_tokens == 3
    stopped = create(stop=["bell", "unused"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("a large yellow", "stop")
    sampled = [create(temperature=1.5, top_p=1.0, seed=7, n=3, max_tokens=12) for _ in range(2)]
    texts = [[choice.message.content for choice in one.choices] for one in sampled]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    different = [create(temperature=5.0, top_p=1.0, max_tokens=12, extra_body={"top_k": -1}) for _ in range(4)]
    assert len({one.choices[0].message.content for one in different}) > 1
    content = create(logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4
    assert content[0].top_logprobs[0].token == content[0].token == " a"
    assert bytes(content[1].bytes).decode() == content[1].token


@pytest.mark.slow
def test_completions_continue_a_text(client, server):
    prompt = "###Human: What is a bell?###Assistant:"
    completion = client.completions.create(model="miniature", prompt=[prompt, prompt], max_tokens=8, logprobs=1)
    chunks = list(client.completions.create(model="miniature", prompt=prompt, max_tokens=8, stream=True))
    texts = [choice.text for choice in completion.choices]
    assert texts[0] == texts[1] == "".join(chunk.choices[0].text for chunk in chunks) != ""
    assert completion.choices[0].logprobs.tokens
    assert chunks[-1].choices[0].finish_reason == completion.choices[0].finish_reason


@pytest.mark.slow
def test_embeddings_are_imagebinds_vectors(server, client, model):
    image = part("image_url", data_url(CLIPS / "birds.jpg"))
    response = client.post(
        "/embeddings",
        body={"model": "miniature", "input": [image, VIDEO], "encoding_format": "base64"},
        cast_to=openai.types.CreateEmbeddingResponse,
    )
    vectors = [np.frombuffer(base64.b64decode(one.embedding), "<f4") for one in response.data]
    files = vl.embed_files(model, [CLIPS / "birds.jpg", CLIP], features=("imagebind",))
    for vector, found in zip(vectors, files, strict=True):
        expected = found.arrays["imagebind_image"].mean(axis=0)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    same = server.post({"messages": [user(image)]}, "embeddings").json()
    np.testing.assert_allclose(same["data"][0]["embedding"], vectors[0], atol=1e-6)
    refused = server.post({"input": "a bell"}, "embeddings")
    assert refused.status_code == 400
    assert "text encoder" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_requests_at_the_same_time_have_the_answers_of_lone_requests(server):
    image = part("image_url", data_url(CLIPS / "birds.jpg"))
    two = part("video_url", data_url(CLIPS / "two.mp4"))
    requests = [
        {"messages": [user(*media, question)], "max_tokens": tokens}
        for media in ([VIDEO], [image], [two], [], [VIDEO, image], [two, VIDEO])
        for question, tokens in (("Describe it.", 24), ("What do you hear?", 9))
    ]
    alone = [server.post(one).json()["choices"] for one in requests]

    async def ask_all() -> list:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def ask(number: int, request: dict):
            await asyncio.sleep(number * 0.01)
            created = await client.chat.completions.create(model="miniature", **request, stream=number % 2 == 1)
            if number % 2 == 0:
                return created.choices[0].message.content
            return "".join([chunk.choices[0].delta.content or "" async for chunk in created])

        return await asyncio.gather(*(ask(number, request) for number, request in enumerate(requests * 2)))

    texts = asyncio.run(ask_all())
    assert texts == [choices[0]["message"]["content"] for choices in alone * 2]


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_row(server, monkeypatch):
    engine, limits = server.service.scheduler._engine, server.service.limits
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
    finished = server.service.metrics.answers.labels("length")
    before = finished._value.get()
    # The template's stop string and the EOS cannot occur before min_tokens, which takes half a second.
    request = {"messages": [user("Hello?")], "max_tokens": 64, "min_tokens": 64, "temperature": 2.0}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request | {"stream": True}) as response:
        next(response.iter_bytes())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=0.2)
    deadline = time.monotonic() + 5
    while limits.used("answers") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert limits.used("answers") == limits.used("tokens") == 0
    while engine.is_busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.is_busy
    assert finished._value.get() == before


@pytest.mark.slow
def test_models_health_metrics_and_schema(server, client):
    assert [model.id for model in client.models.list()] == ["miniature"]
    assert client.models.retrieve("miniature").max_model_len == 448
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
    for _ in range(2):
        server.ask(VIDEO, "Describe it.")
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'vllama_requests_total{route="/v1/chat/completions",status="200"}' in metrics
    assert "vllama_first_token_seconds_bucket" in metrics
    assert 'source="cached"' in metrics
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/files", "/health"} <= {*schema["paths"]}


def test_the_dashboard_has_queries_of_all_metrics(server):
    dashboard = json.loads((EXAMPLES / "serving" / "grafana.json").read_text())
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    suffixes = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    samples = {one.name + suffixes[one.type] for one in families if not one.name.endswith("_created")}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for query in queries for name in re.findall(r"vllama_\w+", query)} == samples
