"""The server over real sockets: OpenAI's client on the shipped nano, and a scripted model where a request must not end
by itself or has to call a tool."""

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from tiny_model import randomize, tiny_config
from transformers import GenerationConfig

import infer
from modeling_omni import OmniForConditionalGeneration
from modeling_omni.generation_rows import Row
from modeling_omni.inference import encode, load, open_media, stream_answer, user_message
from modeling_omni.serving import Server, ServerLimits, StopFinder, bind, uvicorn_server
from modeling_omni.serving_queue import QueueFull, ServingQueue
from modeling_omni.tool_calls import parse_tool_call, typed_value

ROOT = Path(__file__).parent.parent
MEDIA = ROOT / "modeling_omni/nano/examples"
SUM = "What is 3 + 4 + 2? Think step by step."
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


class Running:
    """A server on a free port of this machine, in a thread."""

    def __init__(self, model, processor, limits: ServerLimits, **options):
        self.server = Server(model, processor, "tiny", limits, **options)
        listener = bind("127.0.0.1", 0, None)
        self.port = listener.getsockname()[1]
        self.uvicorn = uvicorn_server(self.server)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.wait_for(lambda: self.uvicorn.started)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0, timeout=300)

    def ask(self, text="hello", **options):
        messages = options.pop("messages", [{"role": "user", "content": text}])
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=300)

    def send(self, body: bytes | str | dict, method="POST", path="/v1/chat/completions", **headers):
        """(status, body) of one request made by hand."""
        body = json.dumps(body) if isinstance(body, dict) else body
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, json.loads(data)

    def wait_for(self, condition, seconds=300):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)

    def close(self):
        self.uvicorn.should_exit = self.uvicorn.force_exit = True
        self.thread.join(60)
        self.server.close()


class Scripted(OmniForConditionalGeneration):
    """Writes `script` and then its last token for ever; the whole model runs, with its cache."""

    script, pause = [0], 0.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        length = int(output.past_key_values.get_seq_length())
        if output.logits.shape[1] > 1 or kwargs.get("input_ids") is None or kwargs["input_ids"].shape[1] > 1:
            self.start = length
        output.logits[:, -1, self.script[min(length - self.start, len(self.script) - 1)]] += 1e4
        time.sleep(self.pause)
        return output


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture(scope="module")
def served(nano):
    running = Running(*nano, ServerLimits(max_messages=20, max_media=3, max_new_tokens=300, max_body_bytes=2 * 1024**2))
    yield running
    running.close()


@pytest.fixture(scope="module")
def scripted(nano):
    model = randomize(Scripted(tiny_config("M*E", vocab_size=512, mels=80))).eval()
    model.generation_config = GenerationConfig(eos_token_id=[2, 11], pad_token_id=0, enable_thinking=False)
    return model, nano[1]


@contextlib.contextmanager
def endless(scripted, text="a b", pause=0.002, **limits):
    """A server whose model writes without end."""
    model, processor = scripted
    model.script, model.pause = processor.encode(text), pause
    running = Running(model, processor, ServerLimits(**({"context": 10**6} | limits)))
    try:
        yield running
    finally:
        running.close()


def local(nano, question: str, *media: tuple[str, str], thinking=False, **options) -> dict:
    parts = [open_media(kind, MEDIA / name) for kind, name in media]
    inputs = encode(*nano, [user_message(question, parts)], thinking)
    return list(stream_answer(*nano, inputs, **options))[-1][1] | {"prompt_tokens": inputs["input_ids"].shape[1]}


def data_url(name: str, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode((MEDIA / name).read_bytes()).decode()


# ------------------------------------------------------------------------------------------------------ OpenAI's client


def test_answers_and_usage(served, nano):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "modeling-omni"
    done, want = served.ask("Copy: banana split"), local(nano, "Copy: banana split")
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", want["answer"]) and want["answer"]
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None and done.object == "chat.completion"
    assert done.usage.prompt_tokens == want["prompt_tokens"]
    assert done.usage.completion_tokens == want["generated_tokens"]
    assert done.usage.total_tokens == want["prompt_tokens"] + want["generated_tokens"]
    assert done.usage.completion_tokens_details.reasoning_tokens == 0
    short = served.ask("Copy: banana split", max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


@pytest.mark.parametrize("thinking", [False, True])
def test_streams(served, nano, thinking):
    want = local(nano, SUM, thinking=thinking)
    extra = {"chat_template_kwargs": {"enable_thinking": thinking}}
    chunks = list(served.ask(SUM, stream=True, stream_options={"include_usage": True}, extra_body=extra))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == want["generated_tokens"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(d.delta.content or "" for d in deltas) == want["answer"]
    assert "".join(getattr(d.delta, "reasoning_content", None) or "" for d in deltas) == want["reasoning"]
    assert bool(want["reasoning"]) is thinking and len(chunks) > 3
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"] and deltas[-1].finish_reason == "stop"
    whole = served.ask(SUM, extra_body=extra)
    assert whole.choices[0].message.content == want["answer"]
    assert (getattr(whole.choices[0].message, "reasoning_content", None) or "") == want["reasoning"]
    assert (whole.usage.completion_tokens_details.reasoning_tokens > 0) is thinking
    assert all(chunk.usage is None for chunk in served.ask("a", stream=True, max_tokens=1))


def test_media_of_every_kind(served, nano):
    wav = base64.b64encode((MEDIA / "digits.wav").read_bytes()).decode()
    parts = {
        "image": {"type": "image_url", "image_url": {"url": data_url("shapes.png", "image/png")}},
        "audio": {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}},
        "video": {"type": "video_url", "video_url": {"url": data_url("motion_sound.mp4", "video/mp4")}},
    }
    names = {"image": "shapes.png", "audio": "digits.wav", "video": "motion_sound.mp4"}
    questions = {"image": "Where is the red circle?", "audio": "Which digits are spoken?"}
    questions["video"] = "What colour moves and what word is said?"
    for kind, part in parts.items():
        content = [part, {"type": "text", "text": questions[kind]}]
        done = served.ask(messages=[{"role": "user", "content": content}])
        want = local(nano, questions[kind], (kind, names[kind]))
        assert done.choices[0].message.content == want["answer"], kind
        assert getattr(done.usage.prompt_tokens_details, f"{kind}_tokens") > 0
        assert done.usage.prompt_tokens == want["prompt_tokens"]
    deaf = {"mm_processor_kwargs": {"use_audio_in_video": False}}
    content = [parts["video"], {"type": "text", "text": "What moves?"}]
    done = served.ask(messages=[{"role": "user", "content": content}], extra_body=deaf)
    assert done.usage.prompt_tokens_details.audio_tokens == 0
    served.server.defaults["video_sound"] = "on"  # as of --audio-from-video on
    silent = {"type": "video_url", "video_url": {"url": data_url("motion.mp4", "video/mp4")}}
    with pytest.raises(openai.BadRequestError, match="sound"):
        served.ask(messages=[{"role": "user", "content": [silent, content[1]]}])
    del served.server.defaults["video_sound"]
    everything = [*parts.values(), {"type": "text", "text": "What is this?"}]
    assert served.ask(messages=[{"role": "user", "content": everything}], max_tokens=3).usage.completion_tokens <= 3


def test_conversations_with_tools_in_them(served):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "array"}}}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 7."}]},
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
    ]
    done = served.ask(messages=messages, tools=tools, max_tokens=3)
    count = served.server.processor.count_tokens
    messages[4]["content"] = "It is 7."
    assert done.usage.prompt_tokens == count(
        messages, tools=tools, add_generation_prompt=True, enable_thinking=False
    )["total"]  # fmt: skip
    without = served.ask(messages=messages, tools=tools, tool_choice="none", max_tokens=3)
    assert without.usage.prompt_tokens < done.usage.prompt_tokens


def test_sampling_follows_the_seed_whoever_else_is_there(served):
    options = {"temperature": 3.0, "top_p": 0.95, "max_tokens": 12}

    def sample(seed):
        return served.ask("Copy: banana split", seed=seed, **options).choices[0].message.content

    alone = [sample(seed) for seed in (5, 6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(sample, [5, 6, 7, 5, 6, 7]))
    assert together[:2] == together[3:5] == alone and len(set(together)) == 3


def test_reasoning_budget_and_effort(served, nano):
    want = local(nano, SUM, thinking=True, reasoning_budget=3, reasoning_grace=1)
    for extra in ({"reasoning_budget": 3}, {"thinking_token_budget": 3}):
        done = served.ask(SUM, extra_body=THINK | extra | {"reasoning_grace": 1})
        assert done.choices[0].message.content == want["answer"]
        assert done.choices[0].message.reasoning_content == want["reasoning"]
    assert served.ask(SUM, reasoning_effort="none").usage.completion_tokens_details.reasoning_tokens == 0
    assert served.ask(SUM, reasoning_effort="high").usage.completion_tokens_details.reasoning_tokens > 3


def test_parallel_clients_get_their_own_answers_in_few_batches(served, nano):
    texts = [f"Copy: word {i}" for i in range(6)]
    want = [local(nano, text)["answer"] for text in texts]
    hold = threading.Event()
    inputs = encode(*nano, [user_message(SUM)], True, device="cpu")
    first = Row(inputs, 10**6, temperature=50.0, stopped=hold.is_set)  # holds the model until all wait
    served.server.queue.submit("other", first, print)
    served.wait_for(lambda: served.server.queue.running == 1)
    before = served.server.queue.batches
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(served.ask, text) for text in texts]
        served.wait_for(lambda: served.server.queue.waiting == 6)
        hold.set()
        assert [answer.result().choices[0].message.content for answer in answers] == want
    assert served.server.queue.batches == before + 1
    assert served.send("", "GET", "/health")[1]["status"] == "ok"


# ------------------------------------------------------------------------------------------------------ refused


def body_of(**changes) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | changes


def with_part(part) -> dict:
    return body_of(messages=[{"role": "user", "content": [part]}])


REFUSED = [
    (b"{", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"", 400, "not JSON"),
    (b"[]", 400, "JSON object"),
    (body_of(model="gpt"), 404, "does not exist"),
    ({"messages": []}, 404, "does not exist"),
    (body_of(messages=[]), 400, "1 to 20 messages"),
    (body_of(messages=[{"role": "user", "content": "a"}] * 21), 400, "1 to 20 messages"),
    (body_of(messages="hello"), 400, "must be a list"),
    (body_of(messages=[7]), 400, "object with a role"),
    (body_of(messages=[{"role": "king", "content": "a"}]), 400, "role 'king'"),
    (body_of(messages=[{"role": "user", "content": 7}]), 400, "text or a list"),
    (body_of(messages=[{"role": "user", "content": None}]), 400, "is missing"),
    (body_of(messages=[{"role": "user", "content": "a", "images": ["b"]}]), 400, "unknown field 'images'"),
    (body_of(messages=[{"role": "assistant", "content": "a"}]), 400, "assistant's"),
    (body_of(messages=[{"role": "user", "content": "\udcff"}]), 400, "lone surrogate"),
    (body_of(messages=[{"role": "assistant", "tool_calls": 3}, {"role": "user", "content": "a"}]), 400, "a list"),
    (body_of(messages=[{"role": "assistant", "tool_calls": [3]}, {"role": "user", "content": "a"}]), 400, "a name"),
    (body_of(messages=[{"role": "assistant", "reasoning_content": 3}, *body_of()["messages"]]), 400, "string"),
    (body_of(max_tokens=0), 400, "max_tokens"),
    (body_of(max_tokens=301), 400, "300 at most"),
    (body_of(max_tokens=True), 400, "max_tokens"),
    (body_of(temperature=-1), 400, "temperature"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    (body_of(top_p=0), 400, "top_p"),
    (body_of(seed="x"), 400, "seed"),
    (body_of(stop=[""]), 400, "stop"),
    (body_of(stop=7), 400, "stop"),
    (body_of(n=2), 400, "n is not supported"),
    (body_of(response_format={"type": "json_object"}), 400, "response_format"),
    (body_of(unheard_of=1), 400, "unknown field 'unheard_of'"),
    (body_of(stream="yes"), 400, "stream"),
    (body_of(stream_options={"include_usage": True}), 400, "stream_options"),
    (body_of(tools=[{"name": "f"}]), 400, "a tool must be"),
    (body_of(tools=[{"type": "function", "function": {"name": "f", "parameters": 7}}]), 400, "JSON schema"),
    (body_of(tool_choice="required"), 400, "tool_choice"),
    (body_of(chat_template_kwargs={"count_only": True}), 400, "chat_template_kwargs"),
    (body_of(mm_processor_kwargs={"media_limits": 1}), 400, "mm_processor_kwargs"),
    (body_of(reasoning_grace=-1), 400, "reasoning_grace"),
    (body_of(messages=[{"role": "user", "content": "word " * 9000}]), 400, "context"),
    (with_part({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), 400, "file names are not allowed"),
    (with_part({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), 400, "URLs are not allowed"),
    (with_part({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}), 400, "URLs are not allowed"),
    (with_part({"type": "image", "path": "/etc/passwd"}), 400, "unknown type 'image'"),
    (with_part({"type": "image_url", "image_url": {}}), 400, "needs"),
    (with_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), 400, "not an image"),
    (with_part({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}), 400, "base64"),
    (with_part({"type": "text"}), 400, "text"),
    (with_part("\ud800"), 400, "unknown type"),
    (body_of(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": "x"}] * 4}]), 400, "4 media"),
]  # fmt: skip


def test_broken_requests_get_openais_errors(served):
    for body, status, message in REFUSED:
        got, answer = served.send(body)
        assert got == status and set(answer) == {"error"}, (body, answer)
        assert message in answer["error"]["message"], (body, answer)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as error:
        served.ask("word " * 9000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    assert served.ask("Copy: banana split").choices[0].finish_reason == "stop"  # none of it did any harm


def test_an_answer_as_long_as_the_context_leaves_no_prompt(scripted):
    with endless(scripted, context=64) as server:
        status, answer = server.send(body_of(max_tokens=64))
    assert status == 400 and answer["error"]["param"] == "max_tokens"
    assert "max_tokens is 64, but prompt and answer together have 64 tokens" in answer["error"]["message"]


def test_refused_before_the_body_is_read(served):
    assert served.send(body_of(), Content_Type="text/plain")[0] == 415
    assert served.send(body_of(), Host="evil.example")[0] == 403
    assert served.send("", "GET", "/v1/nothing")[0] == 404
    assert served.send("", "GET", "/v1/models/gpt")[0] == 404
    assert served.send("", "GET")[0] == 405
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (b"Content-Length: 99999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with served.connect() as client:
            client.sendall(head + rest)
            if b"chunked" in rest:  # of a size that is not announced
                with contextlib.suppress(OSError):
                    for _ in range(3):
                        client.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
            assert client.recv(12) == b"HTTP/1.1 413"
    with served.connect() as client:  # not HTTP at all
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 400"


def test_keys(nano):
    running = Running(*nano, ServerLimits(), api_key="p\u00e4ss")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "p"}):
            status, answer = running.send(body_of(), **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert running.send("", "GET", "/v1/models")[0] == 401 and running.send("", "GET", "/health")[0] == 200
        assert running.send(body_of(), Authorization="Bearer p\u00e4ss".encode())[0] == 200
    finally:
        running.close()


# ------------------------------------------------------------------------------------------------------ scripted


def test_tool_calls(scripted):
    model, processor = scripted
    text = (
        "\nI look.\n<tool_call>\n<function=find>\n<parameter=what>\n7\n</parameter>\n<parameter=count>\n7\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=other>\n</function>\n</tool_call><|im_end|>"
    )
    properties = {"what": {"type": "string"}, "count": {"type": "integer"}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"properties": properties}}}]
    with endless(scripted) as running:
        model.script = processor.tokenizer(text, add_special_tokens=False).input_ids
        done = running.ask(tools=tools, max_tokens=400)
        message = done.choices[0].message
        assert (message.content, done.choices[0].finish_reason) == ("I look.", "tool_calls")
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
        assert calls == [("find", {"what": "7", "count": 7}), ("other", {})]
        assert len({call.id for call in message.tool_calls}) == 2
        chunks = [chunk.choices[0] for chunk in running.ask(tools=tools, max_tokens=400, stream=True)]
        deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert [(d.index, d.function.name, json.loads(d.function.arguments)) for d in deltas] == [
            (i, name, arguments) for i, (name, arguments) in enumerate(calls)
        ]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look."
        assert chunks[-1].finish_reason == "tool_calls"
        plain = running.ask(max_tokens=400)  # without tools the marks are text
        assert plain.choices[0].finish_reason == "stop" and "<function=find>" in plain.choices[0].message.content


def test_stop_strings_end_the_answer_and_the_work(scripted):
    model, processor = scripted
    with endless(scripted) as running:
        model.script = processor.encode("one two three four") + processor.encode("a ")
        queue = running.server.queue
        for stops, want in ((["ree"], "one two th"), (" t", "one"), (["zzz", "four"], "one two three"), (["o"], "")):
            done = running.ask(stop=stops, max_tokens=10**5)
            content = done.choices[0].message.content
            assert (content.strip(), done.choices[0].finish_reason) == (want, "stop")
            assert done.usage.completion_tokens < 40
            chunks = list(running.ask(stop=stops, max_tokens=10**5, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content
            running.wait_for(lambda: queue.running == 0)


def test_clients_that_leave_stop_their_generation(scripted):
    body = json.dumps(body_of(max_tokens=10**5)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with endless(scripted) as running:
        queue = running.server.queue
        stream = running.ask(stream=True, max_tokens=10**5)
        assert [next(iter(stream)) for _ in range(3)] and queue.running == 1
        stream.close()
        running.wait_for(lambda: queue.running == 0)
        with running.connect() as client:  # waits for a whole answer
            client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            running.wait_for(lambda: queue.running == 1)
            with running.connect() as waiting:  # leaves while it waits
                waiting.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
                running.wait_for(lambda: queue.waiting == 1)
            running.wait_for(lambda: running.server.inside == 1)
        running.wait_for(lambda: queue.running == 0 and queue.waiting == 0 and running.server.inside == 0)
        assert running.ask(max_tokens=2).usage.completion_tokens == 2


def test_media_of_clients_that_left_are_not_decoded(scripted, monkeypatch):
    with endless(scripted, encoders=1) as running:
        server, go, bodies = running.server, threading.Event(), []
        prepare = server.prepare

        def slow(body):
            bodies.append(json.loads(body)["user"])
            go.wait(300)
            return prepare(body)

        monkeypatch.setattr(server, "prepare", slow)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(running.ask, user="first", max_tokens=1)
            running.wait_for(lambda: bodies == ["first"])
            body = json.dumps(body_of(user="left")).encode()
            with running.connect() as left:
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                left.sendall((head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body)
                running.wait_for(lambda: server.inside == 2 and server.body_bytes > len(body))
            connections = running.uvicorn.server_state.connections
            running.wait_for(lambda: len(connections) == 1)
            last = pool.submit(running.ask, user="last", max_tokens=1)
            running.wait_for(lambda: server.inside == 3)
            go.set()
            assert first.result().usage.completion_tokens == last.result().usage.completion_tokens == 1
        assert bodies == ["first", "last"]


def test_slow_clients_hold_nobody_up(scripted):
    body = json.dumps(body_of(max_tokens=1000, stream=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head = (head + f"Content-Length: {len(body)}\r\n\r\n").encode()
    with endless(scripted, pause=0.0, body_seconds=3.0) as running:
        with running.connect() as half, running.connect() as unread:
            half.sendall(head + body[:20])  # the rest never comes
            unread.sendall(head + body)  # and this one does not read
            running.wait_for(lambda: running.server.queue.running == 1)
            assert running.ask(max_tokens=2).usage.completion_tokens == 2
            assert half.recv(12) == b"HTTP/1.1 408"
            with unread.makefile("rb") as file:
                text = b"".join(iter(file.readline, b"0\r\n"))
            assert text.startswith(b"HTTP/1.1 200") and b'"finish_reason":"length"' in text and b"[DONE]" in text


def test_full_queues_and_lost_time_are_said(scripted):
    model, processor = scripted
    with endless(scripted, max_waiting=1, max_batch=1, seconds=5.0) as running:
        hold, queue = threading.Event(), running.server.queue
        inputs = encode(model, processor, [user_message("a")], device="cpu")
        queue.submit("other", Row(inputs, 10**6, stopped=hold.is_set), print)
        running.wait_for(lambda: queue.running == 1)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(running.ask)
            running.wait_for(lambda: queue.waiting == 1)
            with pytest.raises(openai.RateLimitError, match="too many"):
                running.ask()
            with pytest.raises(openai.RateLimitError):
                list(running.ask(stream=True))
            with pytest.raises(openai.InternalServerError, match="time was over"):
                waits.result()
        hold.set()
        running.wait_for(lambda: queue.running == 0 and running.server.inside == 0)
        late = running.ask(max_tokens=10**5)  # runs until its time is over
        assert late.choices[0].finish_reason == "length" and 1 < late.usage.completion_tokens < 10**5


def test_time_that_is_over_while_the_prompt_is_read_is_said(scripted, monkeypatch):
    rows = []

    def recorded(*values, **options):
        rows.append(Row(*values, **options))
        return rows[-1]

    def slow(*_):
        running.wait_for(rows[-1].stopped)  # the next piece of the prompt is not begun

    monkeypatch.setattr("modeling_omni.serving.Row", recorded)
    model, processor = scripted
    running = Running(model, processor, ServerLimits(seconds=0.5), cache_bytes=1024**2)
    hook = model.model.register_forward_pre_hook(slow)
    try:
        started = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="time was over"):
            running.ask("a question of some length", max_tokens=4)
        assert time.monotonic() - started < 30
        assert rows[0].finish_reason == "interrupted" and not rows[0].tokens
    finally:
        hook.remove()
        running.close()


def test_a_failing_model_fails_its_request_alone(scripted, monkeypatch):
    model, _ = scripted
    with endless(scripted) as running:
        forward = Scripted.forward

        def fails(self, *args, **kwargs):
            if kwargs.get("input_ids") is not None and kwargs["input_ids"].shape[1] > 60:
                raise RuntimeError("secret path /home/x")
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(Scripted, "forward", fails)
        with pytest.raises(openai.InternalServerError) as error:
            running.ask("a long question " * 20, max_tokens=2)
        assert "secret" not in str(error.value) and "RuntimeError" in str(error.value)
        with ThreadPoolExecutor(3) as pool:
            texts = ["b", "a long question " * 20, "c"]
            answers = [pool.submit(running.ask, text, max_tokens=2) for text in texts]
            assert answers[0].result().usage.completion_tokens == 2
            assert answers[2].result().usage.completion_tokens == 2
            assert isinstance(answers[1].exception(), openai.InternalServerError)


def test_clients_take_turns(scripted):
    """Five requests of one client and one of another, two at a time."""
    model, processor = scripted
    model.script, model.pause = processor.encode("a "), 0.002
    queue, order, hold = ServingQueue(model, processor, max_batch=2, max_waiting=7), [], threading.Event()
    inputs = encode(model, processor, [user_message("a")], device="cpu")

    def row(name):
        return Row(inputs, 1, on_token=lambda token: order.append(name))

    queue.submit("x", Row(inputs, 10**6, stopped=hold.is_set), print)
    while not queue.running:
        time.sleep(0.01)
    for name in ("a1", "a2", "a3", "a4", "a5", "b1"):
        queue.submit(name[0], row(name), print)
    queue.submit("b", Row(inputs, 1, stopped=lambda: True, on_token=lambda token: order.append("gone")), print)
    with pytest.raises(QueueFull):
        queue.submit("c", row("c"), print)
    hold.set()
    while queue.waiting or queue.running:
        time.sleep(0.01)
    assert order == ["a1", "b1", "a2", "a3", "a4", "a5"]
    assert queue.batches == 4
    queue.close()
    with pytest.raises(QueueFull):
        queue.submit("c", row("c"), print)


# ------------------------------------------------------------------------------------------------------ process


def test_kill_and_restart():
    environment = {k: v for k, v in os.environ.items() if k != "OMNI_API_KEY"} | {"HF_HUB_OFFLINE": "1"}

    def start(port: int):
        command = [sys.executable, str(ROOT / "infer.py"), "serve", "--port", str(port), "--name", "tiny"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        for line in process.stderr:
            if "listening on" in line:
                return process, int(line.split("/v1")[0].rpartition(":")[2])
        raise AssertionError("the server did not start")

    def ask(port, **options):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=300)
        messages = [{"role": "user", "content": "Copy: banana split"}]
        return client.chat.completions.create(model="tiny", messages=messages, **options)

    process, port = start(0)
    try:
        want = ask(port).choices[0].message.content
        stream = iter(ask(port, stream=True, temperature=50.0, max_tokens=8000))
        assert next(stream)
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            list(stream)
            broken = False
        except Exception:  # whichever the client makes of a lost connection
            broken = True
        assert broken
        process, _ = start(port)
        assert ask(port).choices[0].message.content == want
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130, -signal.SIGINT)
    finally:
        process.kill()
        process.wait()


def test_other_hosts_need_a_password(capfd, monkeypatch):
    monkeypatch.delenv("OMNI_API_KEY", raising=False)
    assert infer.main(["serve", "--host", "0.0.0.0"]) == 2
    assert "OMNI_API_KEY" in capfd.readouterr().err
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        assert infer.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be had" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------ texts


def test_stop_finder_is_a_search_in_the_whole_text():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        text = "".join("abc"[i] for i in torch.randint(0, 3, (20,), generator=generator))
        cuts = sorted(torch.randint(0, 21, (4,), generator=generator).tolist())
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 20])]
        stops = [["ab"], ["abca", "cc"], ["bbb", "acb", "caab"], []][cuts[0] % 4]
        finder, out = StopFinder(stops), ""
        for piece in pieces:
            out += finder.push(piece)
            if finder.found:
                break
        out += finder.finish()
        places = [text.find(stop) for stop in stops if stop in text]
        assert finder.found == bool(places)
        if not places:
            assert out == text
        else:  # nothing of the first stop string to be complete was given out
            assert text.startswith(out) and len(out) <= max(places) and not any(stop in out for stop in stops)


def test_tool_calls_are_read_as_the_template_writes_them(nano):
    processor = nano[1]
    arguments = {
        "city": "D\u00fcsseldorf\nAltstadt", "n": 3, "share": 0.25, "on": True, "items": [1, {"a": None}], "none": None,
        "text": "7", "mark": "a </parameter b> <parameter=x>", "empty": "",
    }  # fmt: skip
    kinds = {"n": "integer", "share": "number", "on": "boolean", "items": "array", "none": ["string", "null"]}
    properties = {key: {"type": kinds.get(key, "string")} for key in arguments}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": properties}}}]
    call = {"function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = processor.apply_chat_template(messages, tools=tools, tokenize=True)["input_ids"][0]
    special = processor.codec.special_ids
    last = max(i for i, token in enumerate(ids) if token == special["<tool_call>"])
    text = processor.decode(ids[last + 1 : ids.index(special["</tool_call>"], last)])
    read = parse_tool_call(text, tools)
    assert read["name"] == "weather" and json.loads(read["arguments"]) == arguments
    for broken in ("", "<function=>", "<function=f", "<function=f><parameter=x>1", "<function=f><parameter=x", "f()"):
        assert parse_tool_call(broken, tools) is None
    assert json.loads(parse_tool_call("<function=g><parameter=x>1</parameter>", tools)["arguments"]) == {"x": "1"}


def test_arguments_follow_their_schema():
    for text, schema, want in (
        ("7", {"type": "integer"}, 7), ("7", {"type": "number"}, 7), ("7.5", {"type": "integer"}, "7.5"),
        ("7", {"type": "string"}, "7"), ("7", None, "7"), ("True", {"type": "boolean"}, True),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None), ("null", {"type": "string"}, "null"),
        ("NaN", {"type": "number"}, "NaN"), ("[1, 2", {"type": "array"}, "[1, 2"),
        ("[" * 9999, {"type": "array"}, "[" * 9999),
        ("9" * 5000, {"type": "integer"}, "9" * 5000), ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
    ):  # fmt: skip
        got = typed_value(text, schema)
        assert got == want and type(got) is type(want), (text, schema)
