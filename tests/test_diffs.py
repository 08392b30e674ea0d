"""Every stage differs from the one before by its idea alone: nothing else moves, and reductions."""

import difflib

import pytest
import torch
import torch.nn.functional as F

from lab import stages
from lab.comparison import diffs
from lab.training import cost, presets

NAMES = [*stages.course(), *stages.relatives()]


def source(name):
    return stages.path(name).read_text().splitlines()


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_two_stages_share_keeps_its_order(name):
    """Nothing is moved: no line of code that goes away comes back elsewhere.

    A relative may put an option around a line, which indents it; a stage of the course may not even do that.
    """
    changes = list(difflib.ndiff(source(diffs.origin(name)), source(name)))
    code = str.strip if name in stages.COURSE else str.rstrip
    removed = {code(line[2:]) for line in changes if line.startswith("- ")}
    added = {code(line[2:]) for line in changes if line.startswith("+ ")}
    assert {line for line in removed & added if len(line.strip()) > 3} == set()


def model(number, **sizes):
    stage = stages.load(NAMES[number])
    torch.manual_seed(number)
    sizes = {"vocab_size": 65, "block_size": 16, "n_layer": 3, "n_head": 4, "n_embd": 32} | sizes
    return stage.GPT(stage.GPTConfig(**sizes)).eval()


IDX = torch.arange(48).view(3, 16)


# Sizes


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_stages_1_to_3_have_the_parameters_of_stage_0(preset, number):
    """Within 1 %, as nanoGPT counts: without the table of positions, of which a token reads one row."""

    def count(number):
        stage = stages.load(NAMES[number])
        with torch.device("meta"):
            made = stage.GPT(stage.GPTConfig(vocab_size=vocab_size, **presets.PRESETS[preset]["model"]))
        table = getattr(made.model, "embed_positions", None)
        return cost.parameters(made) - (0 if table is None else table.weight.numel())

    vocab_size = 50304 if preset == "gpt2" else 65
    assert count(number) == pytest.approx(count(0), rel=0.01)


# Stage 1: RMSNorm


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rmsnorm_is_that_of_torch(eps):
    ours, theirs = stages.load(NAMES[1]).RMSNorm(24, eps), torch.nn.RMSNorm(24, eps)
    weight = torch.randn(24)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    x = torch.randn(5, 7, 24, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x))
    gradients = [torch.autograd.grad(norm(x).square().sum(), (x, norm.weight)) for norm in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_rmsnorm_casts_down_before_its_weight_as_hugging_face_does():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = stages.load(NAMES[1]).RMSNorm(64, 1e-6), LlamaRMSNorm(64, 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        for norm in (ours, theirs):
            norm.to(dtype).weight.data.copy_(torch.linspace(-2, 3, 64))
        x = (300 * torch.randn(50, 64)).to(dtype)  # its squares overflow float16
        assert torch.equal(ours(x), theirs(x)) and ours(x).isfinite().all()


def test_rmsnorm_leaves_its_input_alone():
    x = torch.randn(3, 8)
    before = x.clone()
    stages.load(NAMES[1]).RMSNorm(8, 1e-5)(x)
    assert torch.equal(x, before)


def test_there_are_no_biases_from_stage_1_on_but_qwen2s_and_gpt_neoxs():
    for number, name in enumerate(NAMES):
        names = [parameter for parameter, _ in model(number).named_parameters()]
        biases = {parameter.split(".")[-2] for parameter in names if parameter.endswith("bias")}
        if name == "qwen2":
            assert biases == {"q_proj", "k_proj", "v_proj"}
        else:
            assert bool(biases) == (number == 0 or name == "gpt_neox")


# Stage 2: RoPE


def rope(positions, theta=10000.0, head_dim=8):
    return stages.load(NAMES[2]).rotation(torch.as_tensor(positions), head_dim, theta)


def turned(x, position, theta=10000.0):
    """x (head_dim,) as the only head at a position."""
    return stages.load(NAMES[2]).rotate(x.view(1, 1, 1, -1), rope([position], theta, len(x))).flatten()


def test_position_0_is_not_turned():
    x = torch.randn(8)
    assert torch.equal(turned(x, 0), x)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scores_depend_on_distance_alone(theta):
    q, k = torch.randn(2, 8, dtype=torch.float32)
    for distance in (0, 1, 5, 33):
        scores = [turned(q, at + distance, theta) @ turned(k, at, theta) for at in (0, 1, 7, 100)]
        torch.testing.assert_close(torch.stack(scores), scores[0].expand(4), atol=1e-4, rtol=0)
    far, near = turned(q, 9) @ turned(k, 0), turned(q, 1) @ turned(k, 0)
    assert (far - near).abs() > 1e-3


def test_turning_keeps_norms():
    x = torch.randn(8)
    for position in (1, 10, 1000):
        torch.testing.assert_close(turned(x, position).norm(), x.norm())


def test_pairs_are_half_split_and_frequencies_those_of_the_paper():
    x = torch.zeros(8)
    x[1] = 1.0  # pairs with 1 + 8/2
    angle = torch.tensor(3 * 10000.0 ** (-2 * 1 / 8))
    expected = torch.zeros(8)
    expected[1], expected[5] = angle.cos(), angle.sin()
    torch.testing.assert_close(turned(x, 3), expected)


def test_positions_of_a_batch_may_differ_by_row():
    x = torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    rotate = stages.load(NAMES[2]).rotate
    both = rotate(x, rope(positions))
    for row in range(2):
        torch.testing.assert_close(both[row : row + 1], rotate(x[row : row + 1], rope(positions[row])))


def test_only_queries_and_keys_are_turned():
    """With one token there is nothing to attend to but itself: its position cannot matter."""
    for number in range(2, len(NAMES)):
        made = model(number)
        cache = made.new_cache(1, 40)
        first = made(IDX[:1, :1])[0]
        assert torch.equal(made(IDX[:1, :1], cache=cache)[0], first)
        shifted = made.new_cache(1, 40)
        shifted.positions = lambda n: torch.full((n,), 29)
        shifted.mask = lambda n: torch.zeros(n, n)
        torch.testing.assert_close(made(IDX[:1, :1], cache=shifted)[0], first, atol=1e-5, rtol=0)


def test_text_runs_past_the_trained_context_from_stage_2_on():
    long = torch.arange(40)[None]
    for number in range(len(NAMES)):
        made = model(number)
        if number < 2:
            with pytest.raises(ValueError, match="40 tokens, but there are positions for 16 alone"):
                made(long)
            continue
        cache = made.new_cache(1, 40)
        steps = [made(part, cache=cache)[0] for part in long.split((30, 9, 1), dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), made(long)[0], atol=1e-5, rtol=0)


def test_the_cache_holds_rotated_keys():
    made = model(2)
    cache = made.new_cache(1, 16)
    made(IDX[:1], cache=cache)
    x = made.model.layers[0].input_layernorm(made.model.embed_tokens(IDX[:1]))
    k = made.model.layers[0].self_attn.k_proj(x).view(1, 16, 4, 8).transpose(1, 2)
    rotated = stages.load(NAMES[2]).rotate(k, rope(list(range(16))))
    torch.testing.assert_close(cache.keys[0], rotated)


# Stage 3: SwiGLU


def test_swiglu_is_the_formula():
    mlp = model(3).model.layers[0].mlp
    x = torch.randn(5, 32)
    gate, up, down = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    g = x @ gate.T
    torch.testing.assert_close(mlp(x), (g * F.sigmoid(g) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize("n_embd", [32, 128, 384, 768, 4096])
def test_the_gated_mlp_is_no_larger_than_the_plain_one_but_for_rounding(n_embd):
    config = stages.load(NAMES[3]).GPTConfig(n_embd=n_embd, n_head=4)
    assert config.intermediate_size % 8 == 0
    assert 0 <= 3 * config.intermediate_size - 8 * n_embd < 24


# Stage 4: GQA


def test_with_all_heads_stage_4_is_stage_3_weight_for_weight():
    one, other = model(3), model(4, n_kv_head=4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(IDX)[0], other(IDX)[0])


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_a_group_of_query_heads_reads_one_head(n_kv_head):
    """Stage 3 with each key/value head written out for every query head of its group is stage 4."""
    grouped, full = model(4, n_kv_head=n_kv_head), model(3)
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weights[name].view(n_kv_head, 8, 32)
            weights[name] = torch.stack([heads[h * n_kv_head // 4] for h in range(4)]).reshape(32, 32)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(IDX)[0], full(IDX)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_the_cache_shrinks_by_exactly_the_ratio_of_heads(n_kv_head):
    grouped, full = model(4, n_kv_head=n_kv_head), model(3)
    assert grouped.new_cache(1, 16).nbytes * 4 == full.new_cache(1, 16).nbytes * n_kv_head


@pytest.mark.parametrize(
    "sizes, message", [({"n_kv_head": 3}, "n_kv_head \\(3\\)"), ({"n_kv_head": 0}, "\\(0\\)")]
)
def test_heads_that_cannot_be_shared_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        model(4, **sizes)
