"""Stage 5: every way to compute attention is the same function, the algorithm written out among them."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_training import metrics

from lab import attention, device, stages
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


@pytest.fixture
def use(monkeypatch):
    """use(kernel): stage 5 computes attention with this kernel, until the test ends."""
    monkeypatch.setattr(STAGE5, "attention", STAGE5.attention)  # which restores it
    return lambda kernel: attention.use(kernel, STAGE5, STAGE5.GPTConfig(**SIZES), torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "explicit", "tiled"])
def test_stage_4s_weights_give_the_same_logits_and_gradients(kernel, use):
    four, five = pair()
    use(kernel)
    idx = torch.randint(65, (3, 32))
    results = []
    for model in (four, five):
        logits, losses = model(idx, targets=idx.roll(-1, 1))
        results.append((logits, torch.autograd.grad(losses["next_token"], list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "explicit", "tiled"])
def test_the_cache_works_with_every_kernel(kernel, use):
    """Prefill, a chunk (more keys than queries, lower-right), then one by one."""
    four, five = pair()
    use(kernel)
    idx = torch.randint(65, (2, 20))
    cache = five.new_cache(2, 20)
    with torch.no_grad():
        parts = [five(part, cache=cache)[0] for part in idx.split([9, 6, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), four(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "explicit", "tiled"])
def test_a_caches_own_mask_is_obeyed(kernel, use):
    """A cache that holds several texts side by side masks each from the others."""
    _, five = pair()
    use(kernel)
    idx = torch.randint(65, (1, 6))
    cache = five.new_cache(1, 6)
    cache.mask = lambda n_new: torch.full((n_new, n_new), -torch.inf).fill_diagonal_(0.0)
    cache.positions = lambda n_new: torch.zeros(n_new, dtype=torch.int64)
    alone = torch.cat([five(idx[:, t : t + 1])[0] for t in range(6)], dim=1)
    torch.testing.assert_close(five(idx, cache=cache)[0], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
def test_attention_weights_are_dropped(kernel, use):
    use(kernel)
    q, k, v = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    dropped = STAGE5.attention(q, k, v, None, 0.5)
    assert not torch.allclose(dropped, torch.ones_like(dropped))
    assert torch.allclose(STAGE5.attention(q, k, v, None, 0.0), torch.ones_like(dropped))


def test_attention_weights_are_dropped_in_training_alone(monkeypatch):
    given = []
    real = STAGE5.attention
    monkeypatch.setattr(STAGE5, "attention", lambda *inputs: given.append(inputs[-1]) or real(*inputs))
    layer = pair(dropout=0.5)[1].model.layers[0].self_attn
    rope = STAGE5.rotation(torch.arange(8), 8, 10000.0)
    for mode in (True, False):
        layer.train(mode)(torch.randn(1, 8, 32), rope, None, None)
    assert given == [0.5, 0.0]


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 9)], ids=["no mask", "a mask"])
def test_the_queries_of_a_group_share_one_product_when_there_is_one_token(mask, monkeypatch):
    """SDPA's own grouped heads are slow for a single query on a CPU."""
    real, shapes = F.scaled_dot_product_attention, []

    def sdpa_of(q, *others, **named):
        shapes.append(tuple(q.shape))
        return real(q, *others, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa_of)
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    with torch.no_grad():
        found = STAGE5.attention(q, k, v, mask, 0.0)
    assert shapes == [(2, 2, 3, 8)]
    torch.testing.assert_close(found, explicit(q, k, v).float(), atol=1e-5, rtol=0)


def used(monkeypatch, q, k, mask=None):
    """Which of its ways stage 5's attention takes, without computing."""
    calls, out = [], torch.empty(1, 1, q.size(2), 1)
    monkeypatch.setattr(STAGE5, "explicit_attention", lambda *_: calls.append("explicit"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: calls.append("sdpa") or out)
    STAGE5.attention(q, k, k, mask, 0.0)
    return calls


def test_short_attention_is_written_out_on_a_cpu_in_training_alone(monkeypatch):
    short, long = torch.empty(1, 1, 512, 8), torch.empty(1, 1, 513, 8)
    assert used(monkeypatch, short, short) == ["explicit"]
    assert used(monkeypatch, long, long) == ["sdpa"]
    assert used(monkeypatch, short.to("meta"), short.to("meta")) == ["sdpa"]
    with torch.no_grad():
        assert used(monkeypatch, short, short) == ["sdpa"]


class Cuda:
    """A tensor that says it is on CUDA, for a device that is not here."""

    def __init__(self, tensor, dtype):
        self.tensor, self.dtype = tensor, dtype
        self.is_cuda, self.device = True, torch.device("cuda")

    def size(self, dim):
        return self.tensor.size(dim)

    def transpose(self, *dims):
        return self.tensor.transpose(*dims)


def test_flash_attn_computes_16_bits_on_cuda_with_positions_before_heads(monkeypatch):
    """With a stand-in that has flash_attn_func's signature and alignment."""

    def stand_in(q, k, v, dropout_p=0.0, causal=False):
        assert causal and dropout_p == 0.0 and k.shape == v.shape == (2, 20, 2, 8)
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    monkeypatch.setattr(STAGE5, "flash_attn_func", stand_in)
    for dtype in (torch.float16, torch.bfloat16):
        out = STAGE5.attention(*(Cuda(x, dtype) for x in (q, k, v)), None, 0.0)
        torch.testing.assert_close(out, explicit(q, k, v).float(), atol=1e-5, rtol=0)
    exact = [Cuda(x, torch.float32) for x in (q, q)]
    assert used(monkeypatch, *exact) == ["sdpa"]  # flash_attn knows 16 bits alone
    monkeypatch.setattr(STAGE5, "flash_attn_func", None)
    assert used(monkeypatch, *(Cuda(x, torch.bfloat16) for x in (q, q))) == ["sdpa"]


def test_flash_attn_is_not_asked_for_what_it_does_not_know(monkeypatch):
    """A mask of a cache's own and, in latent attention, values of another width than queries."""
    mla = stages.load("stage7a_mla")
    wide, narrow = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    computed, out = [], torch.empty(1, 1, 5, 1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: computed.append("sdpa") or out)
    for stage in (STAGE5, mla):
        monkeypatch.setattr(stage, "flash_attn_func", lambda *_, **__: computed.append("flash_attn"))
        stage.attention(*(Cuda(wide, torch.bfloat16) for _ in range(3)), torch.zeros(5, 5), 0.0)
    mla.attention(*(Cuda(x, torch.bfloat16) for x in (wide, wide, narrow)), None, 0.0)
    assert computed == ["sdpa"] * 3


# --attention-kernel


def test_the_trainer_uses_the_kernel_and_names_it(run_train, workshop, capsys, use):
    assert run_train("--stage", "5", "--steps", "2", "--log-every", "1", "--out", "own") == 0
    assert "attention" not in capsys.readouterr().out
    flags = ("--stage", "5", "--steps", "2", "--log-every", "1", "--attention-kernel", "tiled")
    assert run_train(*flags, "--out", "tiled") == 0
    assert "attention: tiled" in capsys.readouterr().out
    assert STAGE5.attention.__module__ == "lab.attention"
    losses = [[line["loss"] for line in metrics(folder)] for folder in ("own", "tiled")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stage", "4", "--attention-kernel", "sdpa"], "--attention-kernel sdpa needs stage 5 or later"),
        (["--stage", "5", "--attention-kernel", "triton"], "--attention-kernel triton needs CUDA, not cpu"),
        (["--stage", "5", "--attention-kernel", "fast"], "fast"),
        (["--stage", "5", "--attention-kernel", "tiled", "--model.dropout", "0.1"], "has no dropout"),
        (
            ["--stage", "7a", "--attention-kernel", "tiled", "--model.v-head-dim", "12"],
            "needs queries and values of the same width; here they have 8 and 12",
        ),
    ],
)
def test_a_kernel_that_cannot_be_used_is_refused_before_the_run(flags, message, run_train, workshop, capsys):
    assert run_train(*flags, "--steps", "2", "--out", "no") == 2
    assert message in capsys.readouterr().err
    assert not Path("no").exists()


def test_the_triton_kernels_limits_are_known_before_the_first_step():
    narrow = STAGE5.GPTConfig(**SIZES)
    with pytest.raises(UserError, match="16 to 128 dimensions; here they have 8"):
        attention.use("triton", STAGE5, narrow, torch.device("cuda"))


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

    @functools.cache
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
def test_the_triton_kernels_are_attention_in_the_interpreter():
    """In a process of its own: what interprets is decided when Triton is imported."""
    dtypes = "torch.float32, torch.float16, torch.bfloat16"
    code = f"import torch, test_flash\nfor dtype in ({dtypes}): test_flash.check_kernels(dtype)"
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
