"""The server under load, with made-up requests, and in a browser: make serve-check."""
# ruff: noqa: F811  fixtures are imported, and are arguments of tests

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_deploy import make_run
from test_server import CHARACTERS, ROOT, TEMPLATE, becomes, held, httpx, run, running  # noqa: F401

from deploy.serving.engine import Engine
from deploy.serving.sampling import SamplingParams
from deploy.serving.server import Limits

pytestmark = pytest.mark.skipif("SERVE_CHECK" not in os.environ, reason="long: make serve-check runs it")

N_REQUESTS = int(os.environ.get("SOAK_REQUESTS", 2000))
N_CLIENTS = 16


def test_2000_requests_with_disconnects_leave_no_block_and_little_memory(run):
    """A fifth of the clients go away, at random moments; the others get complete answers."""
    draw = random.Random(0)
    jobs = [job(draw) for _ in range(N_REQUESTS)]
    outcomes, memory = [], []
    with running(run, Limits(max_requests=3 * N_CLIENTS)) as server:

        def client():
            while jobs:
                try:
                    body, leave_after = jobs.pop()
                except IndexError:
                    return
                outcomes.append(ask(server.address, body, leave_after))
                if len(outcomes) % 100 == 0:
                    memory.append(resident())

        threads = [threading.Thread(target=client) for _ in range(N_CLIENTS)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - started
        assert server.becomes_idle(5)
        metrics = server.http.get("/metrics").text
    counts = {kind: outcomes.count(kind) for kind in set(outcomes)}
    growth = max(memory[len(memory) // 2 :]) - memory[len(memory) // 4]
    print(f"\n{N_REQUESTS} requests in {seconds:.0f} s: {counts}; memory {memory[0]} to {memory[-1]} MB")
    assert counts.keys() == {"complete", "left"} and 0.1 < counts["left"] / N_REQUESTS < 0.3
    assert growth < 50  # MB; a leak of a request's tokens and text would be small, one of its blocks is not
    assert "serving_running 0.0" in metrics and "serving_waiting 0.0" in metrics


def job(draw: random.Random) -> tuple[dict, float | None]:
    """A request, and after how many seconds its client goes away (None: it stays)."""
    prefix = "The same beginning. " * draw.choice([0, 0, 4])
    body = {
        "model": "tiny",
        "prompt": prefix + "".join(draw.choices(CHARACTERS, k=draw.randint(1, 60))),
        "max_tokens": draw.randint(1, 60),
        "stream": draw.random() < 0.5,
        "n": draw.choice([1, 1, 1, 2, 4]),
        "seed": draw.randint(0, 10),
    }
    if draw.random() < 0.2:
        return body | {"max_tokens": 2000}, draw.uniform(0, 0.5)
    return body, None


def ask(address, body: dict, leave_after: float | None) -> str:
    """Sends a request over a connection of its own. Returns what came of it."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + content)
        if leave_after is not None:
            time.sleep(leave_after)
            return "left"
        connection.settimeout(120)
        answer = b""
        while part := connection.recv(2**16):
            answer += part
    status = answer.split(b" ", 2)[1].decode()
    whole = b"data: [DONE]" in answer if body["stream"] else answer.count(b'"finish_reason":') == body["n"]
    return "complete" if status == "200" and whole else f"status {status}"


def resident() -> int:
    """This process's memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 58}, "minItems": 1}
PROMPT = {"anyOf": [{"type": "string", "pattern": "^[a-z ]+$"}, TOKENS, {"type": "array", "items": TOKENS}]}


def test_no_request_made_from_the_openapi_document_gets_a_500(run, tmp_path):
    """Schemathesis makes up requests, valid ones and others."""
    pytest.importorskip("schemathesis", reason="needs pip install -e '.[serve-check]'")
    with running(run) as server:
        document = server.http.get("/openapi.json").json()
        # So that some requests get past the checks:
        for kind in ("CompletionRequest", "ChatRequest", "TokenizeRequest"):
            fields = document["components"]["schemas"][kind]["properties"]
            fields["model"] = {"const": "tiny"}
            fields.get("max_tokens", {})["anyOf"] = [{"type": "integer", "minimum": 1, "maximum": 20}]
            fields.get("n", {})["anyOf"] = [{"type": "integer", "minimum": 1, "maximum": 3}]
            sampling = ("use_beam_search", "length_penalty", "stop_token_ids", "logit_bias")
            for field in ("best_of", "stream_options", *sampling):
                fields.pop(field, None)  # they are rarely valid beside the others
        document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"] = PROMPT
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                "openapi.json",
                f"--url={server.url}",
                "--checks=not_a_server_error",
                "--max-examples=10",
                "--seed=1",
                "--request-timeout=60",
                "--no-color",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        print(done.stdout[-1500:])
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert server.becomes_idle(5)


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(sys.argv[2])]
    answers = model.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    print("IDS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names a Python that has vLLM")
def test_vllm_writes_what_our_engine_writes(tmp_path):
    """From the run that deploy.export made for transformers, greedily."""
    torch.manual_seed(0)
    make_run(tmp_path / "tiny", "4", CHARACTERS, block_size=256, n_embd=128, n_head=2)
    export = [sys.executable, "-m", "deploy.export", "--run", tmp_path / "tiny", "--to", "hf"]
    subprocess.run([*export, "--out", tmp_path / "hf"], cwd=ROOT, check=True)
    prompts = [[1, 2, 3], [30, 20, 10, 5, 40]]
    (tmp_path / "ask.py").write_text(VLLM)
    ask = [os.environ["VLLM_PYTHON"], tmp_path / "ask.py", tmp_path / "hf", json.dumps(prompts)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(ask, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("IDS "))
    engine = Engine.of_run(tmp_path / "tiny", device="cpu", cache_memory=16)
    ours = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    assert json.loads(line.removeprefix("IDS ")) == [text.token_ids for (text,) in ours]


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[serve-check]'")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium, or CHROMIUM=its path")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory):
    """A server of stage 6, which has experts."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    make_run(folder, "6", CHARACTERS, block_size=2048)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running(folder) as server:
        yield server


@pytest.fixture
def page(browser, chat_server):
    """The chat page. Messages on its console and requests to elsewhere are failures."""
    context = browser.new_context(viewport={"width": 1200, "height": 750})
    opened, problems = context.new_page(), []
    opened.on("console", lambda message: "429" in message.text or problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "request", lambda request: request.url.startswith(chat_server.url) or problems.append(request.url)
    )
    opened.goto(chat_server.url)
    opened.get_by_role("heading", name="tiny").wait_for()
    yield opened
    context.close()
    assert not problems


def settings(page, **values):
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " ")).fill(value)


def test_the_page_streams_an_answer_and_keeps_the_conversation(page, chat_server):
    settings(page, Most_tokens="40", Temperature="0", System_prompt="Be kind")
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_text("40 tokens").wait_for()
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 40}
    answer = chat_server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
    assert page.locator(".assistant .text").text_content() == answer["content"]
    page.get_by_label("Message").fill("And now?")
    page.get_by_role("button", name="Send").click()
    page.locator(".assistant .note").nth(1).get_by_text("40 tokens").wait_for()
    messages += [answer, {"role": "user", "content": "And now?"}]
    answer = chat_server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
    assert page.locator(".assistant .text").nth(1).text_content() == answer["content"]


def test_the_stop_button_and_escape_end_an_answer_and_free_its_blocks(page, chat_server):
    settings(page, Most_tokens="2000")
    for stop in (
        lambda: page.get_by_role("button", name="Stop").click(),
        lambda: page.keyboard.press("Escape"),
    ):
        page.get_by_label("Message").fill("Hello")
        page.keyboard.press("Enter")
        page.get_by_text("tokens/s").last.wait_for()
        assert held(chat_server.stats()) > 0
        stop()
        page.get_by_text("stopped").last.wait_for()
        assert chat_server.becomes_idle()
        page.get_by_role("button", name="New").click()


def test_the_panel_shows_blocks_and_experts_while_an_answer_is_written(page):
    settings(page, Most_tokens="2000")
    page.get_by_role("button", name="Inside").click()
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_text("The conversation holds 3").wait_for()  # 3, or 30 to 39 blocks
    assert page.locator(".blocks li").count() >= 3
    page.get_by_text("of the last 32 tokens").wait_for()
    assert page.locator(".experts tr").count() == 2
    page.keyboard.press("Escape")
    page.get_by_text("holds no block").wait_for()


def test_the_panel_waits_until_the_blocks_of_a_stopped_answer_are_free(page):
    """A server that is busy notices a little later that nobody reads the answer."""
    held, late = [], []

    def answer(route):
        response = route.fetch()
        if late:
            route.fulfill(body=late.pop())
        else:
            held.append(response.text())
            route.fulfill(response=response)

    page.route("**/debug/blocks*", answer)
    settings(page, Most_tokens="2000")
    page.get_by_role("button", name="Inside").click()
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_text("The conversation holds").wait_for()
    page.get_by_text("blocks of").wait_for()
    late += [held[-1]] * 3
    page.keyboard.press("Escape")
    page.get_by_text("holds no block").wait_for()
    assert not late


OBSERVE = """() => {
    window.heard = [];
    const status = document.getElementById("status");
    const note = () => status.textContent && heard.push(status.textContent);
    new MutationObserver(note).observe(status, { childList: true, characterData: true, subtree: true });
}"""


def test_a_screen_reader_hears_the_answer_once_it_is_complete(page):
    settings(page, Most_tokens="60")
    page.evaluate(OBSERVE)
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_text("60 tokens").wait_for()
    answer = page.locator(".assistant .text").text_content()
    assert becomes(lambda: page.evaluate("heard").count(f"tiny: {answer}") == 1)
    assert len(page.evaluate("heard")) <= 2  # that it begins, and all of it
    assert page.locator("#messages [aria-live]").count() == 0


def test_errors_are_shown_and_the_message_can_be_sent_again(page, chat_server):
    chat_server.worker.max_requests = 0
    try:
        page.get_by_label("Message").fill("Hello")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("requests are open").wait_for(state="attached")
        assert page.get_by_label("Message").input_value() == "Hello"
    finally:
        chat_server.worker.max_requests = 64
    page.get_by_label("Message").press("Enter")
    page.locator(".assistant .note").last.get_by_text("tokens").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_and_nothing_overflows(browser, chat_server, scheme):
    """WCAG AA: 4.5 to 1 for text; and no horizontal scrolling on a phone."""
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.goto(chat_server.url)
    page.get_by_role("heading", name="tiny").wait_for()
    names = ["page", "card", "text", "soft", "mine", "accent", "on-accent", "shared", "error"]
    value = "(name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()"
    colors = {name: page.evaluate(value, name) for name in names}
    pairs = [
        (text, back) for text in ("text", "soft", "accent", "shared", "error") for back in ("page", "card")
    ]
    for text, back in [*pairs, ("text", "mine"), ("on-accent", "accent")]:
        assert contrast(colors[text], colors[back]) >= 4.5, (text, back)
    for button in ("Settings", "Inside"):
        page.get_by_role("button", name=button).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        assert page.get_by_role("button", name="Send").is_visible()
    context.close()


def contrast(one: str, other: str) -> float:
    """Of two colours such as #1c1c1a (WCAG 2, relative luminance)."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
