"""Chat templates, conversations and the tokens that end a text."""
# ruff: noqa: F811  fixtures are imported, and are arguments of tests

import io
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_deploy import CPU, byte_level, deepseek, llama, make_run, run_export, run_import  # noqa: F401
from test_family_llama import mistral
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import sample
from data import chat_template
from data.tokenizers import GPT2Tokenizer, HuggingFaceTokenizer, end_tokens
from lab import device as devices
from lab import stages
from lab.errors import UserError
from lab.interrupt import StopRequest
from lab.sampling import chat, generation
from lab.sampling.compiled import CompiledStep
from lab.storage import runs

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
# With a default system message, as SmolLM2's.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "a date, bos, and blocks on lines of their own": """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{{- bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
Today is {{ date_string }}. {{ message.content | trim }}
    {% else %}
        {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + eos_token }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}""",
    "roles that must alternate": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    ),
    "thoughts that are forgotten": """
{%- set ns = namespace(found=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.found and message.role == "user" and not(message.content.startswith('<tool>')) %}
        {%- set ns.found = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- if message.tool_calls %}{{ message.tool_calls | tojson }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "json, loop controls, dict, tools and the mark of an answer": (
        "{% if tools %}tools{% endif %}{{ documents }}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}"
        "{{ message | tojson }}{{ dict(a=message.role) | tojson(indent=2) }}"
        "{% generation %}\n  {{ message.content }}{% endgeneration %}\n{% endfor %}"
        "{{ nothing }}{{ unk_token }}"
    ),
}
TALKS = [
    [{"role": "user", "content": 'Hi <b>"you"</b> é😀'}],
    [
        {"role": "user", "content": "  one\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three<|im_end|>"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


def tokenizer_of(text):
    """A byte-level tokenizer with special tokens, which puts <s> before every text."""
    library = byte_level(text)
    library.add_special_tokens(SPECIAL)
    begin = ("<s>", library.token_to_id("<s>"))
    library.post_processor = TemplateProcessing("<s> $A", special_tokens=[begin])
    return library


def folder_with(text, template, folder="theirs", **fields) -> Path:
    """A folder with the tokenizer and the chat template (None: without)."""
    Path(folder).mkdir(exist_ok=True)
    tokenizer_of(text).save(f"{folder}/tokenizer.json")
    config = FAST | ({} if template is None else {"chat_template": template}) | fields
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    return Path(folder)


# Templates


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("talk", TALKS, ids=["short", "turns", "system"])
@pytest.mark.parametrize("prompted", [True, False])
def test_a_conversation_has_the_text_and_ids_that_transformers_gives_it(
    workshop, text, template, talk, prompted
):
    folder = folder_with(text, template, unk_token={"__type": "AddedToken", "content": "<u>"})
    theirs, ours = AutoTokenizer.from_pretrained(folder), chat_template.ChatTemplate(folder)
    try:
        expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompted)
    except Exception as error:
        with pytest.raises(UserError, match=f"refuses the conversation: {error}"):
            ours.render(talk, prompted)
        return
    assert ours.render(talk, prompted) == expected
    ids = theirs.apply_chat_template(talk, add_generation_prompt=prompted, return_dict=False)
    library = HuggingFaceTokenizer(folder)
    assert chat_template.encode(library, expected).tolist() == ids
    assert ids.count(library.id_of("<s>")) == expected.count("<s>")


def test_the_template_is_taken_from_the_file_that_transformers_takes(workshop, text):
    """A file of its own before tokenizer_config.json; the default one of several."""

    def same(expected):
        talk = TALKS[0]
        theirs = AutoTokenizer.from_pretrained("theirs").apply_chat_template(talk, tokenize=False)
        assert chat_template.ChatTemplate(Path("theirs")).render(talk) == theirs == expected

    folder = folder_with(text, [{"name": "rag", "template": "no"}, {"name": "default", "template": "listed"}])
    same("listed")
    (folder / "chat_template.jinja").write_text("own\n")
    same("own")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("no")
    same("own")
    (folder / "additional_chat_templates" / "default.jinja").write_text("beside")
    same("beside")


MALICIOUS = {
    "the classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a module": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "the frame": "{{ messages.append.__self__.__class__.__base__ }}{{ (1).__class__.__bases__ }}",
    "changing messages": "{{ messages.clear() }}",
    "a function's code": "{{ raise_exception.__globals__['os'] }}",
    "a namespace": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a file": "{% include '/etc/passwd' %}",
    "endless text": "{% for a in range(999999999) %}{{ a }}{% endfor %}",
}


@pytest.mark.parametrize("template", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_malicious_template_is_stopped_with_one_line(workshop, text, template):
    folder = folder_with(text, template)
    with pytest.raises(UserError) as raised:
        chat_template.ChatTemplate(folder).render(TALKS[0])
    message = str(raised.value)
    assert "the chat template in theirs/tokenizer_config.json" in message and "\n" not in message
    assert "was stopped: it is not safe" in message or "fails: " in message


BAD_TEMPLATES = {
    "syntax": ("{% for %}", "is damaged: line 1"),
    "a number": (7, "is damaged: it is not a text"),
    "a list of something else": ([7], "has no name or no text"),
    "no default": ([{"name": "rag", "template": "x"}], "has the chat templates rag, but no default one"),
    "none": (None, "has no chat template: the model was not made to chat"),
    "its own error": (
        "{{ raise_exception('only ducks\nare served') }}",
        "refuses the conversation: only ducks",
    ),
    "a mistake": ("{{ 1 + 'a' }}", "fails: unsupported operand"),
    "an unknown name": ("{{ messages[0].tools.name }}", "fails: 'dict object' has no attribute 'tools'"),
}


@pytest.mark.parametrize("template, message", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys())
def test_a_template_that_cannot_be_used_is_explained(talking, capsys, template, message):
    assert talking("hello\n", template=template) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in out + err


# Where a text ends


@pytest.fixture
def talking(run_import, run_sample, workshop, text, monkeypatch):
    """talking(piped, *flags, template=…): imports a tiny model as runs/it and chats with it."""

    def talk(piped, *flags, template=CHATML, make=llama, generation_config=None, **sizes):
        if not Path("runs/it").exists():
            sizes = {"vocab_size": 304, "max_position_embeddings": 256} | sizes
            make(**sizes).save_pretrained("theirs")
            Path("theirs/generation_config.json").unlink(missing_ok=True)
            if generation_config:
                Path("theirs/generation_config.json").write_text(json.dumps(generation_config))
            folder_with(text, template)
            assert run_import("theirs", "--out", "runs/it") == 0
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
        return run_sample("--run", "runs/it", "--chat", "--temperature", "0", *flags)

    return talk


def greedy(model, prompt, n):
    """The n most likely tokens after a prompt, one by one, without a cache."""
    tokens = list(prompt)
    for _ in range(n):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("where", ["generation_config", "a list", "config", "tokenizer_config", "nowhere"])
def test_a_text_ends_at_the_token_that_the_model_was_published_with(
    run_import,
    run_sample,
    workshop,
    text,
    capsys,
    where,
):
    llama(vocab_size=304).save_pretrained("theirs")
    Path("theirs/generation_config.json").unlink()
    library = tokenizer_of(text)
    folder_with(text, None)
    assert run_import("theirs", "--out", "plain") == 0
    model, tokenizer = runs.load(Path("plain"), "best", CPU)[0], runs.tokenizer(Path("plain"))
    tokens = greedy(model, tokenizer.encode("a").tolist(), 12)
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    configs = {
        "generation_config": ("generation_config", {"eos_token_id": end}),
        "a list": ("generation_config", {"eos_token_id": [1, end]}),
        "config": ("config", {"eos_token_id": end}),
        "tokenizer_config": ("tokenizer_config", {"eos_token": {"content": library.id_to_token(end)}}),
        "nowhere": ("generation_config", {"eos_token_id": None}),
    }
    name, content = configs[where]
    path = Path("theirs", f"{name}.json")
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    assert run_import("theirs", "--out", "run") == 0
    made = tokens if where == "nowhere" else tokens[: tokens.index(end)]
    flags = ("--run", "run", "--prompt", "a", "--max-new-tokens", "12", "--temperature", "0")
    for more, expected in (([], made), (["--ignore-eos"], tokens)):
        capsys.readouterr()
        assert run_sample(*flags, *more, "--num-samples", "2") == 0
        out, err = capsys.readouterr()
        whole = "a" + tokenizer.decode([*tokenizer.encode("a"), *expected])[len("<s>a") :]
        assert out == f"{whole}\n---------------\n{whole}\n"
        assert f"{2 * len(expected)} tokens in" in err


def test_an_end_token_that_is_no_number_is_refused(run_import, run_sample, workshop, text, capsys):
    llama(vocab_size=304).save_pretrained("theirs")
    folder_with(text, None)
    Path("theirs/generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    assert run_import("theirs", "--out", "run") == 0
    assert run_sample("--run", "run") == 2
    assert 'has eos_token_id = ["</s>"]: it must be an id or a list of ids' in capsys.readouterr().err


def test_drafts_and_compiled_steps_end_at_the_same_token(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    module = stages.load("stage7_mla_mtp")
    model = module.GPT(module.GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=4, n_embd=32)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    whole = list(generation.generate(model, [1], 40, 65, temperature=0))
    end = next(token for token in whole[5:] if token not in whole[:5])
    expected = whole[: whole.index(end)]
    options = {"temperature": 0, "stop": {end}}
    assert list(generation.generate(model, [1], 40, 65, **options)) == expected
    assert list(generation.generate(model, [1], 40, 65, step=CompiledStep(model), **options)) == expected
    for n_drafts in (1, 3):
        assert list(generation.generate_with_drafts(model, [1], 40, 65, n_drafts, **options)) == expected


def test_our_own_texts_end_only_if_the_data_separates_documents(workshop):
    plain, documents = {"tokenizer": "gpt2"}, {"tokenizer": "gpt2", "shards": {"train_000.bin": {}}}
    assert end_tokens(Path(), plain, None) == frozenset()
    assert end_tokens(Path(), {"tokenizer": "char"}, None) == frozenset()
    assert end_tokens(Path(), documents, None) == {GPT2Tokenizer.end_of_text}


# Conversations


def expected_answers(messages, n, run="runs/it", system=None):
    """The greedy answers to messages, each computed anew without a cache."""
    model, tokenizer = runs.load(Path(run), "best", CPU)[0], runs.tokenizer(Path(run))
    template, talk, answers = chat_template.ChatTemplate(Path(run)), [], []
    if system is not None:
        talk.append({"role": "system", "content": system})
    end = tokenizer.id_of("<|im_end|>")
    for message in messages:
        talk.append({"role": "user", "content": message})
        prompt = chat_template.encode(tokenizer, template.render(talk)).tolist()
        made = greedy(model, prompt, n)
        made = made[: made.index(end)] if end in made else made
        stream = tokenizer.stream(prompt)
        answers.append("".join(stream(token) for token in [*made, None]))
        talk.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("make, sizes", [(llama, {}), (mistral, {"sliding_window": 24}), (deepseek, {})])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_line_of_a_pipe_is_answered_with_all_that_came_before(talking, capsys, make, sizes, system):
    """The cache, kept from turn to turn, changes nothing; with Mistral it is a ring."""
    flags = [] if system is None else ["--system", system]
    assert talking("one\n\ntwo\r\nthree", "--max-new-tokens", "9", *flags, make=make, **sizes) == 0
    out, err = capsys.readouterr()
    expected = expected_answers(["one", "two", "three"], 9, system=system)
    assert out.partition("--run runs/it\n")[2] == "".join(answer + "\n" for answer in expected)
    assert len(set(expected)) > 1
    assert make is not llama or "the answer was cut after 9 tokens: see --max-new-tokens" in err


def talk_with(n_new=6, context=256, tokens_of=None, **fields):
    """A Chat with the imported run, and the list of the lengths that its model has been given."""
    model, tokenizer = runs.load(Path("runs/it"), "best", CPU)[0], runs.tokenizer(Path("runs/it"))
    template = chat_template.ChatTemplate(Path("runs/it"))
    given = []
    model.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0].size(1)))
    options = {"vocab_size": tokenizer.vocab_size, "temperature": 0}

    def tokens_of_talk(messages):
        return chat_template.encode(tokenizer, template.render(messages)).tolist()

    talk = chat.Chat(model, tokens_of or tokens_of_talk, tokenizer.stream, context, n_new, options, **fields)
    return talk, given


def test_a_turn_prefills_only_what_is_new(talking):
    assert talking("") == 0
    talk, given = talk_with()
    talk.answer("a rather long message, to begin with", str, lambda: False)
    first = given[0]
    assert first > 25 and given[1:] == [1] * 5
    given.clear()
    talk.answer("b", str, lambda: False)
    assert given[0] <= len(talk.tokens_of(talk.messages[:3])) - first and given[1:] == [1] * 5


@pytest.mark.parametrize("stage, sizes", [("3", {}), ("7", {}), ("mistral", {"sliding_window": 8})])
@pytest.mark.parametrize("dropped", [0, 1, 3])
def test_a_cache_that_goes_back_gives_the_answers_of_a_new_one(workshop, stage, sizes, dropped):
    """A template that trims answers changes the last tokens; a ring has forgotten what came before."""
    model = make_run("run", stage, block_size=200, **sizes)
    tokenizer = runs.tokenizer(Path("run"))

    def tokens_of(messages):
        parts = [each["content"] for each in messages]
        parts[1::2] = [part[: len(part) - dropped] for part in parts[1::2]]
        return tokenizer.encode("\n".join(parts)).tolist()

    options = {"vocab_size": tokenizer.vocab_size, "temperature": 0}
    talk = chat.Chat(model, tokens_of, tokenizer.stream, 200, 9, options)
    for message in ("ab", "cd", "efgabcde", "x"):
        prompt = tokens_of([*talk.messages, {"content": message}])
        talk.answer(message, str, lambda: False)
        assert talk.messages[-1]["content"] == tokenizer.decode(greedy(model, prompt, 9))
        assert len(talk.cached) == talk.cache.length == len(prompt) + 8  # the model has not seen the last one


def test_a_stopped_answer_stays_in_the_conversation(talking):
    assert talking("") == 0
    talk, _ = talk_with(n_new=30)
    pieces = []
    assert talk.answer("a", pieces.append, lambda: len(pieces) == 4) is None
    expected = expected_answers(["a"], 4)[0]
    assert talk.messages[1:] == [{"role": "assistant", "content": expected}]
    talk.answer("b", str, lambda: False)
    fresh, _ = talk_with(n_new=30)
    fresh.messages = talk.messages[:2]
    fresh.answer("b", str, lambda: False)
    assert fresh.messages == talk.messages


def test_a_second_ctrl_c_in_one_answer_stops_it_too(talking):
    assert talking("") == 0
    talk, _ = talk_with()

    def press_twice(text):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with StopRequest() as request:
        talk.answer("a", press_twice, lambda: request.signal)
    assert talk.cached == [] and [each["role"] for each in talk.messages] == ["user", "assistant"]
    with pytest.raises(KeyboardInterrupt):  # nobody asked to stop only the answer
        talk.answer("b", lambda text: signal.raise_signal(signal.SIGINT), lambda: False)


def test_a_conversation_longer_than_the_context_forgets_its_oldest_exchanges(talking, capsys):
    lines = [f"message {i}" for i in range(6)]
    assert talking("\n".join(lines), "--max-new-tokens", "12", "--context", "120") == 0
    err = capsys.readouterr().err
    assert "forgot the oldest exchange: the conversation exceeds the context of 120 tokens" in err
    talk, _ = talk_with(n_new=12, context=120)
    for line in lines:
        talk.answer(line, str, lambda: False)
        assert talk.cache.length <= 120
    assert talk.messages[0]["role"] == "user" and talk.messages[-2]["content"] == "message 5"
    assert 2 <= len(talk.messages) < 12
    capsys.readouterr()
    before = list(talk.messages)
    with pytest.raises(UserError, match="the context has 120\nsend a shorter message"):
        talk.answer("long " * 60, str, lambda: False)
    assert talk.messages == before


def test_a_longer_conversation_gets_a_longer_cache(talking, monkeypatch):
    assert talking("") == 0
    monkeypatch.setattr(chat, "SMALLEST_CACHE", 32)
    talk, _ = talk_with()
    for message in ("a", "b", "c d e f g h i j k l m n o p q r s t u v w x y z"):
        talk.answer(message, str, lambda: False)
    assert 128 <= talk.cache_length <= 256
    fresh, _ = talk_with()
    fresh.messages = talk.messages[:4]
    fresh.answer(talk.messages[4]["content"], str, lambda: False)
    assert fresh.messages == talk.messages


def test_a_compiled_step_has_the_same_conversation(talking, monkeypatch):
    assert talking("") == 0
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    plain, _ = talk_with()
    step, _ = talk_with()
    step.step = CompiledStep(step.model, 256)
    for message in ("a", "b", "c"):
        plain.answer(message, str, lambda: False)
        step.answer(message, str, lambda: False)
    assert step.messages == plain.messages


def test_a_compiled_step_is_sized_for_a_conversation_not_for_a_long_context(talking, monkeypatch, capsys):
    monkeypatch.setattr(sample, "COMPILED_CONTEXT", 64)
    lengths = []
    monkeypatch.setattr(sample, "compiled", lambda *arguments: lengths.append(arguments[-1]))
    for flags in ((), ("--context", "200")):
        assert talking("a\n", "--compile", "--max-new-tokens", "3", *flags) == 0
    assert lengths == [64, 200]
    assert capsys.readouterr().err.count("room for 64 tokens") == 1


def test_reset_forgets_the_conversation(talking, capsys):
    assert talking("one\n/reset\ntwo\n", "--max-new-tokens", "5") == 0
    answers = [expected_answers([message], 5)[0] for message in ("one", "two")]
    assert capsys.readouterr().out.endswith("".join(answer + "\n" for answer in answers))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chat", "--draft"], "--chat and --draft do not go together"),
        (["--chat", "--prompt", "a"], "--chat and --prompt do not go together"),
        (["--chat", "--prompt-file", "a"], "--chat and --prompt-file do not go together"),
        (["--chat", "--num-samples", "2"], "leave --num-samples out"),
        (["--system", "a"], "--system is for --chat"),
    ],
)
def test_flags_that_have_no_effect_on_a_chat_are_refused(run_sample, capsys, flags, message):
    assert run_sample("--run", "none", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_chat_template_cannot_chat(run_sample, workshop, capsys):
    make_run("run", "3")
    assert run_sample("--run", "run", "--chat") == 2
    err = capsys.readouterr().err
    assert "the tokenizer of run has no chat template" in err and "or leave out --chat" in err


def test_ctrl_c_in_a_terminal_stops_the_answer_and_at_the_prompt_the_program(talking):
    assert talking("", max_position_embeddings=100_000) == 0
    terminal, other = pty.openpty()
    command = [sys.executable, str(stages.ROOT / "sample.py"), "--run", "runs/it", "--chat", "--ignore-eos"]
    command += ["--max-new-tokens", "90000", "--temperature", "0"]  # one text, which never ends in "> "
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, start_new_session=True, env=environment
    )
    os.close(other)
    seen = b""

    def wait_for(end):
        nonlocal seen
        while not end(seen):
            seen += os.read(terminal, 1000)
        found, seen = seen, b""
        return found

    try:
        wait_for(lambda text: text.endswith(b"> "))
        for message in (b"hello\n", b"go on\n"):
            os.write(terminal, message)
            wait_for(lambda text: len(text) > 300)
            process.send_signal(signal.SIGINT)
            answer = wait_for(lambda text: text.endswith(b"> "))
            assert b"interrupted" not in answer and b"Traceback" not in answer
        end_by_ctrl_c(process)
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(terminal)


def end_by_ctrl_c(process):
    """Sends Ctrl-C at the prompt, and again if the process does not end.

    Python's readline shows the prompt before it waits for a key, and sees a signal in between with the next.
    """
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return
    raise AssertionError("three times Ctrl-C did not end it")


# Number formats


def test_auto_is_the_dtype_of_the_run_where_the_device_is_fast_with_it(monkeypatch):
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for native in (f32, bf16):
        monkeypatch.setattr(devices, "choose_dtype", lambda name, device, native=native: native)
        chosen = [devices.sampling_dtype("auto", stored, CPU) for stored in (f32, bf16, f16)]
        assert chosen == [f32, native, native]
    assert devices.sampling_dtype("auto", f16, torch.device("cuda")) == f16
    assert devices.sampling_dtype("float16", bf16, CPU) == f16


@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16])
def test_the_model_has_the_dtype_asked_for_and_a_change_is_said(
    run_sample,
    run_import,
    text,
    monkeypatch,
    capsys,
    native,
):
    sizes = {"head_dim": 8, "num_key_value_heads": 2}
    llama(Qwen3ForCausalLM, Qwen3Config, vocab_size=304, **sizes).to(torch.bfloat16).save_pretrained("theirs")
    folder_with(text, None)
    assert run_import("theirs", "--out", "run") == 0
    monkeypatch.setattr(devices, "choose_dtype", lambda name, device: native)
    used, generate = [], generation.generate

    def watched(model, *arguments, **options):
        used.append({parameter.dtype for parameter in model.parameters()})
        return generate(model, *arguments, **options)

    monkeypatch.setattr(generation, "generate", watched)
    for dtype, expected in (("auto", native), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        capsys.readouterr()
        assert run_sample("--run", "run", "--prompt", "a", "--max-new-tokens", "3", "--dtype", dtype) == 0
        said = (
            "bfloat16 is slow on this device: the weights are converted to float32" in capsys.readouterr().err
        )
        assert said == (dtype == "auto" and native == torch.float32)
        assert used.pop() == {expected}


def test_an_export_ends_its_texts_where_sample_py_does(run_export, workshop):
    make_run("run", "3", vocab_size=GPT2Tokenizer.vocab_size, n_embd=8, n_head=2, n_layer=1)
    meta = {"tokenizer": "gpt2", "vocab_size": GPT2Tokenizer.vocab_size}
    Path("run/tokenizer.json").write_text(byte_level("a").to_str())  # instead of a download
    for name, more, expected in (("documents", {"shards": {}}, 50256), ("text", {}, None)):
        runs.write_json(Path("run/meta.json"), meta | more)
        assert run_export("--run", "run", "--to", "hf", "--out", name) == 0
        assert json.loads(Path(name, "generation_config.json").read_text()).get("eos_token_id") == expected
