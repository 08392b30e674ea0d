"""What the lessons say in numbers is computed here: the answers to questions, and the worked examples."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from deploy.quantization.grid import dequantize, find_grid
from deploy.quantization.rtn import rtn
from deploy.serving.blocks import Blocks, Table
from lab import stages
from lab.training import cost, presets

LAPTOP = presets.PRESETS["laptop"]["model"] | {"vocab_size": 65}
LESSONS = [f"stage{n}" for n in range(8)]
BEYOND = ["deploy/quantization", "deploy/serving"]


def page_of(lesson):
    (folder,) = stages.ROOT.glob(lesson if lesson in BEYOND else f"{lesson}_*")
    return (folder / "README.md").read_text()


def made(name):
    """A stage's model in the laptop preset, without memory for its weights."""
    stage = stages.load(name)
    with torch.device("meta"):
        return stage.GPT(stage.GPTConfig(**LAPTOP))


def cache_bytes(name):
    return made(name).new_cache(1, 1).nbytes


def silu(z):
    return F.silu(torch.tensor(float(z), dtype=torch.float64)).item()


def minus(number, digits=3):
    return f"{number:.{digits}f}".replace("-", "−")


def gpt():
    model = made("stage0_gpt")
    n_query = model.config.n_layer * model.config.n_embd * 4
    n_scores = [stages.load("stage0_gpt").causal_mask(n, n, "cpu").numel() for n in (64, 128)]
    return [
        [f"ln 65 = {math.log(65):.3f} nats", f"a perplexity of {math.exp(math.log(65)):.0f}"],
        [f"{cache_bytes('stage0_gpt'):,} bytes a token; with", f"would have {3 * n_query:,}"],
        [
            f"65 · 128 = {model.lm_head.weight.numel():,}",
            f"64 · 128 = {model.model.embed_positions.weight.numel():,}",
            f"{cost.parameters(model) / 1e6:.2f} million",
        ],
        ["Four times" if n_scores[1] == 4 * n_scores[0] else "", "from {:,} to {:,}".format(*n_scores)],
    ]


def rmsnorm():
    norm = stages.load("stage1_rmsnorm").RMSNorm(2, 0.0)
    x = torch.tensor([11.0, 17.0])
    length = stages.load("stage1_rmsnorm").RMSNorm(128, 0.0)(torch.randn(128)).norm().item()
    fewer = cost.parameters(made("stage0_gpt")) - cost.parameters(made("stage1_rmsnorm"))
    square = torch.tensor(300.0).bfloat16().square().item()
    assert torch.tensor(300.0).half().square().isinf()
    return [
        [f"/ 2) = {x.square().mean().sqrt():.3f}", "({:.3f}, {:.3f})".format(*norm(x).tolist())],
        [f"√128 = {length:.3f}"],
        [f"{300**2:,}", f"{torch.finfo(torch.float16).max:,.0f}", f"becomes {square:,.0f}"],
        [f"By {fewer:,}"],
    ]


def score(q, k, position_q, position_k):
    """The score of two vectors in the plane, rotated by stage 2's code with the frequency 1."""
    stage = stages.load("stage2_rope")
    rotated = []
    for vector, position in ((q, position_q), (k, position_k)):
        rope = stage.rotation(torch.tensor([position]), 2, 10000.0)
        rotated.append(stage.rotate(torch.tensor(vector, dtype=torch.float32).view(1, 1, 1, 2), rope))
    return (rotated[0] * rotated[1]).sum().item()


def rope():
    stage = stages.load("stage2_rope")
    turned = stage.rotate(
        torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), stage.rotation(torch.tensor([1]), 2, 1e4)
    )
    periods = [2 * math.pi * 10000 ** (2 * i / 32) for i in (0, 15)]
    q, k = (0.3, -1.2), (0.8, 0.5)
    same = next(n for n in range(8) if math.isclose(score(q, k, 7, n), score(q, k, 100, 97), abs_tol=1e-4))
    near = torch.tensor([1001.0, 1003.0]).bfloat16().tolist()
    return [
        ["({:.3f}, {:.3f})".format(*turned.flatten().tolist())],
        [f"2π = {periods[0]:.2f}", f"10000^(30/32) = {periods[1]:,.0f}"],
        [f"At position {same}:"],
        ["rounds 1,001 to {:,.0f}; its next number is {:,.0f}".format(*near)],
    ]


def swiglu():
    z = torch.linspace(-3, 0, 3001, dtype=torch.float64)
    config = stages.load("stage3_swiglu").GPTConfig(n_embd=768)
    return [
        [f"the width is {config.intermediate_size:,}"],
        [f"{minus(F.silu(z).min().item())} at the lowest", f"near {minus(z[F.silu(z).argmin()].item())}"],
        [f"silu(1) · 2 = {2 * silu(1):.3f}", f"silu(2) · 1 = {silu(2):.3f}"],
        [f"{8 / 3 * 4096:,.1f}", f"{math.ceil(8 / 3 * 4096 / 256) * 256:,} wide"],
    ]


def wiring(repeat):
    """Which key/value head each of 8 query heads reads, if 2 heads are repeated in that way."""
    return repeat(torch.arange(2).view(1, 2, 1, 1)).flatten().tolist()


def gqa():
    right = wiring(lambda k: k.repeat_interleave(4, dim=1))[3]
    wrong = wiring(lambda k: k.repeat(1, 4, 1, 1))[3]
    per_text = 2 * 32 * 8 * 128 * 2 * 8192  # Llama 3 8B in 16 bits
    names = ("stage0_gpt", "stage4_gqa", "stage7_mla_mtp")
    return [
        ["{:,}, {:,} and {:,}".format(*map(cache_bytes, names))],
        [f"3 · 2 // 8 = {right}", f"3 mod 2 = {wrong}"],
        [f"{4 * 64 * 64 * 32:,} multiplications"],
        [f"{40 * 2**30 // per_text}, and without GQA {40 * 2**30 // (4 * per_text)}"],
    ]


def flash():
    score, seen = torch.tensor([0.0, math.log(3), math.log(4)]), torch.eye(5).view(1, 1, 5, 5)
    exact = (score.softmax(0) * torch.tensor([4.0, 8.0, 2.0])).sum().item()
    q, k = torch.randn(1, 1, 1, 5), torch.randn(1, 1, 5, 5)
    n_seen = (F.scaled_dot_product_attention(q, k, seen, is_causal=True) > 0).sum().item()
    return [
        [f"gives {exact:.1f} both ways"],
        [f"= {16 * 16384**2 * 4 / 2**30:.0f} GiB", f"= {16 * 16384 * 4 / 2**20:.0f} MiB"],
        [f"exp(−ln 2) = {math.exp(-math.log(2)):.1f}"],
        [f"Only {n_seen} of the 5"],
    ]


def moe():
    stage, model = stages.load("stage6_moe"), made("stage6_moe")
    config = stage.GPTConfig(**LAPTOP | {"num_experts_per_tok": 1})
    weight = torch.tensor(0.7, requires_grad=True)
    (gradient,) = torch.autograd.grad(weight / weight, weight)
    even, all_in_one = torch.full((8,), 1 / 8), F.one_hot(torch.tensor(0), 8).float()
    losses = [stage.balance_loss(probs[None], probs * 64).item() for probs in (even, all_in_one)]
    k, n_experts = model.config.num_experts_per_tok, config.n_routed_experts
    return [
        [
            f"{cost.parameters(model) / 1e6:.2f} million in all",
            f"{cost.active_parameters(model) / 1e6:.2f} million active",
        ],
        [f"{gradient.item():.3f}: the weight"],
        ["{:.1f} and {:.1f}".format(*losses)],
        [f"{100 / k:.0f} %", f"{100 / n_experts} %"],
    ]


def fewer_multiplications(rank, nope, rope, v):
    return (rank * (nope + v) + nope + rope + v) / (2 * rank + rope)


def mla_mtp():
    model = made("stage7_mla_mtp")
    config = model.config
    ours = (config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
    small, large = 61 * (512 + 64), 61 * 128 * (192 + 128)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    targets = torch.arange(10).view(1, 10)
    counts = []
    for _ in range(3):
        counts.append((targets != -1).sum().item())
        targets = F.pad(targets[:, 1:], (0, 1), value=-1)
    return [
        [f"61 · (512 + 64) = {small:,}", f"(192 + 128) = {large:,}", f"{large / small:.0f} times fewer"],
        [f"only {config.qk_rope_head_dim} numbers", f"beside {config.kv_lora_rank} of the latent"],
        [f"{fewer_multiplications(*ours):.0f} and {fewer_multiplications(512, 128, 64, 128):.0f} times"],
        ["has {} targets, the first block {}, the second {}".format(*counts)],
        [f"= {torch.minimum(p, q).sum():.1f}."],
    ]


def error_of_two(h, q):
    """d H dᵀ for the weights (0.4, 0.4) and codes q, where H has h beside its diagonal."""
    d = torch.tensor(q) - 0.4
    return (d @ torch.tensor([[1.0, h], [h, 1.0]]) @ d).item()


def quantization():
    bits = [4 + 24 / size for size in (64, 32)]
    dense = 1536 * 576 * 2
    group = torch.tensor([[-0.3, 1.2, 0.4, 0.1]])
    (scale,), (zero,) = (each.flatten().tolist() for each in find_grid(group, 2, 4))
    q = rtn(group, 2, 4)
    return [
        [
            f"4 + 24/64 = {bits[0]} bits, and 4 + 24/32 = {bits[1]}",
            f"{1536 * 576 * bits[0] / 8:,.0f} bytes instead of {dense:,}",
            f"which is {16 / bits[0]:.1f} times less",
        ],
        [
            f"1.5 / 3 = {scale}, and the zero is round(0.6) = {zero:.0f}",
            f"+ 1 = {q.codes[0, 2]}, which stands for {dequantize(q)[0, 2]:.1f}",
        ],
        [f"an error of {error_of_two(0.0, [0.0, 0.0]):.2f} both ways"],
        [f"divided by {16**0.5:.0f} with the weights"],
    ]


def new_blocks(size):
    return Blocks(40, size, lambda source, target: None)


def computed_when_repeated(n_tokens):
    blocks, table, tokens = new_blocks(16), Table(), list(range(n_tokens))
    blocks.grow(table, n_tokens)
    blocks.computed(table, tokens, n_tokens)
    blocks.release(table)
    return n_tokens - blocks.match(tokens).length


def serving():
    held = [new_blocks(size).count(100) for size in (16, 4)]
    per_block = 2 * 30 * 3 * 64 * 2 * 16
    blocks, first = new_blocks(16), Table()
    blocks.grow(first, 30)
    blocks.computed(first, list(range(30)), 30)
    for table in (first, blocks.fork(first), blocks.fork(first)):
        blocks.grow(table, 31)
    return [
        [f"{held[0]} blocks with {16 * held[0] - 100} empty", f"{held[1]} blocks with {4 * held[1] - 100}."],
        [f"{computed_when_repeated(70)} of the 70", f"{computed_when_repeated(64)} of the 64"],
        [f"= {per_block:,} bytes", f"{2**30 // per_block:,} blocks", f"{2**30 // per_block * 16:,} tokens"],
        [f"{sum(n > 0 for n in blocks.references)}. All share"],
    ]


ANSWERS = dict(zip(LESSONS, (gpt, rmsnorm, rope, swiglu, gqa, flash, moe, mla_mtp), strict=True))
ANSWERS |= dict(zip(BEYOND, (quantization, serving), strict=True))


@pytest.mark.parametrize("lesson", LESSONS + BEYOND)
def test_the_answers_to_the_questions_are_what_the_code_computes(lesson):
    section = page_of(lesson).split("\n## Questions\n")[1].split("\n## ")[0]
    questions = re.findall(
        r"\*\*(\d)\.\*\* .*?<summary>Answer</summary>\n\n(.*?)\n\n</details>", section, re.DOTALL
    )
    computed = ANSWERS[lesson]()
    assert [int(number) for number, _ in questions] == list(range(1, len(computed) + 1))
    assert 3 <= len(questions) <= 5
    for (_, answer), fragments in zip(questions, computed, strict=True):
        for fragment in fragments:
            assert fragment in answer.replace("\n", " ")
    assert "**In your own words.**" in section


@pytest.mark.parametrize("lesson", LESSONS[1:])
def test_every_hunk_of_a_diff_is_explained(lesson):
    """If this fails, a diff has more or fewer hunks than its list has entries."""
    for diff, explained in re.findall(
        r"```diff\n(.*?)```\n<!-- end -->\n(.*?)\n#", page_of(lesson), re.DOTALL
    ):
        numbers = re.findall(r"^(\d+)\. ", explained, re.MULTILINE)
        n_hunks = len(re.findall(r"^@@", diff, re.MULTILINE))
        assert "**Hunk by hunk:**" in explained and [int(n) for n in numbers] == list(range(1, n_hunks + 1))


def cells(page, first):
    """The cells of the table row that begins with these cells."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def test_the_example_of_attention_is_what_stage_0_computes():
    stage, k = stages.load("stage0_gpt"), torch.zeros(1, 1, 3, 4)
    k[..., 1, 0] = math.log(3)
    q, v = torch.tensor([2.0, 0, 0, 0]).expand(1, 1, 3, 4), torch.tensor([8.0, 0, 100]).view(1, 1, 3, 1)
    y = stage.attention(q, k, v, stage.causal_mask(3, 3, "cpu"), 0.0)
    assert y[0, 0, 1, 0].item() == pytest.approx(
        2
    ) and "The output is 1/4 · 8 + 3/4 · 0 + 0 · 100 = 2" in page_of("stage0")
    losses = [-math.log(p) for p in (1 / 2, 1 / 4, 1 / 8)]
    said = "−ln p is {:.3f}, {:.3f} and {:.3f}, and the mean is {:.3f} nats".format(*losses, sum(losses) / 3)
    assert said in page_of("stage0").replace("\n", " ")


def test_the_examples_of_norms_rotations_and_gates_are_what_the_stages_compute():
    norm, page = stages.load("stage1_rmsnorm").RMSNorm(2, 0.0), page_of("stage1")
    for place, x in ((2, (1.0, 7.0)), (3, (2.0, 14.0)), (4, (11.0, 17.0))):
        for name, of in (
            ("LayerNorm", F.layer_norm(torch.tensor(x), (2,), eps=0)),
            ("RMSNorm", norm(torch.tensor(x))),
        ):
            shown = "({:.2f}, {:.2f})".format(*of.tolist()).replace("-", "−")
            short = re.sub(r"(\.\d*?)0+(?=[,)])", r"\1", shown).replace(".,", ",").replace(".)", ")")
            assert cells(page, name)[place] == short
    rows = re.findall(
        r"^\| (\(\d, \d\)) \| (\d+) \| (\d+) \| \d+ \| \S+ \d = (.*?) \|$", page_of("stage2"), re.MULTILINE
    )
    assert len(rows) == 5
    for key, at_q, at_k, said in rows:
        k = tuple(map(float, key.strip("()").split(",")))
        assert minus(score((1.0, 0.0), k, int(at_q), int(at_k))) == said
    rows = re.findall(r"^\| (−?\d) \| (\d) \| (−?\d+\.\d\d) \|$", page_of("stage3"), re.MULTILINE)
    assert len(rows) == 4
    for gate, value, said in rows:
        assert minus(silu(gate.replace("−", "-")) * int(value), 2).replace("−0.00", "0.00") == said


def test_the_example_of_routing_is_what_stage_6_computes():
    stage = stages.load("stage6_moe")
    router = stage.Router(
        stage.GPTConfig(**LAPTOP | {"n_embd": 4, "n_head": 2, "n_routed_experts": 4})
    ).eval()
    router.weight.data = torch.diag(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    page, x = page_of("stage6").replace("\n", " "), torch.ones(1, 4)
    weights, indices = router(x)
    assert indices.tolist() == [[0, 1]] and f"= {weights[0, 0]:.3f} and {weights[0, 1]:.3f}" in page
    router.e_score_correction_bias += torch.tensor([-0.4, 0.0, 0.3, 0.0])
    weights, indices = router(x)
    assert indices.tolist() == [[2, 1]] and f"= {weights[0, 0]:.3f} and {weights[0, 1]:.3f}" in page


def test_the_examples_of_blocks_absorbing_and_drafts_add_up():
    """In fractions of the values that the tables show."""
    total, weighted = 4 / 3 * 3 / 4 + 1, 28 / 3 * 3 / 4 + 2  # l and o
    assert (total, weighted, weighted / total) == pytest.approx(
        (2, 9, 4.5)
    ) and "o / l = 9 / 2 = 4.5" in page_of("stage5")
    w, c, q = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([3.0, 1]), torch.tensor([2.0, -1])
    assert q @ (w @ c) == (w.T @ q) @ c == 9 and (w.T @ q).tolist() == [2, 3]
    assert "(2, 3) · (3, 1) = 6 + 3 = 9" in page_of("stage7")
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    left = (p - q).clamp_min(0)
    left /= left.sum()
    rejected = q[1] * (1 - p[1] / q[1])
    assert left.tolist() == pytest.approx([0.75, 0, 0.25]) and (
        q[0] + rejected * left[0]
    ).item() == pytest.approx(0.5)
    assert "0.2 + 0.4 · 0.75 = 0.5" in page_of("stage7")
    page = page_of("deploy/quantization")
    assert f"2 · 0.5 · 0.16 = {error_of_two(0.5, [0.0, 0.0]):.2f}" in page
    assert f"2 · 0.5 · 0.24 = {error_of_two(0.5, [0.0, 1.0]):.2f}" in page


def test_the_bridge_to_published_models_shows_the_sizes_of_the_stages():
    """The columns of published models are those of their config.json; see tests/test_published_configs.py."""
    page = (stages.ROOT / "docs" / "learning-path.md").read_text()
    for place, name in ((0, "stage4_gqa"), (2, "stage6_moe"), (4, "stage7_mla_mtp")):
        config = made(name).config
        is_mixture, latent = hasattr(config, "n_routed_experts"), getattr(config, "kv_lora_rank", None)
        experts = "n_routed_experts", "num_experts_per_tok", "n_shared_experts"
        shown = {
            "vocabulary": config.vocab_size,
            "`n_embd`": config.n_embd,
            "layers": config.n_layer,
            "query heads": config.n_head,
            "key/value heads": f"a latent of {latent}" if latent else config.n_kv_head,
            "width of the MLP, or of an expert": getattr(
                config, "moe_intermediate_size", config.intermediate_size
            ),
            "experts: to choose from, per token, shared": ", ".join(
                str(getattr(config, e, "–")) for e in experts
            )
            if is_mixture
            else "–",
            "router": getattr(config, "router", "–"),
            "`rope_theta`": f"{config.rope_theta:,.0f}",
            "context in training": config.block_size,
            "head tied to the embedding": "yes" if config.tie_word_embeddings else "no",
            "MTP blocks": getattr(config, "num_nextn_predict_layers", "–"),
        }
        for row, value in shown.items():
            assert cells(page, row)[place] == str(value), (name, row)
