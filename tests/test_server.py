"""The HTTP server: OpenAI's API as its own client uses it, bad input, clients that go away, and stopping."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from test_deploy import make_run

httpx = pytest.importorskip("httpx2", reason="the server's tests need pip install -e '.[dev]'")
openai = pytest.importorskip("openai", reason="the server's tests need pip install -e '.[dev]'")
uvicorn = pytest.importorskip("uvicorn", reason="the server's tests need pip install -e '.[serve]'")

from deploy import serve  # noqa: E402  after the packages it needs
from deploy.serving.sampling import SamplingParams  # noqa: E402
from deploy.serving.server import Limits, make_app  # noqa: E402
from deploy.serving.stopping import Server  # noqa: E402
from lab import cli  # noqa: E402
from lab.sampling import generation, int8_cache  # noqa: E402
from lab.storage import runs  # noqa: E402

ROOT = Path(__file__).parent.parent
CHARACTERS = "\n !,.:?" + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
CONTEXT = 4096
LONG = 4000  # tokens that take seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of stage 4 with random weights, characters and a chat template."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    make_run(folder, "4", CHARACTERS, block_size=CONTEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Running:
    """A server in a thread of this process, on a free port."""

    def __init__(self, folder: Path, limits: Limits | None = None, context: int | None = None, **options):
        settings = serve.Settings(str(folder), cache_memory=16, device="cpu", context=context)
        self.served = serve.load(settings)
        app = make_app(self.served, limits, **options)
        self.worker, self.engine = app.state.worker, self.served.engine
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**13)  # for slow readers
        self.url, self.address = serve.url(self.socket), self.socket.getsockname()
        config = uvicorn.Config(app, log_level="error", server_header=False)
        self.server = Server(config, self.worker, grace=0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stop(self):
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def stats(self) -> dict:
        return self.call(self.engine.stats)

    def generate(self, *given) -> list:
        return self.call(lambda: self.engine.generate(*given))

    def call(self, function):
        """What the function returns in the engine's thread."""
        return asyncio.run_coroutine_threadsafe(self.worker.call(function), self.server.loop).result()

    def post(self, path="/v1/completions", **body):
        return self.http.post(path, json={"model": "tiny"} | body)

    def becomes_idle(self, seconds=2.0) -> bool:
        """Whether no request holds a block within that time."""
        return becomes(
            lambda: not self.worker.open and not self.engine.has_work() and held(self.stats()) == 0, seconds
        )


def held(stats: dict) -> float:
    return stats["running"] + stats["waiting"] + stats["cache_use"]


def becomes(condition, seconds=2.0) -> bool:
    """Whether the condition is true within that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def running(folder, limits=None, **options):
    server = Running(folder, limits, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(run):
    """A server for all tests of this module that leave it as it was."""
    with running(run) as started:
        yield started


@pytest.fixture
def client(server):
    return server.client


@pytest.fixture(scope="module")
def expected(run):
    """expected(prompt, n): the greedy continuation by sample.py's code."""
    model, _ = runs.load(run, "best", torch.device("cpu"))
    tokenizer = runs.tokenizer(run)

    def text(prompt, n=12):
        tokens = tokenizer.encode(prompt).tolist()
        made = generation.generate(model, tokens, n, tokenizer.vocab_size, temperature=0)
        return tokenizer.decode(list(made))

    text.model, text.tokenizer = model, tokenizer
    return text


GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


# --- What OpenAI's client gets ---


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_sample_py_writes(client, expected):
    answer = client.completions.create(prompt="To be, or", **GREEDY)
    assert answer.choices[0].text == expected("To be, or")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        9,
        12,
        21,
    )


def test_tokens_and_lists_are_prompts_too(client, expected):
    prompts = ["To be, or", "not to be"]
    as_tokens = [expected.tokenizer.encode(prompt).tolist() for prompt in prompts]
    for given in (prompts, as_tokens):
        answer = client.completions.create(prompt=given, **GREEDY)
        assert [choice.text for choice in answer.choices] == [expected(prompt) for prompt in prompts]
        assert answer.usage.prompt_tokens == 18 and answer.usage.completion_tokens == 24
    assert client.completions.create(prompt=as_tokens[0], **GREEDY).choices[0].text == expected(prompts[0])


def test_a_stream_has_the_same_text_and_the_usage_at_its_end(client, expected):
    options = {"include_usage": True}
    *chunks, last = client.completions.create(prompt="Ah", stream=True, stream_options=options, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected("Ah")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks) and len({chunk.id for chunk in chunks}) == 1
    assert last.choices == [] and last.usage.completion_tokens == 12
    chunks = list(client.completions.create(prompt="Ah", stream=True, **GREEDY))
    assert all(chunk.choices for chunk in chunks)  # nobody asked for the usage


def test_a_chat_is_rendered_with_the_template(client, expected):
    messages = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
    ]
    prompt = "system: Be kind\nuser: Who are you?\nassistant: "
    answer = client.chat.completions.create(messages=messages, **GREEDY)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected(prompt))
    assert answer.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    # The answer, as the client returns it, is a message of the next request.
    messages += [message, {"role": "user", "content": "And now?"}]
    again = client.chat.completions.create(messages=messages, **GREEDY)
    assert again.usage.prompt_tokens == len(f"{prompt}{message.content}\nuser: And now?\nassistant: ")


def test_a_chat_without_max_tokens_may_fill_the_context(run):
    with running(run, context=64) as server:
        answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a" * 20}])
    assert (
        answer.json()["usage"]["total_tokens"] == 64
        and answer.json()["choices"][0]["finish_reason"] == "length"
    )


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_the_cache_dtype_gives_the_text_of_sample_py_with_the_same_flag(run, cache_dtype):
    settings = cli.parse_flags(serve.Settings, ["--run", str(run), "--cache-dtype", cache_dtype])
    settings.cache_memory, settings.device = 1.0, "cpu"
    engine = serve.load(settings).engine
    prompt = engine.tokenizer.encode("To be, or").tolist()
    params = SamplingParams(max_tokens=40, temperature=0, logprobs=0)
    ((answer,),) = engine.generate([prompt], params)
    model, _ = runs.load(run, "best", torch.device("cpu"))
    if cache_dtype == "int8":
        int8_cache.use(model)
    assert answer.token_ids == list(generation.generate(model, prompt, 40, len(CHARACTERS), temperature=0))
    with torch.inference_mode():
        cache = model.new_cache(1, 60)
        logits = [model(torch.tensor([prompt]), cache=cache)[0][0, -1]]
        logits += [model(torch.tensor([[token]]), cache=cache)[0][0, -1] for token in answer.token_ids[:-1]]
    logprobs = torch.stack(logits).log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    found = torch.tensor([entry.logprob for entry in answer.logprobs])
    torch.testing.assert_close(found, logprobs, atol=2e-5, rtol=0)


def test_without_a_chat_template_the_error_says_so(run, server, tmp_path):
    (tmp_path / "other").mkdir()
    served = server.served
    before, served.template = served.template, missing_template(tmp_path)
    try:
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*use /v1/completions"):
            server.client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **GREEDY)
    finally:
        served.template = before


def missing_template(folder):
    try:
        return serve.ChatTemplate(folder)
    except serve.UserError as error:
        return error


def test_a_stop_string_ends_the_text_and_is_not_in_it(client, expected):
    whole = expected("Ah", 40)
    stop = whole[20:23]
    for stream in (False, True):
        answer = client.completions.create(
            prompt="Ah", stop=["???", stop], stream=stream, **GREEDY | {"max_tokens": 40}
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_n_texts_differ_and_a_seed_repeats_them(client):
    def texts(seed):
        answer = client.completions.create(model="tiny", prompt="Ah", max_tokens=20, n=3, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    assert len(set(texts(1))) == 3 and texts(1) == texts(1) != texts(2)
    chunks = client.completions.create(model="tiny", prompt="Ah", max_tokens=20, n=3, seed=1, stream=True)
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts(1)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models(client, expected, stream):
    tokens = expected.tokenizer.encode("Ah" + expected("Ah")).tolist()
    with torch.inference_mode():
        truth = expected.model(torch.tensor([tokens]))[0][0, 1:-1, : len(CHARACTERS)].log_softmax(-1)
    chosen = truth.gather(1, torch.tensor(tokens[2:])[:, None])[:, 0]
    answer = client.completions.create(prompt="Ah", logprobs=3, stream=stream, **GREEDY)
    parts = (
        [c.choices[0].logprobs for c in answer if c.choices[0].logprobs]
        if stream
        else [answer.choices[0].logprobs]
    )
    assert "".join(token for part in parts for token in part.tokens) == expected("Ah")
    found = torch.tensor([value for part in parts for value in part.token_logprobs])
    assert torch.allclose(found, chosen, atol=1e-4)
    tops = [sorted(top.values(), reverse=True)[:3] for part in parts for top in part.top_logprobs]
    assert torch.allclose(torch.tensor(tops), truth.topk(3).values, atol=1e-4)
    assert [offset for part in parts for offset in part.text_offset] == list(range(12))


def test_logprobs_of_a_chat(client):
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert bytes(b for entry in content for b in entry.bytes).decode() == answer.choices[0].message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)  # greedy
    assert {len(entry.top_logprobs) for entry in content} == {2}


def test_beams_are_those_of_the_engine(server):
    prompts = ["Ah", "To be"]
    params = SamplingParams(max_tokens=9, beams=4, n=2, length_penalty=0.5)
    texts = [[found.text for found in each] for each in server.generate(prompts, params)]
    given = {"use_beam_search": True, "length_penalty": 0.5}
    same = {"model": "tiny", "max_tokens": 9}
    answer = server.client.completions.create(
        prompt=prompts, n=2, best_of=4, logprobs=0, extra_body=given, **same
    )
    assert [choice.text for choice in answer.choices] == texts[0] + texts[1]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].finish_reason == "length" and len(answer.choices[0].logprobs.tokens) == 9
    answer = server.post(prompt="Ah", n=4, **given | same)  # n alone is the number of beams
    assert [choice["text"] for choice in answer.json()["choices"]][:2] == texts[0]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
    answer = server.post("/v1/chat/completions", **given | same | chat)
    (found,) = server.generate(
        ["user: Hi\nassistant: "], SamplingParams(max_tokens=9, beams=2, n=2, length_penalty=0.5)
    )
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [f.text for f in found]
    assert server.becomes_idle()


# --- What is refused ---

BEAMS = {"use_beam_search": True, "best_of": 4}
REFUSED = {
    "tools": ("chat", {"tools": [{"type": "function"}]}, "tools", "'tools'"),
    "functions": ("chat", {"functions": [{}]}, "functions", "'functions'"),
    "JSON mode": ("chat", {"response_format": {"type": "json_object"}}, "response_format", "not implemented"),
    "an image": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        "'text'",
    ),
    "a tool's message": ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "'system'"),
    "no messages": ("chat", {"messages": []}, "messages", "should have at least 1 item, not []"),
    "a null content": ("chat", {"messages": [{"role": "user", "content": None}]}, "messages", "string"),
    "two limits": ("chat", {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "not both"),
    "top_logprobs alone": ("chat", {"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
    "a suffix": ("text", {"suffix": "x"}, "suffix", "'suffix' (\"x\") is not implemented"),
    "echo": ("text", {"echo": True}, "echo", "'echo' (true) is not implemented"),
    "a user": ("text", {"user": "me"}, "user", "'user'"),
    "an unknown field": ("text", {"temprature": 1}, "temprature", "unknown field 'temprature'"),
    "a chat's field": ("text", {"max_completion_tokens": 1}, "max_completion_tokens", "unknown field"),
    "no prompt": ("text", {"prompt": []}, "prompt", "prompt"),
    "an empty prompt": ("text", {"prompt": ""}, "prompt", "no tokens"),
    "an unknown character": ("text", {"prompt": "é"}, "prompt", "'é'"),
    "an unpaired surrogate": ("text", {"prompt": "\ud800"}, "prompt", ""),
    "an unknown token": ("text", {"prompt": [10**30]}, "prompt", "tokens 0 to 58"),
    "a mixed prompt": ("text", {"prompt": ["a", 1]}, "prompt", "prompt"),
    "a negative temperature": ("text", {"temperature": -1}, "temperature", "not -1"),
    "a text as a number": ("text", {"temperature": "1"}, "temperature", "not '1'"),
    "true as a number": ("text", {"n": True}, "n", "not True"),
    "no tokens to generate": ("text", {"max_tokens": 0}, "max_tokens", "not 0"),
    "too many tokens": ("text", {"max_tokens": CONTEXT}, "prompt", "or lower max_tokens to 4,09"),
    "a long prompt": ("text", {"prompt": "a" * CONTEXT}, "prompt", "has 4,096 tokens"),
    "many texts": ("text", {"n": 17}, "n", "limit is 16"),
    "many prompts": ("text", {"prompt": ["a"] * 17}, "prompt", "limit is 16"),
    "best_of below n": ("text", {"n": 3, "best_of": 2}, "best_of", "less than n"),
    "best_of in a stream": ("text", {"best_of": 2, "stream": True}, "best_of", "leave stream out"),
    "an unknown token's bias": ("text", {"logit_bias": {"59": 1}}, "logit_bias", "'59'"),
    "a bias for a word": ("text", {"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    "an empty stop": ("text", {"stop": ["a", ""]}, "stop", "empty"),
    "stream options alone": ("text", {"stream_options": {}}, "stream_options", "stream = true"),
    "a tiny penalty": ("text", {"repetition_penalty": 5e-324}, "repetition_penalty", "0.01"),
    "a large seed": ("text", {"seed": 2**63}, "seed", "seed"),
    "beams in a stream": ("chat", {"use_beam_search": True, "n": 2, "stream": True}, "stream", "at the end"),
    "one beam": ("text", {"use_beam_search": True}, "use_beam_search", "needs two beams or more"),
    "beams that are drawn": (
        "text",
        BEAMS | {"temperature": 0.7},
        "temperature",
        "not for beam search",
    ),
    "beams of likely tokens": ("chat", BEAMS | {"top_p": 0.5}, "top_p", "top_p = 0.5 is not for beam search"),
    "beams that stop": ("text", BEAMS | {"stop": ["x"]}, "stop", 'stop = ["x"] is not for beam search'),
    "beams beyond the batch": ("text", {"use_beam_search": True, "n": 17}, "n", "limit is 16"),
    "many ends of beams": ("text", BEAMS | {"stop_token_ids": [*range(16)]}, None, "a vocabulary of 68"),
    "a length penalty alone": ("text", {"length_penalty": 2}, "length_penalty", "use_beam_search = true"),
    "many logprobs": ("text", {"logprobs": 21}, "logprobs", "20"),
}


@pytest.mark.parametrize("kind, fields, param, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_by_name(server, kind, fields, param, message):
    path, given = ("/v1/completions", {"prompt": "Ah"})
    if kind == "chat":
        path, given = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}
    answer = server.http.post(path, content=json.dumps({"model": "tiny"} | given | fields), headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(answer.text) < 500


JSON = {"Content-Type": "application/json"}


EXTREMES = [
    {"temperature": 5e-324},
    {"temperature": 100},
    {"top_p": 5e-324},
    {"top_k": 1},
    {"top_k": 10**30},
    {"min_p": 1},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100},
    {"presence_penalty": -2, "frequency_penalty": -2},
    {"presence_penalty": 2, "frequency_penalty": 2},
    {"logit_bias": {str(token): -100 for token in range(59)}},
    {"logit_bias": {"5": 100}, "temperature": 0},
    {"seed": 2**63 - 1, "n": 16},
    {"seed": -(2**63)},
    {"n": 1, "best_of": 16},
    {"logprobs": 20},
    {"use_beam_search": True, "n": 16, "best_of": 16, "length_penalty": -10, "logprobs": 20},
    {"use_beam_search": True, "best_of": 2, "length_penalty": 10, "temperature": 1, "top_p": 1, "seed": 3},
    {"stop": ["a"] * 16, "stop_token_ids": [0] * 16},
    {"max_tokens": CONTEXT - 2, "stop_token_ids": list(range(16))},
]


@pytest.mark.parametrize("fields", EXTREMES, ids=lambda fields: str(fields)[:40])
def test_the_extremes_of_each_field_give_an_answer(server, fields):
    """A request that broke a step of the engine would end all others too."""
    answer = server.post(prompt="Ah", **{"max_tokens": 8} | fields)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == fields.get("n", 1)


def test_fields_that_change_nothing_are_accepted(server, expected):
    nothing = {"tools": None, "response_format": {"type": "text"}, "user": None, "stop": None, "n": None}
    answer = server.post(prompt="Ah", **GREEDY | nothing | {"echo": False, "logit_bias": None})
    assert answer.json()["choices"][0]["text"] == expected("Ah")


RAW = {
    "no JSON": ("POST", "/v1/completions", {"content": b"{", "headers": JSON}, 400, "not JSON"),
    "deep JSON": ("POST", "/v1/completions", {"content": b"[" * 10**5, "headers": JSON}, 400, ""),
    "not UTF-8": ("POST", "/v1/completions", {"content": b'{"model": "\xff"}', "headers": JSON}, 400, ""),
    "a list": ("POST", "/v1/completions", {"content": b"[1]", "headers": JSON}, 400, "JSON object"),
    "a form": ("POST", "/v1/completions", {"data": {"model": "tiny"}}, 400, "Content-Type: application/json"),
    "nothing": ("POST", "/v1/chat/completions", {}, 400, ""),
    "another path": ("GET", "/v1/nothing", {}, 404, "no '/v1/nothing': /openapi.json"),
    "no /v1": ("POST", "/completions", {}, 404, "use /v1/completions"),
    "another method": ("GET", "/v1/completions", {}, 405, "GET is not for '/v1/completions': use POST"),
    "another model": ("POST", "/v1/completions", {"json": {"model": "x", "prompt": "a"}}, 404, "'x'"),
    "a large body": ("POST", "/v1/completions", {"content": b" " * 2**21}, 413, "1,048,576 bytes"),
    "a large body in chunks": (
        "POST",
        "/v1/completions",
        {"content": (b" " * 2**18 for _ in range(8))},
        413,
        "1,048,576 bytes",
    ),
    "another host": ("GET", "/v1/models", {"headers": {"Host": "evil.example"}}, 403, "'evil.example'"),
}


@pytest.mark.parametrize("method, path, options, status, message", RAW.values(), ids=RAW.keys())
def test_bad_requests_get_errors_in_openais_shape(run, local_server, method, path, options, status, message):
    with httpx.Client(base_url=local_server.url) as http:
        answer = http.request(method, path, **options)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and message in error["message"]
    assert server_works(local_server)


@pytest.fixture(scope="module")
def local_server(run):
    """A server that answers only requests to this machine's own name, and three at a time."""
    with running(run, Limits(max_requests=3), only_local=True) as started:
        yield started


def server_works(server) -> bool:
    return server.post(prompt="Ah", **GREEDY).status_code == 200


def test_the_api_key_is_needed_for_everything_but_the_page(run):
    with running(run, api_key="open-sesame") as server:
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="open-sesame", max_retries=0)
        assert [model.id for model in right.models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            server.client.models.list()
        for path in ("/v1/models", "/metrics", "/debug/blocks?id=x", "/openapi.json", "/nothing"):
            answer = server.http.get(path)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert server.http.get("/health").status_code == server.http.get("/").status_code == 200


# --- Many clients ---


def start_stream(server, **fields):
    """A connection on which a long stream has begun; closing it is what a client that goes away does."""
    connection = socket.create_connection(server.address)
    send_request(connection, {"max_tokens": LONG, "stream": True} | fields)
    return connection


def send_request(connection: socket.socket, fields: dict) -> None:
    """Sends a request for a completion, and reads nothing."""
    body = json.dumps({"model": "tiny", "prompt": "Ah"} | fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"n": 4}, {"prompt": ["a", "b"]}], ids=str)
def test_a_client_that_goes_away_frees_its_blocks(server, fields):
    with closing(start_stream(server, **fields)):
        assert becomes(lambda: held(server.stats()) > 0)
        time.sleep(0.05)
        assert server.worker.open
    assert server.becomes_idle(1)  # the whole answer would take longer
    assert server_works(server)


def test_blocks_are_free_a_step_after_the_abort(server):
    steps, left = 0, []
    step, abort = server.engine.step, server.engine.abort

    def counted():
        nonlocal steps
        steps += 1
        return step()

    def noted(request_id):
        abort(request_id)
        left.append((steps, server.engine.has_work()))

    server.engine.step, server.engine.abort = counted, noted
    try:
        connection = start_stream(server)
        assert becomes(lambda: steps > 5)
        when = []
        worker_abort = server.worker.abort
        server.worker.abort = lambda request_id: (when.append(steps), worker_abort(request_id))
        connection.close()
        assert becomes(lambda: left)
        assert left[0][0] <= when[0] + 1 and left[0][1] is False
    finally:
        server.engine.step, server.engine.abort, server.worker.abort = step, abort, worker_abort
    assert server.becomes_idle()


def test_a_client_that_goes_away_while_it_waits_leaves_nothing(server):
    connections = [start_stream(server) for _ in range(24)]  # more than the batch has room for
    assert becomes(lambda: server.stats()["waiting"] > 0)
    for connection in connections:
        connection.close()
    assert server.becomes_idle()


def test_a_slow_reader_does_not_slow_down_others(server, expected):
    with (
        socket.socket() as slow
    ):  # it reads nothing: the sockets' buffers are full before its answer is complete
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        slow.connect(server.address)
        send_request(slow, {"max_tokens": 500, "logprobs": 20, "temperature": 0, "stream": True})
        assert becomes(lambda: held(server.stats()) > 0)
        for _ in range(3):
            started = time.monotonic()
            answer = server.client.completions.create(prompt="Ah", **GREEDY)
            assert answer.choices[0].text == expected("Ah")
            assert time.monotonic() - started < 2
        assert server.becomes_idle(30)  # the engine does not wait for the reader
        assert server.server.server_state.tasks  # but the rest of the answer does
    assert server_works(server)


def test_too_many_open_requests_are_refused_at_once(local_server):
    server = local_server
    connections = [start_stream(server) for _ in range(3)]
    try:
        assert becomes(lambda: len(server.worker.open) == 3)
        started = time.monotonic()
        answer = server.post(prompt="Ah", **GREEDY)
        assert time.monotonic() - started < 1
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert "3 requests are open" in answer.json()["error"]["message"]
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(prompt="Ah", **GREEDY)
        assert 'serving_refused_total{status="429"} 2' in server.http.get("/metrics").text
    finally:
        for connection in connections:
            connection.close()
    assert server.becomes_idle() and server_works(server)


def test_an_error_of_the_engine_ends_its_requests_and_not_the_server(server, monkeypatch, capsys):
    step = server.engine.step

    def fails():
        monkeypatch.setattr(server.engine, "step", step)
        raise RuntimeError("broken")

    monkeypatch.setattr(server.engine, "step", fails)
    with pytest.raises(openai.InternalServerError, match="an error in the engine"):
        server.client.completions.create(prompt="Ah", **GREEDY)
    assert "RuntimeError: broken" in capsys.readouterr().err
    assert server.becomes_idle() and server_works(server)
    monkeypatch.setattr(server.engine, "step", fails)
    with pytest.raises(openai.APIError, match="an error in the engine"):
        list(server.client.completions.create(prompt="Ah", stream=True, **GREEDY))


# --- The other pages ---


def test_metrics_count_requests_and_tokens(run):
    with running(run) as server:
        server.client.completions.create(prompt="Ah", **GREEDY)
        assert server.post(prompt="").status_code == 400
        text = server.http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    values = {name: float(value) for name, value in lines.items()}
    assert values['serving_finished_total{reason="length"}'] == 1
    assert values["serving_prompt_tokens_total"] == 2 and values["serving_generated_tokens_total"] == 12
    assert values["serving_time_to_first_token_seconds_count"] == 1
    assert values["serving_time_between_tokens_seconds_count"] == 11
    assert values['serving_refused_total{status="400"}'] == 1
    assert {"serving_prefix_hits_total", "serving_preemptions_total"} <= values.keys()


def test_metrics_are_right_when_the_last_client_has_gone_away(server):
    with closing(start_stream(server)):
        assert becomes(lambda: metric(server.url, "serving_running") == 1)
        assert metric(server.url, "serving_cache_use") > 0
    gauges = ("serving_running", "serving_waiting", "serving_cache_use")
    assert becomes(lambda: all(metric(server.url, gauge) == 0 for gauge in gauges))


def test_tokenize_gives_the_tokens_of_texts_and_conversations(server, expected):
    encode = expected.tokenizer.encode
    assert server.post("/tokenize", prompt="Ah").json() == {
        "tokens": encode("Ah").tolist(),
        "count": 2,
        "max_model_len": CONTEXT,
    }
    messages = [{"role": "user", "content": "Hi"}]
    found = server.post("/tokenize", messages=messages).json()["tokens"]
    assert found == encode("user: Hi\nassistant: ").tolist()
    assert server.post("/tokenize").status_code == 400
    assert server.post("/tokenize", prompt="").json()["count"] == 0


def test_the_blocks_of_a_request_can_be_watched(server):
    stream = server.client.completions.create(model="tiny", prompt="Ah" * 20, max_tokens=LONG, stream=True)
    first = next(iter(stream))
    answer = server.http.get("/debug/blocks", params={"id": first.id}).json()
    assert len(answer["tables"]) == 1 and len(answer["tables"][0]) >= 3
    stream.close()
    assert becomes(lambda: server.http.get("/debug/blocks", params={"id": first.id}).json()["tables"] == [])


def test_the_experts_of_the_last_tokens_can_be_watched(tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.serving.experts.SECONDS", 0.5)
    torch.manual_seed(0)
    make_run(tmp_path / "moe", "7", CHARACTERS, block_size=CONTEXT)
    with running(tmp_path / "moe") as server:
        routers = [m for m in server.engine.model.modules() if type(m).__name__ == "Router"]
        stream = server.client.completions.create(model="moe", prompt="Ah", max_tokens=LONG, stream=True)
        next(iter(stream))

        def experts():
            return server.http.get("/debug/blocks", params={"id": "x"}).json()["experts"]

        assert becomes(lambda: experts()["tokens"] == 32)
        layers, config = experts()["layers"], server.engine.model.config
        assert [layer["layer"] for layer in layers] == [0, 1]  # not the MTP block's
        for layer in layers:
            assert len(layer["counts"]) == config.n_routed_experts
            assert sum(layer["counts"]) == 32 * config.num_experts_per_tok
        # Nobody watches any more: the routers run without hooks again.
        assert becomes(lambda: not any(router._forward_hooks for router in routers), 5)
        stream.close()


def test_the_page_loads_nothing_from_elsewhere(server):
    answer = server.http.get("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", answer.text)


# --- Starting and stopping ---


def start_process(run, *flags):
    """python -m deploy.serve in a process of its own, once it says its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.serve", "--run", str(run), "--port", "0", "--device", "cpu", *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return process, found[0]
    raise AssertionError("the server did not start")


def test_sigterm_under_load_lets_answers_finish_and_a_second_one_ends_them(run):
    process, url = start_process(run, "--grace", "100")
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        errors, short = [], []

        def long_request():
            try:
                for _ in client.completions.create(
                    model="tiny", prompt="Ah", max_tokens=LONG, n=2, stream=True
                ):
                    pass
            except openai.APIError as error:
                errors.append(error)

        def short_request():
            short.append(client.completions.create(model="tiny", prompt="Ah", max_tokens=100))

        threads = [threading.Thread(target=long_request) for _ in range(6)]
        for thread in threads:
            thread.start()
        assert becomes(lambda: metric(url, "serving_running") == 12, 30)
        threads.append(threading.Thread(target=short_request))
        threads[-1].start()
        assert becomes(lambda: metric(url, "serving_running") == 13, 30)
        process.send_signal(signal.SIGTERM)
        threads[-1].join(30)
        assert len(short) == 1 and short[0].choices[0].finish_reason == "length"  # it had time to finish
        assert process.poll() is None and not errors
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        for thread in threads:
            thread.join(30)
        assert len(errors) == 6 and all("the server is stopping" in str(error) for error in errors)
        messages = process.stderr.read()
        assert "stopping: open requests (7) have 100 seconds to finish" in messages
        assert "Traceback" not in messages
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_answers_that_last_longer_than_the_grace_end_with_an_error(run):
    with running(run) as server:  # its grace is 0 seconds
        stream = server.client.completions.create(model="tiny", prompt="Ah", max_tokens=LONG, stream=True)
        next(iter(stream))
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf"^{name} (.*)$", text, re.MULTILINE)[1])


def test_while_it_stops_the_server_takes_no_new_request(run):
    with running(run) as server:
        assert server_works(server)
        server.worker.stopping = True
        answer = server.post(prompt="Ah", **GREEDY)
        assert answer.status_code == 503 and "stopping" in answer.json()["error"]["message"]
        assert server.http.get("/health").status_code == 503


def call_serve(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        serve.cli.run(serve.main)
    return stop.value.code


def test_bad_flags_are_explained(run, server, monkeypatch, capsys):
    port = server.address[1]
    for flags, message in {
        ("--run", run, "--port", port): f"cannot listen on 127.0.0.1, port {port}: Address already in use\n",
        ("--run", run, "--host", "nowhere.invalid"): "cannot listen on nowhere.invalid",
        ("--run", "missing"): "missing is not a run: there is no such folder",
        ("--run", run, "--port", 70000): "port must be from 0 to 65535, not 70000",
        ("--run", run, "--api-key", ""): "API key",
        ("--run", run, "--context", CONTEXT + 1): "has 4096 positions",
        ("--run", run, "--swap-memory", -1): "swap_memory must be 0 MB or more",
        ("--run", run, "--cache-memory", 0.001): "the cache needs at least",
        ("--run", run, "--max-requests", 0): "max_requests must be at least 1, not 0",
    }.items():
        flags = flags if "--port" in flags else (*flags, "--port", 0)
        assert call_serve(monkeypatch, *flags) == 2
        error = capsys.readouterr().err
        error = error[error.index("error: ") :]  # before it stands what is being loaded
        assert message in error and len(error.splitlines()) <= 2, error
