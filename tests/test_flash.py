"""Stage 5: every way to compute attention is the same function, the algorithm written out among them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lab import device, stages
from lab.errors import UserError
from lab.storage import runs
from stage5_flash.tiled import tiled_attention

ROOT = Path(__file__).parent.parent
STAGE4, STAGE5 = (stages.load(name) for name in ("stage4_gqa", "stage5_flash"))
SIZES = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}

# (B, n_head, n_kv_head, T, S, head_dim): grouped and single heads, unequal lengths, one query, odd widths
SHAPES = [
    (2, 4, 2, 50, 50, 16),
    (1, 4, 1, 33, 70, 24),
    (2, 2, 2, 1, 40, 128),
    (1, 6, 3, 64, 64, 80),
    (1, 3, 3, 5, 5, 100),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def version(package):
    """The first two numbers of the installed version; (0, 0) without the package."""
    return tuple(map(int, (runs.installed(package) or "0.0").split(".")[:2]))


def inputs(shape, dtype, where="cpu"):
    """q, k and v, and a gradient for the output; q's memory is in another order than its dimensions."""
    B, n_head, n_kv_head, T, S, head_dim = shape
    torch.manual_seed(0)
    q = torch.randn(B, T, n_head, head_dim).transpose(1, 2)
    k, v = torch.randn(2, B, n_kv_head, S, head_dim)
    d_out = torch.randn(B, n_head, T, head_dim)
    q, k, v, d_out = (x.to(where, dtype) for x in (q, k, v, d_out))
    return [x.requires_grad_() for x in (q, k, v)], d_out


def explicit(q, k, v):
    """Attention written out, in float64."""
    repeats = q.size(1) // k.size(1)
    q, k, v = q.double(), *(x.double().repeat_interleave(repeats, dim=1) for x in (k, v))
    T, S = q.size(2), k.size(2)
    later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v


def sdpa(q, k, v):
    seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def assert_same_function(ours, theirs, shape, dtype, where="cpu"):
    """Outputs and the gradients of q, k and v agree."""
    leaves, d_out = inputs(shape, dtype, where)
    results = []
    for function in (ours, theirs):
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
        results.append([out.double(), *(gradient.double() for gradient in gradients)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# model.py


def pair(**sizes):
    """Stage 4 and stage 5 with the same weights."""
    torch.manual_seed(0)
    four = STAGE4.GPT(STAGE4.GPTConfig(**SIZES))
    five = STAGE5.GPT(STAGE5.GPTConfig(**SIZES | sizes))
    five.load_state_dict(four.state_dict())
    return four, five


@pytest.mark.parametrize("attention", ["auto", "sdpa", "explicit"])
def test_stage_4s_weights_give_the_same_logits_and_gradients(attention):
    four, five = pair(attention=attention)
    idx = torch.randint(65, (3, 32))
    results = []
    for model in (four, five):
        logits, losses = model(idx, targets=idx.roll(-1, 1))
        results.append((logits, torch.autograd.grad(losses["next_token"], list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "explicit"])
def test_the_cache_works_with_every_choice(attention):
    """Prefill, a chunk (more keys than queries, lower-right), then one by one."""
    four, five = pair(attention=attention)
    idx = torch.randint(65, (2, 20))
    cache = five.new_cache(2, 20)
    with torch.no_grad():
        parts = [five(part, cache=cache)[0] for part in idx.split([9, 6, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), four(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "explicit"])
def test_a_caches_own_mask_is_obeyed(attention):
    """A cache that holds several texts side by side says with its mask who sees whom."""
    _, five = pair(attention=attention)
    idx = torch.randint(65, (1, 6))
    cache = five.new_cache(1, 6)
    cache.mask = lambda n_new: torch.full((n_new, n_new), -torch.inf).fill_diagonal_(0.0)
    cache.positions = lambda n_new: torch.zeros(n_new, dtype=torch.int64)
    alone = torch.cat([five(idx[:, t : t + 1])[0] for t in range(6)], dim=1)
    torch.testing.assert_close(five(idx, cache=cache)[0], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_attention_weights_are_dropped_in_training(attention):
    _, five = pair(attention=attention, dropout=0.5)
    layer = five.model.layers[0].self_attn.train()
    q, k, v = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    dropped = layer.attend(q, k, v, None)
    assert not torch.allclose(dropped, torch.ones_like(dropped))
    assert torch.allclose(layer.eval().attend(q, k, v, None), torch.ones_like(dropped))


class On:
    """What choose_attention asks of a tensor, for a device that is not here."""

    def __init__(self, kind, dtype, length):
        self.device, self.dtype, self.length = torch.device(kind), dtype, length
        self.is_cuda = kind == "cuda"

    def size(self, dim):
        return self.length


def chosen(name="auto", kind="cuda", dtype=torch.bfloat16, length=64, mask=None, dropout=0.0):
    tensor = On(kind, dtype, length)
    return STAGE5.choose_attention(name, tensor, tensor, mask, dropout)


@pytest.mark.parametrize("installed", [True, False])
def test_auto_chooses_flash_attn_on_cuda_in_16_bits_where_it_is_installed(monkeypatch, installed):
    monkeypatch.setattr(STAGE5, "flash_attn_func", installed or None)
    best = "flash_attn" if installed else "sdpa"
    assert chosen() == chosen(dtype=torch.float16) == chosen("flash_attn") == best
    assert chosen(dtype=torch.float32) == chosen("flash_attn", dtype=torch.float32) == "sdpa"
    assert chosen(mask=torch.zeros(1)) == "sdpa"  # flash_attn knows the causal mask alone
    assert chosen(kind="mps") == chosen("flash_attn", kind="mps") == "sdpa"


def test_auto_writes_short_attention_out_on_a_cpu_in_training_alone():
    assert chosen(kind="cpu", length=512) == "explicit"
    assert chosen(kind="cpu", length=513) == "sdpa"
    with torch.no_grad():
        assert chosen(kind="cpu") == "sdpa"


def test_what_is_asked_for_is_used_where_it_can_be(monkeypatch):
    monkeypatch.setattr(STAGE5, "flash_attn_func", None)
    for name in ("sdpa", "explicit"):
        assert chosen(name) == chosen(name, kind="cpu", mask=torch.zeros(1)) == name
    assert chosen("triton") == "triton"
    assert chosen("triton", kind="cpu", length=2000) == "sdpa"
    assert chosen("triton", mask=torch.zeros(1)) == chosen("triton", dropout=0.1) == "sdpa"


def test_flash_attn_gets_positions_before_heads_and_no_repeated_head(monkeypatch):
    """With a stand-in that has flash_attn_func's signature and alignment."""

    def stand_in(q, k, v, dropout_p=0.0, causal=False):
        assert causal and dropout_p == 0.0 and k.shape == v.shape == (2, 20, 2, 8)
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(STAGE5, "flash_attn_func", stand_in)
    monkeypatch.setattr(STAGE5, "choose_attention", lambda *_: "flash_attn")
    _, five = pair()
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    out = five.model.layers[0].self_attn.eval().attend(q, k, v, None)
    torch.testing.assert_close(out, explicit(q, k, v).float(), atol=1e-5, rtol=0)


def test_the_trainer_names_what_it_uses_and_refuses_what_is_not_here(run_train, workshop, capsys):
    assert run_train("--stage", "5", "--steps", "2", "--model.attention", "sdpa", "--out", "run") == 0
    assert "attention: sdpa" in capsys.readouterr().out
    for name in ("flash_attn", "triton"):
        assert run_train("--stage", "5", "--steps", "2", "--model.attention", name, "--out", "no") == 2
        assert f"--model.attention {name}" in capsys.readouterr().err
        assert not Path("no").exists()
    assert run_train("--stage", "5", "--steps", "2", "--model.attention", "fast", "--out", "no") == 2
    assert "auto, flash_attn, sdpa, explicit, triton" in capsys.readouterr().err


def test_stages_without_the_choice_have_no_name_for_it():
    four = STAGE4.GPTConfig(**SIZES)
    assert stages.attention(STAGE4, four, torch.device("cpu"), torch.float32) is None
    with pytest.raises(UserError, match="dropout"):
        config = STAGE5.GPTConfig(**SIZES, attention="triton", dropout=0.1)
        stages.attention(STAGE5, config, torch.device("cpu"), torch.float32)


def test_the_kernels_limits_are_known_before_the_first_step():
    on_cuda, cpu = SimpleNamespace(choose_attention=lambda name, *tensors: name), torch.device("cpu")
    narrow = STAGE5.GPTConfig(**SIZES, attention="triton")
    with pytest.raises(UserError, match="16 to 128 dimensions; here they have 8"):
        stages.attention(on_cuda, narrow, cpu, torch.float32)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 128, "v_head_dim": 12}  # queries have 32
    uneven = stages.load("stage7_mla_mtp").GPTConfig(**sizes, attention="flash_attn")
    with pytest.raises(UserError, match="queries and values of one width; here they have 32 and 12"):
        stages.attention(on_cuda, uneven, cpu, torch.float32)


# tiled.py


@pytest.mark.parametrize("blocks", [(64, 64), (16, 8), (7, 13), (1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiled_attention_is_attention(shape, blocks):
    if blocks == (1, 1) and shape[3] > 10:
        pytest.skip("a loop of thousands")
    assert_same_function(lambda q, k, v: tiled_attention(q, k, v, *blocks), explicit, shape, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiled_attention_is_sdpa_in_every_precision(dtype):
    for shape in SHAPES[:2]:
        assert_same_function(tiled_attention, sdpa, shape, dtype)


def test_the_gradients_of_tiled_attention_are_those_of_its_output():
    leaves, _ = inputs((1, 4, 2, 5, 7, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, 2, 3), leaves)


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 4, 16), 100.0)
    out = tiled_attention(q, q, torch.arange(64.0).view(1, 1, 4, 16), 2, 2)
    torch.testing.assert_close(out, sdpa(q, q, torch.arange(64.0).view(1, 1, 4, 16)))


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="5 queries but 4 keys"):
        tiled_attention(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from lab import device
from stage5_flash.tiled import tiled_attention
def explicit(q, k, v):
    T = q.size(2)
    mask = torch.full((T, T), -torch.inf).triu(1)
    return (q @ k.mT * 0.125 + mask).softmax(-1) @ v
how, T = sys.argv[1], int(sys.argv[2])
q, k, v = (torch.randn(1, 1, T, 64, requires_grad=True) for _ in range(3))
attention = explicit if how == "explicit" else lambda *x: tiled_attention(*x, 128, 128)
attention(*(x[:, :, :64] for x in (q, k, v))).sum().backward()
before = device.peak_memory(torch.device("cpu"))
attention(q, k, v).sum().backward()
print(device.peak_memory(torch.device("cpu")) - before)
"""


def test_memory_grows_with_the_length_and_not_with_its_square():
    """Peak of a process of its own, above what it needed before: once and with four times the length."""

    def peak(how, length):
        child = [sys.executable, "-c", MEMORY, how, str(length)]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves glibc's hands at once
        return int(
            subprocess.run(child, capture_output=True, text=True, check=True, cwd=ROOT, env=env).stdout
        )

    assert peak("explicit", 4096) > 12 * peak("explicit", 1024)
    assert peak("tiled", 16384) < 6 * peak("tiled", 4096) + 2**20
    assert peak("tiled", 4096) < peak("explicit", 4096) / 4


# kernel.py


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.skipif(
    (0, 0) < version("triton") < (3, 7) and version("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 needs numpy before 2.4",
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_triton_kernels_are_attention_in_the_interpreter(dtype):
    """In a process of its own: what interprets is decided when Triton is imported."""
    code = f"import torch, test_flash; test_flash.check_kernels(torch.{dtype})"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    child = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]


def check_kernels(dtype, where="cpu"):
    from stage5_flash.kernel import triton_attention

    for shape in SHAPES:
        assert_same_function(triton_attention, explicit, shape, dtype, where)
    for sizes, message in (
        ((5, 4, 16), "5 queries but 4 keys"),
        ((4, 4, 8), "head_dim must be from 16 to 128"),
    ):
        T, S, head_dim = sizes
        with pytest.raises(ValueError, match=message):
            triton_attention(torch.zeros(1, 1, T, head_dim), *[torch.zeros(1, 1, S, head_dim)] * 2)


def test_peak_memory_is_known_here():
    assert device.peak_memory(torch.device("cpu")) > 2**20
