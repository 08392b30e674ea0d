"""Beam search in the engine: the texts and scores of transformers' generate, whatever else runs."""

import copy
import random
import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY_MODEL, call
from test_deploy import make_run
from test_serving_engine import CHARACTERS, CONTEXT, all_free, check, make_engine, mix, varied
from transformers import LlamaConfig, LlamaForCausalLM

from deploy import llama
from deploy.serving import SamplingParams
from deploy.serving import __main__ as command
from lab import stages
from lab.errors import UserError

V = TINY_MODEL["vocab_size"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    stage = stages.load("stage5_flash")
    return varied(stage.GPT(stage.GPTConfig(**TINY_MODEL | {"block_size": CONTEXT, "n_kv_head": 2})).eval())


@pytest.fixture(scope="module")
def theirs(model):
    """The model as deploy.export converts it for transformers."""
    sizes = asdict(model.config)
    exported = LlamaForCausalLM(LlamaConfig(**llama.to_config(sizes))).eval()
    exported.load_state_dict(llama.to_tensors(dict(model.state_dict()), sizes))
    return exported


def by_transformers(theirs, prompt, params, ends=(), **options):
    """The tokens, without the one that ends the text, and the score of each text."""
    ends = [*ends, *params.stop_token_ids]
    found = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=params.beams,
        num_return_sequences=params.n,
        length_penalty=float(params.length_penalty),
        max_new_tokens=params.max_tokens,
        do_sample=False,
        early_stopping=False,
        eos_token_id=ends or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    texts = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        row = row[len(prompt) :]
        texts.append((row[: next((i for i, token in enumerate(row) if token in ends), len(row))], score))
    return texts


def assert_same(answers, expected):
    assert [answer.token_ids for answer in answers] == [tokens for tokens, _ in expected]
    assert [answer.index for answer in answers] == list(range(len(expected)))
    found, wanted = ([each[1] for each in expected], [answer.score for answer in answers])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-4, rtol=1e-5)


def searches(model, n, seed=0):
    """Prompts and what to search for. Many of the texts end at tokens that are likely there."""
    draw = random.Random(seed)
    engine, prompts, params = checked(make_engine(model, max_batch=6)), [], []
    for _ in range(n):
        prompt, beams = draw.choices(range(V), k=draw.randint(1, 25)), draw.randint(2, 6)
        given = {"beams": beams, "n": draw.randint(1, beams), "max_tokens": draw.randint(1, 12)}
        given["length_penalty"] = draw.choice([-1, 0, 0.5, 1, 1, 2])
        (answers,) = engine.generate([prompt], SamplingParams(**given))
        likely = sorted({token for answer in answers for token in answer.token_ids})
        given["stop_token_ids"] = draw.sample(likely, min(len(likely), draw.randint(0, 8)))
        prompts.append(prompt)
        params.append(SamplingParams(**given))
    return prompts, params


@pytest.fixture(scope="module")
def known(model, theirs):
    """Some searches with what transformers finds."""
    prompts, params = searches(model, 10)
    return prompts, params, [by_transformers(theirs, *each) for each in zip(prompts, params, strict=True)]


# --- The same texts as transformers ---


def test_beams_have_the_texts_and_scores_of_transformers(model, known):
    engine, reasons = checked(make_engine(model, max_batch=6)), []
    for prompt, params, expected in zip(*known, strict=True):
        (answers,) = engine.generate([prompt], params)
        assert_same(answers, expected)
        reasons += [answer.finish_reason for answer in answers]
        assert all(answer.text == engine.tokenizer.decode(answer.token_ids) for answer in answers)
    assert reasons.count("stop") > 5 and reasons.count("length") > 5
    assert all_free(engine)


def test_end_of_text_tokens_end_beams_unless_they_are_ignored(model, theirs):
    prompt, params = [5, 6, 7], SamplingParams(max_tokens=10, beams=3, n=3, length_penalty=0)
    ((best, *_),) = make_engine(model).generate([prompt], params)
    ends = {best.token_ids[2]}
    engine = make_engine(model, end_tokens=ends)
    (answers,) = engine.generate([prompt], params)
    assert_same(answers, by_transformers(theirs, prompt, params, ends))
    assert "stop" in [answer.finish_reason for answer in answers]
    (answers,) = engine.generate([prompt], replace(params, ignore_eos=True))
    assert_same(answers, by_transformers(theirs, prompt, params))


def test_all_beams_go_on_even_if_most_of_the_likely_tokens_end_a_text(model, theirs):
    prompt = [5, 6, 7]
    with torch.inference_mode():
        likely = model(torch.tensor([prompt]))[0][0, -1].argsort(descending=True).tolist()
    params = SamplingParams(max_tokens=6, beams=3, n=3, stop_token_ids=likely[1:7], length_penalty=2)
    (answers,) = checked(make_engine(model)).generate([prompt], params)
    assert_same(answers, by_transformers(theirs, prompt, params))


def test_penalties_and_biases_are_those_of_transformers(model, theirs):
    params = SamplingParams(max_tokens=8, beams=4, n=4, repetition_penalty=1.3, logit_bias={7: 1.5, 9: -3.0})
    same = {"repetition_penalty": 1.3, "sequence_bias": {(7,): 1.5, (9,): -3.0}}
    for prompt in ([1, 2, 3], [7, 8, 9, 10]):
        (answers,) = make_engine(model).generate([prompt], params)
        assert_same(answers, by_transformers(theirs, prompt, params, **same))


def test_in_every_stage_the_score_is_that_of_the_text(make_model):
    model = varied(make_model(block_size=CONTEXT))
    params = SamplingParams(max_tokens=6, beams=3, n=3, length_penalty=0.7, logprobs=0)
    (answers,) = make_engine(model).generate([[3, 1, 4, 1, 5]], params)
    for answer in answers:
        with torch.inference_mode():
            rows = model(torch.tensor([[3, 1, 4, 1, 5, *answer.token_ids[:-1]]]))[0][0, 4:].log_softmax(-1)
        total = rows.gather(1, torch.tensor(answer.token_ids)[:, None]).sum()
        assert answer.score == pytest.approx(float(total) / 6**0.7, abs=1e-4)
        assert sum(entry.logprob for entry in answer.logprobs) == pytest.approx(float(total), abs=1e-4)
    scores = [answer.score for answer in answers]
    assert scores == sorted(scores, reverse=True) and len({tuple(a.token_ids) for a in answers}) == 3


# --- In a batch with others ---


def checked(engine):
    """The engine; after each of its steps, what tables hold and what is counted must agree."""
    step = engine.step

    def step_and_check():
        outputs = step()
        check_blocks(engine)
        assert engine.n_steps < 2000, "it never ends"
        return outputs

    engine.step = step_and_check
    return engine


def check_blocks(engine):
    sequences = [s for request in engine.requests.values() for s in request.sequences]
    scheduler, blocks = engine.scheduler, engine.blocks
    assert {*sequences} == {*scheduler.running, *scheduler.waiting}
    held = [block for sequence in sequences for block in sequence.table.blocks]
    assert blocks.references == [held.count(block) for block in range(len(blocks.references))]
    assert set(blocks.free) == {b for b in range(1, engine.pool.n_blocks) if b not in held}
    orders = [s.order for s in scheduler.running + scheduler.waiting]
    assert orders == sorted(orders) and len(scheduler.running) <= scheduler.max_batch


def disturbed(engine):
    """The engine; before some of its steps, up to five of the newest sequences lose their blocks."""
    draw, step, states = random.Random(0), engine.step, set()

    def preempt_and_step():
        for sequence in engine.scheduler.running[: -draw.choice([1, 1, 2, 3, 6]) : -1]:
            if sequence.params.beams > 1:
                states.add((sequence.is_forked, min(sequence.n_left, 2)))
            engine.scheduler.preempt(sequence)
        return step()

    engine.step = preempt_and_step
    return states


MIXES = {
    "room for all": {},
    "small chunks, few blocks": {"token_budget": 12, "block_size": 3, "n_blocks": 73},
    "preempted": {"token_budget": 12},
    "swapped": {"token_budget": 12, "prefix_cache": False, "swap_memory": 0.1},
}


@pytest.mark.parametrize("case", MIXES)
def test_beams_and_others_in_a_mix_have_the_texts_that_they_have_alone(model, known, case):
    prompts, params = mix(3, n=5)
    both = (prompts + known[0], params + known[1])
    order = random.Random(0).sample(range(len(both[0])), len(both[0]))
    engine = checked(make_engine(model, **{"max_batch": 12} | MIXES[case]))
    states = disturbed(engine) if case in ("preempted", "swapped") else set()
    for _ in range(2):  # the second time with what the prefix cache has
        found = engine.generate(*([each[i] for i in order] for each in both))
        answers = [found[order.index(i)] for i in range(len(order))]
        check(model, prompts, params, answers[: len(prompts)])
        for searched, expected in zip(answers[len(prompts) :], known[2], strict=True):
            assert_same(searched, expected)
        assert all_free(engine)
    if case == "preempted":  # with a prompt in part; decoding; computed in part; waiting for other beams
        assert states >= {(False, 2), (True, 1), (True, 2), (True, 0)}
    assert bool(engine.stats()["swapped"]) == (case == "swapped")


def test_beams_that_are_aborted_at_any_step_leave_nothing_and_the_others_alone(model):
    prompts, params = mix(4, n=2)
    searched = SamplingParams(max_tokens=5, beams=4, n=2)
    texts = [answer.token_ids for (answer,) in make_engine(model).generate(prompts, params)]
    for n_steps in range(12):
        engine = checked(make_engine(model, max_batch=5, token_budget=6))
        disturbed(engine)
        engine.add("beams", [1, 2, 3, 4, 5, 6, 7, 8, 9], searched)
        step = engine.step

        def abort_and_step(step=step, engine=engine, n_steps=n_steps):
            if engine.n_steps == n_steps:
                engine.abort("beams")
                check_blocks(engine)
            return step()

        engine.step = abort_and_step
        assert [answer.token_ids for (answer,) in engine.generate(prompts, params)] == texts
        while engine.has_work():
            engine.step()
        assert all_free(engine)


def test_beams_share_their_past_and_dropped_beams_free_their_blocks_at_once(model):
    engine = make_engine(model)
    engine.add("a", list(range(10)), SamplingParams(max_tokens=30, beams=4))
    texts, n_held = engine.requests["a"].sequences, []
    while True:
        engine.step()
        if not engine.has_work():
            break
        tables = [sequence.table.blocks for sequence in texts]
        for one in texts:  # a block holds 4 tokens
            for other in texts:
                same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
                shared = sum(all(same[: 4 * (i + 1)]) for i in range((one.n_tokens - 1) // 4))
                assert one.table.blocks[:shared] == other.table.blocks[:shared]
        n_held.append(len({block for table in tables for block in table}))
        assert n_held[-1] == engine.stats()["blocks"] - len(engine.blocks.free)
    assert max(n_held) < 0.7 * sum(map(len, tables)) and all_free(engine)


def test_the_trace_shows_the_text_and_the_blocks_of_each_beam(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", "4", CHARACTERS)
    arguments = [
        "--run",
        tmp_path / "run",
        "--prompts",
        "ABCDE",
        "--max-tokens",
        "3",
        "--beams",
        "3",
        "--trace",
    ]
    assert call(monkeypatch, command, *arguments) == 2
    assert "--beams 3 draws nothing: add --temperature 0" in capsys.readouterr().err
    assert call(monkeypatch, command, *arguments, "--temperature", "0") == 0
    _, first, second, third, best = capsys.readouterr().out.split("\n\n")
    assert (
        re.findall(r"  a\d? +\[1 2\] (computes 5|forked), is '.' \(-\d+\.\d\)", first)
        == ["computes 5"] + ["forked"] * 2
    )
    assert first.endswith("1:a+a2+a3 2:a+a2+a3 " + " ".join(f"{i}:." for i in range(3, 17)))
    assert len(re.findall(r"computes 1, is '..' \(", second)) == 3
    assert third.count("ends (length)") == 1 and best.startswith("--- a\nABCDE")


# --- What cannot be done ---


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("beams", 0, "beams = 0 is not possible"),
        ("n", 4, "beams = 3 is not possible"),
        ("length_penalty", float("nan"), "length_penalty = nan is not possible"),
        ("length_penalty", 11, "length_penalty = 11 is not possible"),
        ("temperature", 0.7, "temperature = 0.7 is not for beam search: leave it out"),
        ("top_k", 5, "top_k"),
        ("top_p", 0.9, "top_p"),
        ("min_p", 0.1, "min_p"),
        ("stop", "x", "stop"),
        ("best_of", 5, "best_of"),
    ],
)
def test_what_beam_search_cannot_obey_is_refused_by_name(name, value, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**{"beams": 3, name: value})


def test_what_changes_nothing_is_accepted():
    SamplingParams(beams=2, temperature=0, top_p=1, min_p=0, stop=[], seed=1)
    with pytest.raises(UserError, match="length_penalty = 2 is for beam search"):
        SamplingParams(length_penalty=2)


@pytest.mark.parametrize(
    "beams, options, message",
    [
        (4, {"n_blocks": 11}, r"may have 11 tokens in each of its 4 beams.*room for 44\n"),
        (5, {}, "has 5 beams, and a batch has room for 4 texts"),
        (33, {"max_batch": 40}, "33 beams need a vocabulary of 66, and there are 65"),
        (22, {"max_batch": 40, "end_tokens": {1, 2}}, "22 beams need a vocabulary of 66"),
    ],
)
def test_beams_that_can_never_fit_are_refused(model, beams, options, message):
    engine = make_engine(model, **options)
    with pytest.raises(UserError, match=message):
        engine.add("a", [1] * 6, SamplingParams(max_tokens=5, beams=beams))
    assert not engine.has_work() and all_free(engine)


def test_as_many_beams_as_fit_are_found_even_if_they_lose_all_their_blocks(model, theirs):
    """The blocks are just enough if the beams share none, as after preemptions without a prefix cache."""
    params = SamplingParams(max_tokens=8, beams=4, n=4)
    engine = checked(make_engine(model, n_blocks=16, prefix_cache=False))
    disturbed(engine)
    (answers, _) = engine.generate([[1] * 9, [2] * 9], params)
    assert_same(answers, by_transformers(theirs, [1] * 9, params))


def test_a_model_that_diverged_is_an_error_and_its_beams_can_be_aborted(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    engine = make_engine(broken)
    engine.add("a", [1, 2], SamplingParams(max_tokens=3, beams=2))
    with pytest.raises(UserError, match="not a number"):
        engine.step()
    engine.abort("a")
    assert all_free(engine)
