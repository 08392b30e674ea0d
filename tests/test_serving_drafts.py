"""Drafts in the batch: more tokens a step, and every text is the one that it is without them."""

import copy
import random

import pytest
import torch
from conftest import call
from test_deploy import make_run
from test_serving_engine import CHARACTERS, TOKENIZER

from deploy import serve
from deploy.serving import Engine, SamplingParams
from deploy.serving import __main__ as command
from deploy.serving.blocks import NULL, Blocks, Table
from deploy.serving.metrics import Metrics
from deploy.serving.pool import block_bytes
from deploy.serving.scheduler import Scheduler, Sequence
from lab import stages
from lab.errors import UserError
from lab.sampling import generation

STAGE = stages.load("stage7_mla_mtp")
LENGTH = 64


@pytest.fixture(scope="module")
def model():
    """A tiny stage 7 that has learned a text by heart, more or less, so that some of its drafts are right."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 65, "block_size": LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = STAGE.GPT(STAGE.GPTConfig(**sizes, n_routed_experts=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        starts = torch.randint(len(TEXT) - 25, (8, 1))
        window = torch.tensor(TEXT)[starts + torch.arange(25)]
        _, losses = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return model.eval()


TEXT = [i % 7 * 3 + i % 4 for i in range(400)]


def make_engine(model, n_blocks=None, block_size=4, **options):
    options = {"max_batch": 4, "cache_blocks": n_blocks} | options
    return Engine(model, TOKENIZER, block_size=block_size, **options)


def mix(seed, n=8):
    """Prompts, some of which begin alike, and what to do with each: everything that a request may ask for."""
    draw = random.Random(seed)
    prompts, params = [], []
    for i in range(n):
        start, length = draw.choice([0, 0, 5, 17]), draw.randint(1, 25)
        prompts.append(TEXT[start : start + length] + draw.choices(range(65), k=draw.randint(0, 2)))
        options = draw.choice(
            [
                {"temperature": 0},
                {"temperature": 0, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
                {"temperature": 0, "stop": [CHARACTERS[TEXT[8]] + CHARACTERS[TEXT[9]]]},
                {"temperature": 0.8, "n": 3},
                {"top_k": 5, "stop_token_ids": [TEXT[11]]},
                {"top_p": 0.8, "presence_penalty": 0.5},
                {"min_p": 0.1, "n": 1, "best_of": 2},
            ]
        )
        params.append(SamplingParams(max_tokens=draw.randint(1, 25), seed=i, logprobs=2, **options))
    return prompts, params


def check_blocks(engine):
    """References, free blocks and hashes agree, and no table holds a block without a token of its own."""
    blocks, scheduler = engine.blocks, engine.scheduler
    everyone = scheduler.running + scheduler.waiting
    held = [block for sequence in everyone for block in sequence.table.blocks]
    assert blocks.references == [held.count(block) for block in range(len(blocks.references))]
    assert set(blocks.free) == {b for b, n in enumerate(blocks.references) if n == 0} - {NULL}
    assert blocks.by_hash == {digest: b for b, digest in enumerate(blocks.hashes) if digest is not None}
    for sequence in everyone:
        table = sequence.table
        assert len(table.blocks) == blocks.count(table.length)
        assert len(table.hashes) <= table.length // blocks.block_size
    assert engine.drafter is None or sum(engine.plan.values()) <= scheduler.token_budget


def check_content(engine, sequence):
    """The block's entries and the hidden state are those of the text alone, computed at once."""
    table, size = sequence.table, engine.pool.block_size
    if table.length < 2:
        return
    model, tokens = engine.model, torch.tensor([sequence.tokens[: table.length]], device=engine.device)
    with torch.inference_mode():
        _, hidden = model(tokens, return_hidden=True)
        cache = model.new_cache(1, table.length, drafting=True)
        model.draft(hidden[:, :-1], tokens[:, 1:], cache)
    for stored, expected in zip(engine.pool.tensors, (cache.keys, cache.latents), strict=True):
        found = stored[-1, table.blocks, 0].flatten(0, 1)[1 : table.length]  # slot 0 has none
        torch.testing.assert_close(found, expected[0, 0, 0, : table.length - 1], atol=2e-4, rtol=1e-3)
    for i, block in enumerate(table.blocks):
        newest = min((i + 1) * size, table.length) - 1
        torch.testing.assert_close(engine.pool.hidden[0, block], hidden[0, newest], atol=2e-4, rtol=1e-3)


def run(engine, prompts, params, draw, abort=0.0):
    """The whole texts, by request and index, of requests that come and go while the engine runs."""
    waiting, texts = list(range(len(prompts))), {}
    while waiting or engine.has_work():
        assert engine.n_steps < 2000, "it never ends"
        while waiting and draw.random() < 0.5:
            i = waiting.pop(0)
            engine.add(str(i), prompts[i], params[i])
        if engine.requests and draw.random() < abort:
            engine.abort(draw.choice(list(engine.requests)))
        for output in engine.step():
            whole = texts.setdefault((output.request_id, output.index), [[], "", [], None])
            whole[0] += output.token_ids
            whole[1] += output.text
            whole[2] += output.logprobs
            whole[3] = output.finish_reason
        check_blocks(engine)
        if engine.drafter and engine.scheduler.running and draw.random() < 0.2:
            check_content(engine, draw.choice(engine.scheduler.running))
    assert len(engine.blocks.free) == engine.pool.n_blocks - 1
    return texts


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, (tokens, text, logprobs, reason) in expected.items():
        assert (found[key][0], found[key][1], found[key][3]) == (tokens, text, reason)
        for one, other in zip(found[key][2], logprobs, strict=True):
            values = ([each.logprob, *(value for _, value in each.top)] for each in (one, other))
            assert next(values) == pytest.approx(next(values), abs=1e-4)


# --- The same text ---


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_writes_with_drafts_what_it_writes_without(model, seed):
    """In any blocks and chunks, with prefix hits, forks, preemptions and swaps; the cache stays exact."""
    draw = random.Random(seed)
    prompts, params = mix(seed)
    size = draw.choice([1, 3, 4])
    options = {
        "block_size": size,
        "n_blocks": -(-52 // size) + draw.randint(0, 8) if seed % 2 else None,  # too few for all
        "max_batch": draw.randint(3, 5),
        "token_budget": draw.choice([5, 16, 512]),
        "prefix_cache": seed != 5,
        "swap_memory": 0.01 if seed % 4 == 3 else 0,
    }
    plain = make_engine(model, **options)
    drafting = make_engine(model, draft=True, draft_tokens=1 + seed % 3, **options)
    expected = run(plain, prompts, params, random.Random(seed))
    for _ in range(2):  # the second time with what the prefix cache has
        same(run(drafting, prompts, params, random.Random(seed)), expected)
    stats = drafting.stats()
    assert 0.2 * stats["drafted_tokens"] < stats["accepted_tokens"] < stats["drafted_tokens"]
    assert stats["steps"] < 2 * plain.stats()["steps"]
    assert bool(stats["prefix_hits"]) == options["prefix_cache"]
    assert stats["preemptions"] > 0 or not seed % 2
    assert stats["swapped"] > 0 or not options["swap_memory"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_mix_writes_with_drafts_what_it_writes_without(model):
    on_gpu = copy.deepcopy(model).cuda()
    prompts, params = mix(7)
    expected = run(make_engine(on_gpu), prompts, params, random.Random(7))
    engine = make_engine(on_gpu, n_blocks=18, draft=True, swap_memory=0.01)
    same(run(engine, prompts, params, random.Random(7)), expected)


def test_requests_that_are_aborted_leave_the_others_alone(model):
    prompts, params = mix(6, n=16)
    engine = make_engine(model, n_blocks=24, draft=True, draft_tokens=2)
    found = run(engine, prompts, params, random.Random(1), abort=0.1)
    expected = run(make_engine(model), prompts, params, random.Random(1))
    whole = {key: text for key, text in found.items() if text[3]}
    assert 10 < len(whole) < len(expected)
    same(whole, {key: expected[key] for key in whole})
    for key in found.keys() - whole.keys():
        assert found[key][0] == expected[key][0][: len(found[key][0])]


def test_a_text_that_stops_at_an_accepted_draft_goes_no_further(model):
    params = SamplingParams(max_tokens=24, temperature=0)
    plain, drafting = make_engine(model), make_engine(model, draft=True, draft_tokens=3)
    ((whole,),) = plain.generate([TEXT[:9]], params)
    assert drafting.generate([TEXT[:9]], params) == [[whole]]
    for i in range(0, 20, 3):
        for end in ({"stop": whole.text[i : i + 2]}, {"stop_token_ids": [whole.token_ids[i]]}):
            given = SamplingParams(max_tokens=24, temperature=0, **end)
            assert drafting.generate([TEXT[:9]], given) == plain.generate([TEXT[:9]], given)
            check_blocks(drafting)
    assert drafting.stats()["accepted_tokens"] > 20


def test_a_text_alone_has_the_drafts_of_sample_py(model):
    """sample.py's own cache is exact, so a wrong entry in the pool would cost accepted drafts here."""
    for n, prompt in [(1, [40] * 9), (3, [3] * 9), (2, [40])]:
        engine = make_engine(model, draft=True, draft_tokens=n, token_budget=7)  # the prompt in chunks
        counts = generation.DraftCounts()
        ((answer,),) = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0))
        drafted = generation.generate_with_drafts(model, prompt, 40, 65, n, temperature=0, counts=counts)
        assert answer.token_ids == list(drafted)
        stats = engine.stats()
        assert abs(stats["accepted_tokens"] - counts.accepted) <= n  # at the end, sample.py drafts too many
        assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]


def test_the_block_drafts_from_the_whole_text_whatever_steps_computed_it(model, monkeypatch):
    seen = []
    real = type(model).draft
    monkeypatch.setattr(type(model), "draft", lambda self, *a: seen.append(real(self, *a)) or seen[-1])
    engine = make_engine(model, draft=True, draft_tokens=2, token_budget=7)
    engine.add("a", [40, *TEXT[:9]], SamplingParams(max_tokens=30, seed=0))
    (sequence,) = engine.requests["a"].sequences
    n_checked = 0
    while engine.has_work():
        tokens = torch.tensor([sequence.tokens])
        seen.clear()
        engine.step()
        if engine.drafts:
            first, _ = seen[0]
            with torch.inference_mode():
                _, hidden = model(tokens[:, :-1], return_hidden=True)
                cache = model.new_cache(1, tokens.size(1), drafting=True)
                expected, _ = real(model, hidden, tokens[:, 1:], cache)
            torch.testing.assert_close(first[0, -1], expected[0, -1], atol=1e-3, rtol=0)
            n_checked += 1
    assert n_checked > 5


def test_similar_distributions_are_sampled_with_the_same_random_numbers(model):
    """With others, drafts would be accepted with the probability that two drawn tokens are the same."""
    engine = make_engine(model, draft=True)
    params = SamplingParams(max_tokens=40, seed=1, temperature=2)
    engine.generate([TEXT[i : i + 9] for i in range(8)], params)
    assert engine.stats()["accepted_tokens"] > 0.5 * engine.stats()["drafted_tokens"]  # with others 0.08


def test_rejected_drafts_leave_nothing_behind(model, monkeypatch):
    """Neither in the text, nor in blocks, nor as a prefix that others could find."""
    real = type(model).draft

    def wrong(self, *arguments):
        logits, hidden = real(self, *arguments)
        return -logits, hidden

    prompts = [TEXT[i : i + 6] for i in range(3)]
    params = SamplingParams(max_tokens=20, temperature=0)
    expected = [answer.token_ids for (answer,) in make_engine(model).generate(prompts, params)]
    monkeypatch.setattr(type(model), "draft", wrong)
    engine = make_engine(model, draft=True, draft_tokens=3)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    texts = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            texts[int(output.request_id)] += output.token_ids
        check_blocks(engine)
    assert texts == expected
    assert engine.stats()["drafted_tokens"] > 40 and engine.stats()["accepted_tokens"] == 0
    hashes = set()
    for prompt, text in zip(prompts, texts, strict=True):
        table, tokens = Table(), prompt + text
        for i in range(0, len(tokens) - 4, 4):
            table.hashes.append(engine.blocks.next_hash(table, tokens[i : i + 4]))
        hashes |= set(table.hashes)
    assert set(engine.blocks.by_hash) == hashes


def test_a_cache_in_8_bits_drafts_too(model):
    prompts, params = [TEXT[i : i + 9] for i in range(4)], SamplingParams(max_tokens=20, temperature=0)
    options = {"int8_cache": True, "n_blocks": 40}
    plain, drafting = make_engine(model, **options), make_engine(model, draft=True, **options)
    expected = plain.generate(prompts, params)
    assert drafting.generate(prompts, params) == expected
    assert drafting.stats()["accepted_tokens"] > 20


# --- What drafts cost ---


def test_drafts_count_in_the_budget_and_take_no_blocks_from_others():
    def decoding(order, length):
        sequence = Sequence("", 0, (order, 0), SamplingParams(), [0] * length, None, None, generated=[1])
        blocks.grow(sequence.table, length)
        sequence.table.length = length
        return sequence

    for n_free, plan in [(4, [4, 4]), (3, [4, 2]), (2, [2, 2]), (1, [3, 1]), (0, [1, 1])]:
        blocks = Blocks(1 + 4 + n_free, 2, copy=None)
        scheduler = Scheduler(blocks, 2, 8, n_drafts=lambda sequence: 3)
        scheduler.running = [decoding(0, 4), decoding(1, 4)]
        if n_free < 2:  # a place is left in the last block
            for sequence in scheduler.running:
                sequence.table.length = 3
                sequence.prompt.pop()
        assert list(scheduler.schedule().values()) == plan, n_free
        assert scheduler.n_preempted == 0
    blocks = Blocks(41, 2, copy=None)
    scheduler = Scheduler(blocks, 2, 12, n_drafts=lambda sequence: 3)
    scheduler.running = [decoding(0, 4)]
    scheduler.add(Sequence("", 0, (1, 0), SamplingParams(), [0] * 40, None, None))
    assert list(scheduler.schedule().values()) == [4, 8]


def test_no_more_is_drafted_than_the_text_can_take(model):
    engine = make_engine(model, draft=True, draft_tokens=3)
    engine.add("short", TEXT[:8], SamplingParams(max_tokens=3, temperature=0))
    engine.add("long", TEXT[: LENGTH - 3], SamplingParams(max_tokens=30, temperature=0))
    engine.step()
    engine.step()
    assert list(engine.plan.values()) == [2, 2]


def test_a_block_has_room_for_one_more_layer_and_a_hidden_state(model):
    engine = make_engine(model, n_blocks=9, draft=True)
    width = 16 + 8  # the latent and the rotated key
    assert block_bytes(model, 4, drafting=True) == 4 * (3 * 4 * width + 32)
    assert engine.pool.nbytes == 10 * block_bytes(model, 4, drafting=True)


def test_stats_and_metrics_count_drafts(model):
    engine = make_engine(model, draft=True)
    engine.generate([TEXT[:9]], SamplingParams(max_tokens=30, temperature=0))
    stats = engine.stats()
    assert stats["steps"] == 30 - stats["accepted_tokens"] and stats["accepted_tokens"] > 0
    text = Metrics(stats).text().decode()
    assert f"serving_drafted_tokens_total {stats['drafted_tokens']:.1f}" in text
    assert f"serving_accepted_tokens_total {stats['accepted_tokens']:.1f}" in text


def test_the_trace_shows_what_was_drafted(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", "7", CHARACTERS)
    arguments = ["--run", tmp_path / "run", "--prompts", "ABCDEF", "--max-tokens", "4", "--trace", "--draft"]
    assert call(monkeypatch, command, *arguments, "--temperature", "0") == 0
    printed = capsys.readouterr().out
    _, first, second, *_ = printed.split("\n\n")
    assert "drafts" not in first and "computes 3 with the drafts '" in second
    assert printed.splitlines()[-1].endswith("drafted tokens were accepted")


# --- What cannot draft ---


def test_only_a_model_with_an_mtp_block_drafts(model, tmp_path, monkeypatch, capsys):
    config = STAGE.GPTConfig(**vars(model.config) | {"num_nextn_predict_layers": 0})
    with pytest.raises(UserError, match="this model has none: use a run of stage 7"):
        make_engine(STAGE.GPT(config), draft=True)
    with pytest.raises(UserError, match="draft_tokens must be at least 1, not 0"):
        make_engine(model, draft=True, draft_tokens=0)
    make_run(tmp_path / "run", "4", CHARACTERS)
    assert call(monkeypatch, serve, "--run", tmp_path / "run", "--port", "0", "--draft") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --draft needs a block of multi-token")
    assert call(monkeypatch, serve, "--draft-tokens", "3") == 2
    assert "--draft-tokens is for --draft" in capsys.readouterr().err


def test_beams_are_those_without_drafts(model):
    prompts, params = mix(5)
    prompts.append(TEXT[:9])
    params.append(SamplingParams(max_tokens=12, beams=3, n=2, logprobs=1))
    with_drafts, without = (
        make_engine(model, draft=draft).generate(prompts, params) for draft in (True, False)
    )
    for found, expected in zip(with_drafts, without, strict=True):
        assert [text.token_ids for text in found] == [text.token_ids for text in expected]
    assert [text.score for text in with_drafts[-1]] == pytest.approx([text.score for text in without[-1]])
