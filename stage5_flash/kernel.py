"""FlashAttention-2 as Triton kernels: what tiled.py does, a block of queries to each program of the GPU.

Dao 2023, arXiv 2307.08691, Algorithms 1 and 2. The backward pass is two kernels, so that no two programs
add to the same numbers: one owns a block of keys (dk and dv), the other a block of queries (dq). Without a
GPU they run in Triton's interpreter: TRITON_INTERPRET=1, set before this file is imported.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UPCAST = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is what the hardware has: exp(x) = exp2(x · log2(e))
# Blocks and warps to choose from by measuring; what does not fit into a GPU's shared memory drops out.
CONFIGS = [
    triton.Config({"BLOCK_Q": block_q, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_q, block_k, warps, stages in [
        (128, 64, 8, 3), (128, 64, 4, 2), (128, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2),
    ]
]  # fmt: skip
if INTERPRETED:
    CONFIGS = [triton.Config({"BLOCK_Q": 32, "BLOCK_K": 16})]
# Chosen anew for other widths of a head, precisions and, in powers of 2, numbers of keys.
KEY = ["BLOCK_D", "PRECISION", "LENGTH_CLASS"]


def triton_attention(q, k, v):
    """softmax(q kᵀ / sqrt(head_dim) + causal mask) v, and its gradients, without the score matrix.

    q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) in 32 or 16 bits on CUDA ->
    (B, n_head, T, head_dim). The last query sees every key (lower-right alignment); query head h reads
    key/value head h · n_kv_head / n_head. Raises ValueError for more queries than keys, or a head_dim
    below 16 or above 128.
    """
    if q.size(2) > k.size(2):
        raise ValueError(f"{q.size(2)} queries but {k.size(2)} keys: the first queries would see none")
    if not 16 <= q.size(3) <= 128:
        raise ValueError(f"head_dim must be from 16 to 128, not {q.size(3)}")
    return TritonAttention.apply(q, k, v)


class TritonAttention(torch.autograd.Function):
    """Saves the output and, for each query, the base-2 logarithm of its softmax's denominator."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, n_head, T, _ = q.shape
        out = torch.empty_like(q)
        log_sum = torch.empty((B, n_head, T), device=q.device, dtype=torch.float32)
        forward_kernel[lambda meta: (triton.cdiv(T, meta["BLOCK_Q"]), B * n_head)](
            q, k, v, out, log_sum, *strides(q, k, v, out), *sizes(q, k), **constants(q, k)
        )
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, log_sum = ctx.saved_tensors
        B, n_head, T, _ = q.shape
        n_kv_head, S = k.shape[1:3]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta = (d_out.float() * out.float()).sum(-1)  # (B, n_head, T): sum over keys of p · dp
        common = (log_sum, delta, *strides(q, k, v, d_out), *sizes(q, k))
        keys_kernel[lambda meta: (triton.cdiv(S, meta["BLOCK_K"]), B * n_kv_head)](
            q, k, v, d_out, dk, dv, *common, *strides(dk, dv), **constants(q, k)
        )
        queries_kernel[lambda meta: (triton.cdiv(T, meta["BLOCK_Q"]), B * n_head)](
            q, k, v, d_out, dq, *common, *strides(dq), **constants(q, k)
        )
        return dq, dk, dv


def strides(*tensors):
    """The steps from one batch, head, position and dimension to the next, of each tensor."""
    return [step for tensor in tensors for step in tensor.stride()]


def sizes(q, k):
    """n_head, n_kv_head, T, S and the scale of the scores, in the order of the kernels."""
    return q.size(1), k.size(1), q.size(2), k.size(2), q.size(3) ** -0.5


def constants(q, k):
    """What a kernel is compiled for."""
    return {
        "HEAD_DIM": q.size(3),
        "BLOCK_D": triton.next_power_of_2(q.size(3)),  # Triton's blocks are powers of 2; the rest is masked
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # no TF32 for what asks for float32
        "LENGTH_CLASS": triton.next_power_of_2(k.size(2)),
    }


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, added up in float32. The interpreter's own product reads bfloat16 as integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load(
    at, step_row, step_dim, first, n_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows first … first + ROWS of the head that starts at `at`: (ROWS, BLOCK_D), 0 past the edges."""
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (row[:, None] < n_rows) & (dim[None, :] < HEAD_DIM)
    return tl.load(at + row[:, None] * step_row + dim[None, :] * step_dim, mask=inside, other=0.0)


@triton.jit
def store(
    at,
    x,
    step_row,
    step_dim,
    first,
    n_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The reverse of load: writes x (ROWS, BLOCK_D), in the type of what is there."""
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (row[:, None] < n_rows) & (dim[None, :] < HEAD_DIM)
    tl.store(at + row[:, None] * step_row + dim[None, :] * step_dim, x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def visible(first_q, first_k, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which keys of a block its queries see: (BLOCK_Q, BLOCK_K). Rows past T see all: they are not stored."""
    query = first_q + tl.arange(0, BLOCK_Q) + S - T
    key = first_k + tl.arange(0, BLOCK_K)
    return (key[None, :] <= query[:, None]) & (key[None, :] < S)


@triton.autotune(CONFIGS, key=KEY)
@triton.jit
def forward_kernel(
    q_at, k_at, v_at, out_at, log_sum_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    n_head, n_kv_head, T, S, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, LENGTH_CLASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 1: one block of queries of one head against the blocks of keys that it sees."""
    first_q = tl.program_id(0) * BLOCK_Q
    batch, head = (tl.program_id(1) // n_head).to(tl.int64), (tl.program_id(1) % n_head).to(tl.int64)
    kv_head = head // (n_head // n_kv_head)
    k_at += batch * k_b + kv_head * k_h
    v_at += batch * v_b + kv_head * v_h
    q = load(q_at + batch * q_b + head * q_h, q_t, q_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first_k in range(0, tl.minimum(first_q + BLOCK_Q + S - T, S), BLOCK_K):
        k = load(k_at, k_t, k_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load(v_at, v_t, v_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        s = tl.where(visible(first_q, first_k, T, S, BLOCK_Q, BLOCK_K), s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))  # finite: the first block has a key for every query
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = shrink * total + tl.sum(p, 1)
        o = shrink[:, None] * o + dot(p.to(v.dtype), v, PRECISION)
        highest = higher
    o = o / total[:, None]
    store(out_at + batch * o_b + head * o_h, o, o_t, o_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row = first_q + tl.arange(0, BLOCK_Q)
    log_sum_at += (batch * n_head + head) * T
    tl.store(log_sum_at + row, highest + tl.log2(total), mask=row < T)


@triton.autotune(CONFIGS, key=KEY)
@triton.jit
def keys_kernel(
    q_at, k_at, v_at, do_at, dk_at, dv_at, log_sum_at, delta_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    n_head, n_kv_head, T, S, scale,
    dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, LENGTH_CLASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, dk and dv: one block of keys against the queries of its group that see it."""
    first_k = tl.program_id(0) * BLOCK_K
    batch, kv_head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)
    group = n_head // n_kv_head
    k = load(k_at + batch * k_b + kv_head * k_h, k_t, k_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
    v = load(v_at + batch * v_b + kv_head * v_h, v_t, v_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = tl.maximum(first_k - (S - T), 0) // BLOCK_Q * BLOCK_Q  # the first queries to see the block
    for head in range(kv_head * group, (kv_head + 1) * group):
        head_q, head_do = q_at + batch * q_b + head * q_h, do_at + batch * o_b + head * o_h
        at = (batch * n_head + head) * T
        for first_q in range(start, T, BLOCK_Q):
            q = load(head_q, q_t, q_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
            do = load(head_do, o_t, o_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
            row = first_q + tl.arange(0, BLOCK_Q)
            log_sum = tl.load(log_sum_at + at + row, mask=row < T, other=float("inf"))  # makes p 0 past T
            delta = tl.load(delta_at + at + row, mask=row < T, other=0.0)
            s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            s = tl.where(visible(first_q, first_k, T, S, BLOCK_Q, BLOCK_K), s, float("-inf"))
            p = tl.exp2(s - log_sum[:, None])
            dv += dot(tl.trans(p.to(do.dtype)), do, PRECISION)
            dp = dot(do, tl.trans(v), PRECISION)
            ds = p * (dp - delta[:, None]) * scale
            dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
    store(dk_at + batch * dk_b + kv_head * dk_h, dk, dk_t, dk_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
    store(dv_at + batch * dv_b + kv_head * dv_h, dv, dv_t, dv_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)


@triton.autotune(CONFIGS, key=KEY)
@triton.jit
def queries_kernel(
    q_at, k_at, v_at, do_at, dq_at, log_sum_at, delta_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    n_head, n_kv_head, T, S, scale,
    dq_b, dq_h, dq_t, dq_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, LENGTH_CLASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, dq: one block of queries of one head against the blocks of keys that it sees."""
    first_q = tl.program_id(0) * BLOCK_Q
    batch, head = (tl.program_id(1) // n_head).to(tl.int64), (tl.program_id(1) % n_head).to(tl.int64)
    kv_head = head // (n_head // n_kv_head)
    k_at += batch * k_b + kv_head * k_h
    v_at += batch * v_b + kv_head * v_h
    q = load(q_at + batch * q_b + head * q_h, q_t, q_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    do = load(do_at + batch * o_b + head * o_h, o_t, o_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row = first_q + tl.arange(0, BLOCK_Q)
    at = (batch * n_head + head) * T
    log_sum = tl.load(log_sum_at + at + row, mask=row < T, other=float("inf"))
    delta = tl.load(delta_at + at + row, mask=row < T, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first_k in range(0, tl.minimum(first_q + BLOCK_Q + S - T, S), BLOCK_K):
        k = load(k_at, k_t, k_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load(v_at, v_t, v_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        s = tl.where(visible(first_q, first_k, T, S, BLOCK_Q, BLOCK_K), s, float("-inf"))
        p = tl.exp2(s - log_sum[:, None])
        dp = dot(do, tl.trans(v), PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        dq += dot(ds.to(k.dtype), k, PRECISION)
    store(dq_at + batch * dq_b + head * dq_h, dq, dq_t, dq_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
