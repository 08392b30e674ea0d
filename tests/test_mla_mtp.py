"""Stages 7a and 7: latent attention in both forms, multi-token prediction, and drafting with it."""

import math

import pytest
import torch
import torch.nn.functional as F

from lab import stages
from lab.sampling import generation
from lab.training import cost, presets

STAGE5, STAGE7A, STAGE7 = (stages.load(stages.find(number)) for number in ("5", "7a", "7"))
SIZES = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = [
    {},
    {"kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10},
    {"n_head": 1, "qk_nope_head_dim": 8, "qk_rope_head_dim": 2, "v_head_dim": 5, "norm_eps": 1e-3},
]


def config(stage=STAGE7, **sizes):
    return stage.GPTConfig(**SIZES | sizes)


def make(stage=STAGE7, **sizes):
    """A tiny model with large random weights and biases that change the experts' choice."""
    torch.manual_seed(0)
    model = stage.GPT(config(stage, **sizes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    for router in model.routers():
        if router.config.router == "sigmoid":
            router.e_score_correction_bias.normal_(std=0.2)
    return model


def tokens(batch_size=2, length=24):
    return torch.randint(65, (batch_size, length), generator=torch.Generator().manual_seed(1))


# Latent attention


@pytest.mark.parametrize("stage", [STAGE7A, STAGE7], ids=["7a", "7"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_absorbed_is_expanded(sizes, stage, monkeypatch):
    model, idx = make(stage, **sizes), tokens()
    full = model(idx)[0]
    for absorbs in (True, False):
        monkeypatch.setattr(stage.Attention, "absorbing_is_cheaper", lambda self, T, S, a=absorbs: a)
        cache = model.new_cache(2, 24)
        parts = [model(part, cache=cache)[0] for part in idx.split([9, 6, 1, 1, 4, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5 * full.abs().max().item(), rtol=0)


def test_decoding_absorbs_and_training_and_prefill_expand(monkeypatch):
    used = []
    real = STAGE7.Attention.absorbed_attention
    monkeypatch.setattr(
        STAGE7.Attention,
        "absorbed_attention",
        lambda self, q, *rest: used.append(q.size(2)) or real(self, q, *rest),
    )
    model = make()
    model(tokens(), targets=tokens())
    cache = model.new_cache(2, 32)
    model(tokens(), cache=cache)
    assert used == []
    model(tokens(length=1), cache=cache)
    assert used == [1, 1]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_the_cache_holds_the_normed_latent_and_the_rotated_key_alone(sizes):
    model, idx = make(**sizes), tokens()
    cache = model.new_cache(2, 24)
    model(idx, cache=cache)
    c = model.config
    assert cache.nbytes == 2 * 24 * c.n_layer * (c.kv_lora_rank + c.qk_rope_head_dim) * 4
    layer = model.model.layers[0]
    made = layer.self_attn.kv_a_proj_with_mqa(layer.input_layernorm(model.model.embed_tokens(idx)))
    latent, key = made.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    torch.testing.assert_close(cache.latents[0].squeeze(1), layer.self_attn.kv_a_layernorm(latent))
    rope = STAGE7.rotation(torch.arange(24), c.qk_rope_head_dim, c.rope_theta)
    torch.testing.assert_close(cache.keys[0], STAGE7.rotate(key.unsqueeze(1), rope))


def test_the_scale_counts_both_parts_of_a_head():
    """Scores by hand, for the first layer's attention alone."""
    model = make(qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 7, 32)
    rope = STAGE7.rotation(torch.arange(7), 4, 10_000.0)
    mask = torch.full((7, 7), -torch.inf).triu(1)
    q = attention.q_proj(x).view(1, 7, 4, 10).transpose(1, 2)
    latent, k_rope = attention.kv_a_proj_with_mqa(x).split((attention.config.kv_lora_rank, 4), dim=-1)
    k_rope = STAGE7.rotate(k_rope.unsqueeze(1), rope)
    latent = attention.kv_a_layernorm(latent)
    out = []
    for head in range(4):
        w = attention.kv_b_proj.weight[head * 11 : (head + 1) * 11]  # 6 rows for keys, 5 for values
        k = torch.cat((latent @ w[:6].T, k_rope[0]), dim=-1)
        q_head = torch.cat(
            (q[:, head, :, :6], STAGE7.rotate(q[:, head : head + 1, :, 6:], rope)[:, 0]), dim=-1
        )
        out.append(((q_head @ k.mT) / math.sqrt(10) + mask).softmax(-1) @ (latent @ w[6:].T))
    torch.testing.assert_close(attention(x, rope, None, None), attention.o_proj(torch.cat(out, dim=-1)))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim \\(3\\) must be even"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, not 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be 0 or more, not -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        config(**sizes)


# Multi-token prediction


def mtp_by_hand(model, idx, targets):
    """The loss of each depth, with plain slices: position i sees tokens … i + k and predicts i + k + 1."""
    _, hidden = model(idx, return_hidden=True)
    T, losses = idx.size(1), []
    text = torch.cat((idx, targets[:, -1:]), dim=1)  # T + 1 tokens
    for k, block in enumerate(model.model.layers[model.config.n_layer :], start=1):
        n = T - k  # positions that have a token to predict
        rope = STAGE7.rotation(torch.arange(n), 4, 10_000.0)
        hidden = block(hidden[:, :n], model.model.embed_tokens(text[:, k : k + n]), rope, None, None)
        logits = model.lm_head(hidden)
        losses.append(F.cross_entropy(logits.flatten(0, 1), text[:, k + 1 : k + 1 + n].flatten()))
    return losses


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_each_depth_predicts_one_token_further(depths):
    model, text = make(num_nextn_predict_layers=depths), tokens(3, 20)
    idx, targets = text[:, :-1], text[:, 1:]
    _, losses = model(idx, targets)
    by_hand = mtp_by_hand(model, idx, targets)
    torch.testing.assert_close(losses["mtp"], 0.3 * sum(by_hand) / depths)


def test_ignored_targets_are_left_out_of_both_losses():
    model, text = make(), tokens(2, 20)
    idx, targets = text[:, :-1], text[:, 1:].clone()
    targets[:, 12:] = -1
    short = model(idx[:, :12], text[:, 1:13])[1]
    masked = model(idx, targets)[1]
    torch.testing.assert_close(masked["next_token"], short["next_token"])
    torch.testing.assert_close(masked["mtp"], short["mtp"])
    everything = model(idx, torch.full_like(targets, -1))[1]
    assert everything["mtp"].item() == 0.0


def test_the_prediction_of_a_token_never_saw_it():
    model, text = make(), tokens(1, 20)
    model.config.mtp_loss_weight = 1.0
    idx = text[:, :-1]
    _, hidden = model(idx, return_hidden=True)

    def drafts(text):
        cache = model.new_cache(1, 20, drafting=True)
        _, hidden = model(text[:, :-1], return_hidden=True)
        return model.draft(hidden, text[:, 1:], cache)[0]

    for t in (3, 10, 19):
        changed = text.clone()
        changed[:, t] = (changed[:, t] + 1) % 65
        before, after = drafts(text), drafts(changed)
        torch.testing.assert_close(before[:, : t - 1], after[:, : t - 1], atol=1e-5, rtol=0)
        assert (before[:, t - 1] - after[:, t - 1]).abs().max() > 0.1  # t - 1 embeds it, t - 2 predicts it
    assert hidden.shape == (1, 19, 32)


def test_without_mtp_blocks_stage_7_is_stage_7a():
    one, other = make(STAGE7A), make(num_nextn_predict_layers=0)
    assert one.state_dict().keys() == other.state_dict().keys()
    idx = tokens()
    results = [(*model(idx, idx), model.after_step()) for model in (one.train(), other.train())]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_without_modules_the_stage_is_the_one_without():
    with_one, without = make(), make(num_nextn_predict_layers=0)
    weights = with_one.state_dict()
    assert {name for name in weights if name not in without.state_dict()} == {
        name for name in weights if name.startswith("model.layers.2.")
    }
    without.load_state_dict({name: weights[name] for name in without.state_dict()})
    idx = tokens()
    assert torch.equal(with_one(idx)[0], without(idx)[0])
    assert set(without(idx, idx)[1]) == {"next_token"} and set(with_one(idx, idx)[1]) == {"next_token", "mtp"}


def test_the_names_of_the_module_are_those_of_deepseeks_files():
    names = {name for name, _ in make().named_parameters() if name.startswith("model.layers.2.")}
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    block = {name for name, _ in make().named_parameters() if name.startswith("model.layers.1.")}
    expected = {f"model.layers.2.{name}" for name in own} | {name.replace(".1.", ".2.", 1) for name in block}
    assert names == expected


def test_drafting_with_a_cache_is_drafting_at_once():
    model, text = make(), tokens(1, 20)
    _, hidden = model(text[:, :-1], return_hidden=True)
    whole, _ = model.draft(hidden, text[:, 1:], model.new_cache(1, 20, drafting=True))
    cache = model.new_cache(1, 20, drafting=True)
    parts = [
        model.draft(h, t, cache)[0]
        for h, t in zip(hidden.split([8, 1, 5, 5], 1), text[:, 1:].split([8, 1, 5, 5], 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
    assert cache.keys.size(0) == 1


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_active_parameters_are_those_of_stage_5(preset):
    """Within 2 %, the module that generation does not need apart."""
    vocab_size = 50304 if preset == "gpt2" else 65
    counts = []
    for stage in (STAGE5, STAGE7A, STAGE7):
        with torch.device("meta"):
            model = stage.GPT(stage.GPTConfig(vocab_size=vocab_size, **presets.PRESETS[preset]["model"]))
        counts.append(cost.active_parameters(model))
    assert counts[1:] == pytest.approx([counts[0]] * 2, rel=0.02)


# Drafts in sampling


class Recorder:
    """Counts how often the model was asked, and with how many tokens."""

    def __init__(self, model, monkeypatch):
        self.sizes = []
        real = type(model).forward
        monkeypatch.setattr(
            type(model),
            "forward",
            lambda m, idx, *a, **k: self.sizes.append(idx.size(1)) or real(m, idx, *a, **k),
        )


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learned a text by heart, more or less."""
    torch.manual_seed(0)
    model = STAGE7.GPT(config())
    text = torch.arange(400) % 7 * 3 + torch.arange(400) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        starts = torch.randint(len(text) - 33, (16, 1))
        window = text[starts + torch.arange(33)]
        _, losses = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return model.eval(), text.tolist()


@pytest.mark.parametrize("n_drafts", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 5, 31, 32, 60])
def test_greedy_text_is_the_same_with_drafts(trained, n_drafts, length, monkeypatch):
    """Through several windows, whatever the prompt; and with fewer calls of the model."""
    model, text = trained
    prompt = text[3 : 3 + length]
    plain = list(generation.generate(model, prompt, 90, 65, temperature=0))
    recorder, counts = Recorder(model, monkeypatch), generation.DraftCounts()
    drafted = list(
        generation.generate_with_drafts(model, prompt, 90, 65, n_drafts, temperature=0, counts=counts)
    )
    assert drafted == plain
    assert len(recorder.sizes) < 75
    assert counts.accepted > 0.5 * counts.drafted > 0


def test_drafts_that_are_always_wrong_change_nothing(trained, monkeypatch):
    model, text = trained
    plain = list(generation.generate(model, text[:4], 60, 65, temperature=0))
    real = type(model).draft

    def wrong(self, *arguments):
        logits, hidden = real(self, *arguments)
        return -logits, hidden

    monkeypatch.setattr(type(model), "draft", wrong)
    counts = generation.DraftCounts()
    drafted = list(generation.generate_with_drafts(model, text[:4], 60, 65, 2, temperature=0, counts=counts))
    assert drafted == plain and counts.accepted == 0


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}], ids=str)
def test_drawn_tokens_follow_the_models_own_distribution(options):
    """A chi-squared test on pairs of tokens, against the exact probabilities."""
    from scipy import stats

    model = make(vocab_size=5)
    model.lm_head.weight.data.mul_(0.5)
    model.requires_grad_(False)
    prompt, n = [1, 2, 3], 1200
    first = generation.next_token_probs(
        model(torch.tensor([prompt]))[0][0, -1], **{"top_k": None, "top_p": 1.0} | options
    )
    expected = torch.zeros(5, 5)
    for a in range(5):
        then = model(torch.tensor([[*prompt, a]]))[0][0, -1]
        expected[a] = first[a] * generation.next_token_probs(then, **{"top_k": None, "top_p": 1.0} | options)
    seen, counts = torch.zeros(5, 5), generation.DraftCounts()
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        a, b, _ = generation.generate_with_drafts(
            model, prompt, 3, 5, 2, generator=generator, counts=counts, **options
        )
        seen[a, b] += 1
    frequent = expected.flatten() * n >= 5
    observed, wanted = seen.flatten()[frequent].double(), expected.flatten()[frequent].double() * n
    rest = n - observed.sum(), n - wanted.sum()
    if rest[1] >= 1:
        observed, wanted = (torch.cat((x, r.view(1))) for x, r in zip((observed, wanted), rest, strict=True))
    wanted = wanted * observed.sum() / wanted.sum()
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 0.001
    assert 0.05 < counts.accepted / counts.drafted < 0.95  # both branches were taken


def test_sample_drafts_and_reports(run_train, run_sample, workshop, capsys):
    assert run_train("--stage", "7", "--steps", "3", "--out", "run") == 0
    texts = []
    for flags in ([], ["--draft"], ["--draft", "--draft-tokens", "3"]):
        capsys.readouterr()
        assert run_sample("--run", "run", "--prompt", "a", "--temperature", "0", *flags) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert ("drafts accepted" in err) == bool(flags)
    assert texts[0] == texts[1] == texts[2]


def test_drafts_need_a_module_that_makes_them(run_train, run_sample, workshop, capsys):
    assert run_train("--stage", "6", "--steps", "2", "--out", "six") == 0
    flags = ("--steps", "2", "--out", "none", "--model.num-nextn-predict-layers", "0")
    assert run_train("--stage", "7", *flags) == 0
    for run in ("six", "none"):
        capsys.readouterr()
        assert run_sample("--run", run, "--draft") == 2
        assert "--draft needs" in capsys.readouterr().err
    assert run_sample("--run", "none", "--draft-tokens", "0") == 2
