"""The engine: every text is the one that its request gets alone from sample.py's code, whatever else runs."""

import copy
import random

import pytest
import torch
from conftest import TINY_MODEL, call
from test_deploy import make_run

from benchmarks import serving as benchmark
from data.tokenizers import CharTokenizer
from deploy.quantization import linear, rtn
from deploy.serving import Engine, SamplingParams, attention
from deploy.serving import __main__ as command
from deploy.serving.engine import Output, extend
from deploy.serving.graphs import Graphs, can_be_recorded
from deploy.serving.memory import usage, waste
from deploy.serving.pool import Batch, Pool, block_bytes
from deploy.serving.sampling import Writer
from lab import stages
from lab.errors import UserError
from lab.sampling import generation

CONTEXT = 64
CHARACTERS = "".join(map(chr, range(32, 32 + TINY_MODEL["vocab_size"])))
TOKENIZER = CharTokenizer(CHARACTERS)
GREEDY = {"temperature": 0}


def varied(model):
    """The model with larger weights, so that its texts do not repeat themselves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    stage = stages.load("stage5_flash")
    return varied(stage.GPT(stage.GPTConfig(**TINY_MODEL | {"block_size": CONTEXT})).eval())


def make_engine(model, n_blocks=None, block_size=4, **options):
    options = {"max_batch": 4, "cache_blocks": n_blocks} | options
    return Engine(model, TOKENIZER, block_size=block_size, **options)


@torch.inference_mode()
def alone(model, prompt, params):
    """The tokens and their log-probabilities by sample.py's code and a plain forward pass."""
    generator = torch.Generator().manual_seed(params.seed or 0)
    options = (params.temperature, params.top_k, params.top_p, generator)
    tokens = list(generation.generate(model, prompt, params.max_tokens, TOKENIZER.vocab_size, *options))
    logits = model(torch.tensor([prompt + tokens[:-1]]))[0][0, len(prompt) - 1 :, : TOKENIZER.vocab_size]
    return tokens, logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def check(model, prompts, params, answers):
    for prompt, wanted, (answer,) in zip(prompts, params, answers, strict=True):
        tokens, logprobs = alone(model, prompt, wanted)
        assert answer.token_ids == tokens and answer.text == TOKENIZER.decode(tokens)
        assert answer.finish_reason == "length"
        found = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(found, logprobs, atol=2e-5, rtol=1e-4)


def mix(seed, n=8, longest=30):
    """Prompts, some of which begin alike, and what to do with each."""
    draw = random.Random(seed)
    common = draw.choices(range(TINY_MODEL["vocab_size"]), k=longest)
    prompts, params = [], []
    for i in range(n):
        own = draw.choices(range(TINY_MODEL["vocab_size"]), k=draw.randint(1, longest // 2))
        prompts.append((common[: draw.randint(0, longest // 2)] if draw.random() < 0.6 else []) + own)
        options = draw.choice([{"temperature": 0}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.8}])
        params.append(SamplingParams(max_tokens=draw.randint(1, 20), seed=i, logprobs=0, **options))
    return prompts, params


def all_free(engine):
    stats = engine.stats()
    return (
        not engine.has_work()
        and len(engine.blocks.free) == stats["blocks"]
        and stats["running"] == stats["waiting"] == stats["cache_use"] == 0
    )


# --- The same text as alone ---


def test_every_stage_writes_in_a_mix_what_it_writes_alone(make_model):
    model = varied(make_model(block_size=CONTEXT))
    for options in ({"block_size": 4, "token_budget": 11}, {"block_size": 8, "n_blocks": 12}):
        prompts, params = mix(0, n=6)
        engine = make_engine(model, **options)
        check(model, prompts, params, engine.generate(prompts, params))
        assert all_free(engine)


@pytest.mark.parametrize("name", ["stage3_swiglu", "stage5_flash", "stage7_mla_mtp"])
def test_the_attention_of_many_rows_is_that_of_the_stage(name):
    """On a CPU in bfloat16, other operations compute it; masked keys do not count, even if they are large."""
    torch.manual_seed(0)
    own = getattr(stages.load(name).attention, "args", [stages.load(name).attention])[0]
    heads = 2 if name == "stage5_flash" else 6
    q, k, v = torch.randn(9, 6, 1, 16), torch.randn(9, heads, 160, 16), torch.randn(9, heads, 160, 16)
    hidden = torch.arange(160) >= torch.randint(1, 160, (9, 1, 1, 1))
    mask = torch.zeros(9, 1, 1, 160).masked_fill(hidden, -torch.inf)
    expected = own(q, k, v, mask, 0.0)
    k = k.masked_fill(hidden.transpose(2, 3), 1e4)
    q, k, v, mask = q.bfloat16(), k.bfloat16(), v.bfloat16(), mask.bfloat16()
    assert attention.suits(q, k, v, mask) and not attention.suits(q[:4], k[:4], v[:4], mask[:4])
    found = attention.attention(own, q, k, v, mask, 0.0)
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    few = attention.attention(own, q[:4], k[:4], v[:4], mask[:4], 0.0)
    assert torch.equal(few, own(q[:4], k[:4], v[:4], mask[:4], 0.0))


def test_the_attention_of_a_readers_variant_is_left_alone(model):
    """It may compute something else, such as capped scores, or want something else."""
    config, own = model.config, stages.load("stage5_flash").explicit_attention
    assert attention.is_usual(own, config)
    assert not attention.is_usual(lambda q, k, v, mask, dropout: own(q.tanh(), k, v, mask, dropout), config)
    assert not attention.is_usual(lambda q, k, v: own(q, k, v, None, 0.0), config)


def test_a_short_prompt_is_computed_in_the_pass_of_the_decoding_texts(model, monkeypatch):
    """As one row for each token; a long one has a pass of its own, and all write what they write alone."""
    passes = []
    forward = Engine.forward
    monkeypatch.setattr(
        Engine,
        "forward",
        lambda self, sequences, n_new: (
            passes.append((n_new, [s.request_id for s in sequences])) or forward(self, sequences, n_new)
        ),
    )
    prompts = {"a": [1, 2], "short": [5, 6, 7, 8, 9], "long": list(range(20))}
    params = SamplingParams(max_tokens=4, logprobs=0, **GREEDY)
    engine, texts = make_engine(model), {name: Output(name, 0) for name in prompts}
    engine.add("a", prompts["a"], params)
    for output in engine.step():
        extend(texts[output.request_id], output)
    engine.add("short", prompts["short"], params)
    engine.add("long", prompts["long"], params)
    while engine.has_work():
        for output in engine.step():
            extend(texts[output.request_id], output)
    assert passes[:4] == [(2, ["a"]), (1, ["a", "short"]), (20, ["long"]), (1, ["a", "short", "long"])]
    check(model, prompts.values(), [params] * 3, [(text,) for text in texts.values()])


def test_engines_of_one_stage_replace_its_attention_once(model):
    make_engine(model), make_engine(model)
    stage = stages.load("stage5_flash")
    assert stage.attention.func is attention.attention
    assert stage.attention.args[0].__name__ == "attention"


def test_a_window_hides_the_keys_behind_it():
    """Mistral's cache is a ring; the pool keeps all tokens, and the mask hides those outside the window."""
    stage = stages.load("mistral")
    torch.manual_seed(0)
    sizes = TINY_MODEL | {"block_size": CONTEXT, "sliding_window": 7}
    model = varied(stage.GPT(stage.GPTConfig(**sizes)).eval())
    prompts, params = mix(1)
    for budget in (512, 9):
        engine = make_engine(model, token_budget=budget)
        check(model, prompts, params, engine.generate(prompts, params))


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_in_any_blocks_and_chunks_is_the_same_text(model, seed):
    draw = random.Random(seed)
    prompts, params = mix(seed, n=10)
    size = draw.choice([1, 3, 4, 16])
    options = {
        "block_size": size,
        "n_blocks": -(-50 // size) + draw.randint(0, 10) if seed % 2 else None,  # too few for all
        "max_batch": draw.randint(1, 6),
        "token_budget": draw.choice([1, 5, 16, 512]),
        "prefix_cache": draw.random() < 0.7,
    }
    engine = make_engine(model, **options)
    check(model, prompts, params, engine.generate(prompts, params))
    check(model, prompts, params, engine.generate(prompts, params))  # now with what the prefix cache has
    assert all_free(engine)


def test_preempted_requests_write_the_same_text(model):
    prompts, params = mix(3, n=8)
    engine = make_engine(model, n_blocks=13, prefix_cache=False)
    check(model, prompts, params, engine.generate(prompts, params))
    assert engine.stats()["preemptions"] > 2


def test_swapped_requests_write_the_same_text(model):
    prompts, params = mix(3, n=8)
    for memory in (block_bytes(model, 4) * 4.5 / 1e6, 1.0):  # room for a few of the blocks, and for all
        engine = make_engine(model, n_blocks=13, prefix_cache=False, swap_memory=memory)
        check(model, prompts, params, engine.generate(prompts, params))
        assert engine.stats()["swapped"] > 0


def test_a_cached_prefix_is_not_computed_again(model):
    (prompt, *_), _ = mix(4)
    prompt = (prompt * 9)[:30]
    params = SamplingParams(max_tokens=5, logprobs=0, **GREEDY)
    engine = make_engine(model)
    computed = []
    forward = engine.forward
    engine.forward = lambda sequences, n: computed.append(n * len(sequences)) or forward(sequences, n)
    for _ in range(2):
        check(model, [prompt], [params], engine.generate([prompt], params))
    assert computed == [30, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert engine.stats()["prefix_hits"] == 28


@pytest.mark.parametrize("stage", ["stage0_gpt", "stage5_flash", "stage7_mla_mtp"])
def test_recorded_decode_steps_write_what_each_request_writes_alone(stage):
    """A recording computes with the tensors of its first step, so this repeats a step with these."""
    torch.manual_seed(0)
    module = stages.load(stage)
    model = varied(module.GPT(module.GPTConfig(**TINY_MODEL | {"block_size": CONTEXT})).eval())
    engine = make_engine(model, n_blocks=30, max_batch=8)
    n_runs = []

    def record(compute):
        result = compute()
        return result, lambda: n_runs.append(result.copy_(compute()))

    engine.graphs = Graphs(model, engine.pool, record)
    for seed in (3, 4):
        prompts, params = mix(seed)
        check(model, prompts, params, engine.generate(prompts, params))
    assert len(n_runs) > 2 * len(engine.graphs.recorded) > 8
    assert all_free(engine)


@pytest.mark.parametrize(
    "stage, dtype, expected",
    [
        ("stage5_flash", torch.float32, True),
        ("stage6_moe", torch.float32, False),
        ("stage6_moe", torch.bfloat16, True),
        ("stage6_moe, quantized", torch.bfloat16, False),
    ],
)
def test_steps_that_wait_for_the_gpu_are_not_recorded(stage, dtype, expected):
    """On CUDA in float32, recording stage 7 failed: F.grouped_mm copies the counts of rows to the CPU."""
    module = stages.load(stage.partition(",")[0])
    model = module.GPT(module.GPTConfig(**TINY_MODEL)).to(dtype)
    if "quantized" in stage:
        name, experts = "model.layers.0.mlp.experts.down_proj", model.model.layers[0].mlp.experts
        linear.replace(model, {name: [rtn.rtn(weight, 4, 32) for weight in experts.down_proj.data]})
    assert can_be_recorded(model) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_mix_writes_what_each_request_writes_alone(model):
    on_gpu = copy.deepcopy(model).cuda()
    prompts, params = mix(13)
    for options in ({"prefix_cache": False, "swap_memory": 1.0}, {"token_budget": 9}):
        engine = make_engine(on_gpu, n_blocks=13, **options)
        for prompt, wanted, (answer,) in zip(prompts, params, engine.generate(prompts, params), strict=True):
            generator = torch.Generator().manual_seed(wanted.seed)
            sampling = (wanted.temperature, wanted.top_k, wanted.top_p, generator)
            tokens = generation.generate(on_gpu, prompt, wanted.max_tokens, TOKENIZER.vocab_size, *sampling)
            assert answer.token_ids == list(tokens)
        assert all_free(engine)


@pytest.mark.parametrize("stage", ["stage0_gpt", "stage5_flash", "stage7_mla_mtp"])
def test_an_int8_cache_gives_nearly_the_same_logprobs_in_less_than_half_the_memory(stage):
    torch.manual_seed(0)
    stage = stages.load(stage)
    model = varied(stage.GPT(stage.GPTConfig(**TINY_MODEL | {"block_size": CONTEXT})).eval())
    prompts, params = mix(14)
    exact = make_engine(model, n_blocks=40)
    given = {"n_blocks": 40, "int8_cache": True}
    small = make_engine(model, **given)
    texts = small.generate(prompts, params)
    for prompt, (answer,) in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            rows = model(torch.tensor([prompt + answer.token_ids[:-1]]))[0][0, len(prompt) - 1 :]
        expected = rows.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(found, expected, atol=0.003, rtol=0)  # 4 bits: 0.007
    assert small.pool.nbytes < 0.45 * exact.pool.nbytes
    assert small.pool.nbytes == 41 * block_bytes(model, 4, int8=True)
    # Neither chunks nor preemptions change what is stored.
    again = make_engine(model, n_blocks=13, int8_cache=True, token_budget=7, swap_memory=0.01)
    for one, other in zip(texts, again.generate(prompts, params), strict=True):
        assert one[0].token_ids == other[0].token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_cache_rounds_every_number_to_within_1_percent_of_the_largest(model, dtype):
    """In bfloat16 too, where rounding errors of the scale could turn a code of 127 into -128."""
    torch.manual_seed(0)
    pool = Pool(copy.deepcopy(model).to(dtype), n_blocks=17, block_size=16, int8=True)
    heads, width = pool.tensors[0].shape[2], pool.tensors[0].shape[4]
    new = [torch.randn(1, heads, 256, width).to(dtype) for _ in pool.tensors]
    batch = Batch(pool, [list(range(1, 17))], [0], 256)
    for x, found in zip(new, batch.update(0, *new), strict=True):
        assert ((found - x).abs() <= x.abs().amax(-1, keepdim=True) * 0.01).all()


def test_padded_vocabularies_are_cut():
    """A model may have more logits than there are tokens."""
    torch.manual_seed(0)
    stage = stages.load("stage5_flash")
    sizes = TINY_MODEL | {"vocab_size": 128, "block_size": CONTEXT}
    model = varied(stage.GPT(stage.GPTConfig(**sizes)).eval())
    prompts, params = mix(5)
    check(model, prompts, params, make_engine(model).generate(prompts, params))


def test_requests_that_come_and_go_at_any_step_leave_the_others_alone(model):
    prompts, params = mix(6, n=24)
    engine = make_engine(model, n_blocks=16)
    draw = random.Random(0)
    waiting, texts, aborted = list(range(24)), {i: [] for i in range(24)}, set()
    while waiting or engine.has_work():
        while waiting and draw.random() < 0.4:
            i = waiting.pop(0)
            engine.add(str(i), prompts[i], params[i])
        if draw.random() < 0.15 and engine.requests:
            i = draw.choice(list(engine.requests))
            engine.abort(i)
            aborted.add(int(i))
        for output in engine.step():
            assert int(output.request_id) not in aborted
            texts[int(output.request_id)] += output.token_ids
    assert all_free(engine) and len(aborted) > 2
    for i in range(24):
        tokens, _ = alone(model, prompts[i], params[i])
        assert texts[i] == (tokens if i not in aborted else tokens[: len(texts[i])])


# --- What a request may ask for ---


def test_the_texts_of_n_have_seeds_of_their_own_and_share_the_prompt(model):
    (prompt, *_), _ = mix(7)
    params = SamplingParams(max_tokens=9, seed=5, n=6)
    engine = make_engine(model)  # 4 at a time, so two of them wait
    (answers,) = engine.generate([prompt], params)
    for i, answer in enumerate(answers):
        tokens, _ = alone(model, prompt, SamplingParams(max_tokens=9, seed=5 + i))
        assert (answer.index, answer.token_ids) == (i, tokens)
    assert all_free(engine)


def test_best_of_returns_the_most_likely_texts(model):
    (prompt, *_), _ = mix(8)
    engine = make_engine(model)
    (every,) = engine.generate([prompt], SamplingParams(max_tokens=7, seed=1, n=4, logprobs=0))
    (best,) = engine.generate([prompt], SamplingParams(max_tokens=7, seed=1, n=2, best_of=4))
    every.sort(key=lambda answer: -sum(entry.logprob for entry in answer.logprobs))
    assert [answer.token_ids for answer in best] == [answer.token_ids for answer in every[:2]]
    assert [answer.index for answer in best] == [0, 1] and best[0].logprobs is None


def test_a_stop_string_ends_the_text_and_none_of_it_is_ever_shown(model):
    (prompt, *_), _ = mix(9)
    engine = make_engine(model)
    ((whole,),) = engine.generate([prompt], SamplingParams(max_tokens=30, **GREEDY))
    stop = whole.text[10:14]
    engine.add("a", prompt, SamplingParams(max_tokens=30, stop=["nothing", stop], **GREEDY))
    shown = ""
    while engine.has_work():
        for output in engine.step():
            shown += output.text
            assert whole.text[: whole.text.index(stop)].startswith(shown)
    assert shown == whole.text[: whole.text.index(stop)] and output.finish_reason == "stop"
    assert all_free(engine)


def test_text_that_only_begins_like_a_stop_string_is_shown_at_the_end(model):
    (prompt, *_), _ = mix(9)
    engine = make_engine(model)
    ((whole,),) = engine.generate([prompt], SamplingParams(max_tokens=10, **GREEDY))
    params = SamplingParams(max_tokens=10, stop=whole.text[-2:] + "!", **GREEDY)
    ((answer,),) = engine.generate([prompt], params)
    assert (answer.text, answer.finish_reason) == (whole.text, "length")


def test_the_writer_holds_back_what_may_begin_a_stop_string():
    writer = Writer(lambda token: token or "", ["END", "EEN"])
    assert [writer.add(text) for text in ("a", "E", "E", "xEN", "x")] == ["a", "", "", "EEx", "ENx"]
    assert writer.add("yEEND and more") == "y" and writer.stopped  # the first of two


def test_an_end_token_ends_the_text_unless_it_is_ignored(model):
    (prompt, *_), _ = mix(9)
    params = SamplingParams(max_tokens=20, **GREEDY)
    tokens, _ = alone(model, prompt, params)
    end = tokens[6]
    expected = tokens[: tokens.index(end)]
    engine = make_engine(model, end_tokens={end})
    ((answer,),) = engine.generate([prompt], params)
    assert (answer.token_ids, answer.finish_reason) == (expected, "stop")
    ((answer,),) = engine.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True, **GREEDY))
    assert (answer.token_ids, answer.finish_reason) == (tokens, "length")
    given = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=[end], **GREEDY)
    ((answer,),) = engine.generate([prompt], given)
    assert (answer.token_ids, answer.finish_reason) == (expected, "stop")


def test_biases_and_penalties_change_what_is_drawn(model):
    """Against their formulas, with each text's own tokens."""
    (prompt, *_), _ = mix(10)
    given = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    params = SamplingParams(max_tokens=25, logit_bias={7: 1.5, 9: -100}, **given, **GREEDY)
    other = SamplingParams(max_tokens=25, **GREEDY)
    (answer,), (unchanged,) = make_engine(model).generate([prompt, prompt], [params, other])
    text = []
    for _ in range(25):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text]))[0][0, -1].tolist()
        logits[7] += 1.5
        logits[9] -= 100
        for token in {*prompt, *text}:
            logits[token] *= 1 / 1.3 if logits[token] > 0 else 1.3
        for token in set(text):
            logits[token] -= 0.4 + 0.3 * text.count(token)
        text.append(max(range(len(logits)), key=logits.__getitem__))
    assert answer.token_ids == text != unchanged.token_ids == alone(model, prompt, other)[0]


def test_min_p_drops_unlikely_tokens(model):
    (prompt, *_), _ = mix(11)
    engine = make_engine(model)
    greedy, _ = alone(model, prompt, SamplingParams(max_tokens=20, **GREEDY))
    ((answer,),) = engine.generate([prompt], SamplingParams(max_tokens=20, min_p=1.0, seed=0))
    assert answer.token_ids == greedy
    params = SamplingParams(max_tokens=40, min_p=0.2, seed=0, logprobs=5)
    ((answer,),) = engine.generate([prompt], params)
    assert answer.token_ids != greedy
    for entry in answer.logprobs:
        assert entry.logprob >= entry.top[0][1] + torch.tensor(0.2).log().item() - 1e-4


def test_logprobs_list_the_likeliest_tokens(model):
    prompts, _ = mix(12, n=2)
    params = [SamplingParams(max_tokens=6, logprobs=n, **GREEDY) for n in (3, 0)]
    (some,), (none,) = make_engine(model).generate(prompts, params)
    for token, entry in zip(some.token_ids, some.logprobs, strict=True):
        assert entry.top[0] == (token, entry.logprob) and len(entry.top) == 3
    assert all(entry.top == [] for entry in none.logprobs)


def test_half_a_character_is_held_back():
    """A byte at a time: text appears once it is whole."""
    text_of = CharTokenizer("ab").stream()
    assert text_of(0) == "a"
    pieces = {0: "", 1: "é"}
    writer = Writer(lambda token: pieces[token] if token is not None else "\ufffd", [])
    assert [writer.add(0), writer.add(1), writer.add(None)] == ["", "é", "\ufffd"]


# --- What cannot be answered ---


def test_a_request_that_can_never_fit_is_refused(model):
    engine = make_engine(model, n_blocks=5)  # 20 tokens
    engine.add("fits", [1] * 10, SamplingParams(max_tokens=11))
    with pytest.raises(UserError, match=r"may have 22 tokens.*room for 20\n.*max_tokens"):
        engine.add("large", [1] * 10, SamplingParams(max_tokens=12))
    while engine.has_work():
        engine.step()
    assert all_free(engine)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "no tokens"),
        ([65], {}, "no token 65"),
        ([-1], {}, "no token -1"),
        ([1], {"logit_bias": {65: 1.0}}, "no token 65"),
        ([1] * CONTEXT, {}, "64 positions"),
    ],
)
def test_bad_requests_are_errors_that_say_why(model, prompt, options, message):
    engine = make_engine(model)
    with pytest.raises(UserError, match=message):
        engine.add("a", prompt, SamplingParams(max_tokens=4, **options))
    assert not engine.has_work() and all_free(engine)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: 1e39}),
        ("logprobs", -1),
        ("stop", [""]),
        ("n", 0),
        ("best_of", 0),
        ("beams", 0),
    ],
)
def test_values_that_make_no_sense_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


def test_a_name_can_be_used_again_only_when_its_request_is_finished(model):
    engine = make_engine(model)
    engine.add("a", [1], SamplingParams(max_tokens=1))
    with pytest.raises(UserError, match="already"):
        engine.add("a", [1], SamplingParams(max_tokens=1))
    engine.step()
    engine.add("a", [1], SamplingParams(max_tokens=1))
    engine.abort("a")
    engine.abort("unknown")
    assert all_free(engine)


def test_texts_end_where_the_models_positions_do(model):
    ((answer,),) = make_engine(model).generate([[1] * 60], SamplingParams(max_tokens=50))
    assert len(answer.token_ids) == 4 and answer.finish_reason == "length"


def test_a_model_that_diverged_is_an_error(model):
    broken = make_engine(model)
    bias = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data.fill_(float("nan"))
        broken.add("a", [1, 2], SamplingParams(max_tokens=3, **GREEDY))
        with pytest.raises(UserError, match="not a number"):
            broken.step()
        broken.abort("a")
        assert all_free(broken)
    finally:
        model.lm_head.weight.data.copy_(bias)


def test_the_cache_is_as_large_as_told(model):
    size = block_bytes(model, 4)
    assert size == 2 * 2 * 4 * 16 * 4  # keys and values, layers, tokens, width, bytes
    engine = Engine(model, TOKENIZER, 9.5 * size / 1e6, 4)
    assert engine.stats()["blocks"] == 9 and engine.pool.nbytes == 10 * size
    assert engine.describe() == "cache: 9 blocks of 4 tokens, 0 MB"
    with pytest.raises(UserError, match=r"at least 0\.00102 MB, for one block of 4 tokens, and has 0\.001"):
        Engine(model, TOKENIZER, 0.001, 4)


# --- Looking at it ---


def test_waste_is_the_share_of_empty_places_in_held_blocks(model):
    engine = make_engine(model, block_size=4)
    engine.add("a", [1] * 5, SamplingParams(max_tokens=9, n=2, seed=0))
    engine.step()
    assert engine.stats()["cache_waste"] == 3 / 8  # both texts share two blocks, which hold 5 tokens
    engine.step()
    assert engine.stats()["cache_waste"] == 4 / 12  # and now one block; each has 2 tokens in a second one
    assert engine.stats()["cache_use"] == 3 / engine.stats()["blocks"]


def test_forgotten_prefixes_are_computed_again(model):
    engine = make_engine(model)
    for _ in range(2):
        engine.generate([[1] * 9], SamplingParams(max_tokens=1))
        engine.forget_prefixes()
    assert engine.stats()["prefix_hits"] == 0
    engine.generate([[1] * 9, [2] * 9], SamplingParams(max_tokens=1))
    engine.generate([[1] * 9], SamplingParams(max_tokens=1))
    assert engine.stats()["prefix_hits"] == 8


def test_the_blocks_of_a_request_are_listed(model):
    engine = make_engine(model)
    engine.add("a", [1, 2, 3, 4, 5], SamplingParams(max_tokens=3, n=2, seed=0))
    assert engine.blocks_of("a") == engine.blocks_of("unknown") == []
    engine.step()
    assert engine.blocks_of("a") == [[(1, 2), (2, 2)]] * 2
    engine.step()
    first, second = engine.blocks_of("a")
    assert first[0] == second[0] == (1, 2) and first[1][1] == second[1][1] == 1


def test_a_runs_engine_knows_its_end_tokens_and_says_how_large_its_cache_is(tmp_path, capsys):
    make_run(tmp_path / "run", "4", CHARACTERS)
    engine = Engine.of_run(tmp_path / "run", device="cpu", cache_memory=1.0)
    assert "blocks of 16 tokens, " in capsys.readouterr().err
    ((answer,),) = engine.generate(["TO BE"], SamplingParams(max_tokens=3, **GREEDY))
    assert len(answer.text) == 3


def test_the_trace_shows_who_holds_each_block_at_each_step(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", "4", CHARACTERS)
    picture = tmp_path / "memory.png"
    arguments = ["--run", tmp_path / "run", "--prompts", "ABCDEF", "GH", "--n", "2", "--max-tokens", "2"]
    arguments += ["--seed", "3", "--trace", "--picture", picture]
    assert call(monkeypatch, command, *arguments) == 0
    printed = capsys.readouterr().out
    _, first, second, texts = printed.split("\n\n")
    assert first.splitlines()[0] == "step 1: 8 tokens computed, 3 of 16 blocks held"
    assert "  a   [1 2] computes 6, writes " in first and "  a2  [1 2] forked, writes " in first
    assert first.splitlines()[-1].startswith("  1:a+a2 2:a+a2 3:b+b2 4:. ")
    assert second.count("ends (length)") == 4 and second.splitlines()[-1].startswith("  1:# 2:. ")
    assert texts.count("ABCDEF") == 2 and "2 steps, 0 preemptions" in texts
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_waste_is_what_held_blocks_have_no_token_for(model):
    engine = make_engine(model, block_size=4)
    engine.add("a", [1, 2, 3, 4, 5], SamplingParams(max_tokens=4, n=2, **GREEDY))
    engine.step()  # two texts share the prompt's two blocks
    used = usage(engine)
    assert used == {"stored": 5, "paged": 8, "contiguous": 18}
    assert usage(engine, longest_answer=10)["contiguous"] == 30
    assert waste([used, {"stored": 7, "paged": 8, "contiguous": 9}]) == pytest.approx(4 / 16)


def test_a_vllm_that_cannot_start_is_one_clear_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module: vllm >&2\nexit 1\n")
    python.chmod(0o755)
    settings = benchmark.Settings(vllm=str(python))
    with pytest.raises(UserError) as error, benchmark.vllm(settings, tmp_path):
        pass
    assert str(error.value).splitlines() == [
        "vLLM failed: no such module: vllm",
        f"check {python}, or leave --vllm out",
    ]


def test_a_picture_that_cannot_be_drawn_is_an_error(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", "4", CHARACTERS)
    arguments = ["--run", tmp_path / "run", "--prompts", "A", "--max-tokens", "1", "--picture"]
    for picture in (tmp_path / "missing" / "memory.png", tmp_path / "memory.nothing"):
        assert call(monkeypatch, command, *arguments, picture) == 2
        assert "give the picture another file" in capsys.readouterr().err
