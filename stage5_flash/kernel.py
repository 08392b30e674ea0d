"""FlashAttention-2 as Triton kernels: the algorithm of tiled.py, with one GPU program per block of queries.

Dao 2023, arXiv 2307.08691, Algorithms 1 and 2. The backward pass is two kernels, so that no two programs
write to the same memory: in one, each program owns a block of keys (dk and dv); in the other, a block of
queries (dq).

docs/gpu.md has their times on an H200. Without a GPU they run in Triton's interpreter: set TRITON_INTERPRET=1
before importing this file.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UPCAST = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)  # GPUs compute exp2 in hardware: exp(x) = exp2(x · log2(e))
# The autotuner times these block sizes and numbers of warps, and skips those that exceed the shared memory.
CONFIGS = [
    triton.Config({"BLOCK_Q": block_q, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_q, block_k, warps, stages in [
        (128, 64, 8, 3), (128, 64, 4, 2), (128, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2),
    ]
]  # fmt: skip
if INTERPRETED:
    CONFIGS = [triton.Config({"BLOCK_Q": 32, "BLOCK_K": 16})]
# Autotune again for each head dimension, precision and number of keys, the last rounded up to a power of 2.
KEY = ["BLOCK_D", "PRECISION", "LENGTH_CLASS"]


def triton_attention(q, k, v):
    """Computes softmax(q kᵀ / sqrt(head_dim) + causal mask) v and its gradients without the score matrix.

    q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim), 32-bit or 16-bit, on CUDA ->
    (B, n_head, T, head_dim). The causal mask is aligned to the lower right: the last query sees every key.
    Query head h reads key/value head h · n_kv_head // n_head. Raises ValueError if there are more queries
    than keys, or if head_dim is below 16 or above 128.
    """
    if q.size(2) > k.size(2):
        raise ValueError(f"{q.size(2)} queries but {k.size(2)} keys: the first queries would see no key")
    if not 16 <= q.size(3) <= 128:
        raise ValueError(f"head_dim must be from 16 to 128, not {q.size(3)}")
    return TritonAttention.apply(q, k, v)


class TritonAttention(torch.autograd.Function):
    """For the backward pass, saves the output and, per query, log2 of the softmax denominator."""

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
    """The strides of each tensor: batch, head, position, dimension."""
    return [stride for tensor in tensors for stride in tensor.stride()]


def sizes(q, k):
    """n_head, n_kv_head, T, S and the scale of the scores, in the order of the kernels' arguments."""
    return q.size(1), k.size(1), q.size(2), k.size(2), q.size(3) ** -0.5


def constants(q, k):
    """The compile-time constants of a kernel."""
    return {
        "HEAD_DIM": q.size(3),
        "BLOCK_D": triton.next_power_of_2(q.size(3)),  # Triton requires powers of 2; the excess is masked
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # do not use TF32 for float32 inputs
        "LENGTH_CLASS": triton.next_power_of_2(k.size(2)),
    }


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32. The interpreter needs the upcast: it misreads bfloat16 as integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load(
    ptr,
    stride_row,
    stride_dim,
    first,
    n_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loads ROWS rows, from row `first` on, of the head at `ptr`: (ROWS, BLOCK_D), 0 outside the head."""
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (row[:, None] < n_rows) & (dim[None, :] < HEAD_DIM)
    return tl.load(ptr + row[:, None] * stride_row + dim[None, :] * stride_dim, mask=inside, other=0.0)


@triton.jit
def store(
    ptr,
    x,
    stride_row,
    stride_dim,
    first,
    n_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores x (ROWS, BLOCK_D), converted to the dtype of `ptr`; the inverse of load."""
    row, dim = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (row[:, None] < n_rows) & (dim[None, :] < HEAD_DIM)
    tl.store(
        ptr + row[:, None] * stride_row + dim[None, :] * stride_dim, x.to(ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def visible(first_q, first_k, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The causal mask of a block: (BLOCK_Q, BLOCK_K). Rows past T see every key, but are never stored."""
    query = first_q + tl.arange(0, BLOCK_Q) + S - T
    key = first_k + tl.arange(0, BLOCK_K)
    return (key[None, :] <= query[:, None]) & (key[None, :] < S)


@triton.autotune(CONFIGS, key=KEY)
@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, log_sum_ptr,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    n_head, n_kv_head, T, S, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, LENGTH_CLASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 1: one block of queries of one head, over all blocks of keys that it sees."""
    first_q = tl.program_id(0) * BLOCK_Q
    batch, head = (tl.program_id(1) // n_head).to(tl.int64), (tl.program_id(1) % n_head).to(tl.int64)
    kv_head = head // (n_head // n_kv_head)
    k_ptr += batch * k_b + kv_head * k_h
    v_ptr += batch * v_b + kv_head * v_h
    q = load(q_ptr + batch * q_b + head * q_h, q_t, q_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first_k in range(0, tl.minimum(first_q + BLOCK_Q + S - T, S), BLOCK_K):
        k = load(k_ptr, k_t, k_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load(v_ptr, v_t, v_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        s = tl.where(visible(first_q, first_k, T, S, BLOCK_Q, BLOCK_K), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))  # finite: every query sees a key of the first block
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = rescale * row_sum + tl.sum(p, 1)
        o = rescale[:, None] * o + dot(p.to(v.dtype), v, PRECISION)
        row_max = new_max
    o = o / row_sum[:, None]
    store(out_ptr + batch * o_b + head * o_h, o, o_t, o_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row = first_q + tl.arange(0, BLOCK_Q)
    log_sum_ptr += (batch * n_head + head) * T
    tl.store(log_sum_ptr + row, row_max + tl.log2(row_sum), mask=row < T)


@triton.autotune(CONFIGS, key=KEY)
@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, log_sum_ptr, delta_ptr,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    n_head, n_kv_head, T, S, scale,
    dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, LENGTH_CLASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, dk and dv: one block of keys of one key/value head, over all queries that see it."""
    first_k = tl.program_id(0) * BLOCK_K
    batch, kv_head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)
    group = n_head // n_kv_head
    k = load(k_ptr + batch * k_b + kv_head * k_h, k_t, k_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
    v = load(v_ptr + batch * v_b + kv_head * v_h, v_t, v_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = tl.maximum(first_k - (S - T), 0) // BLOCK_Q * BLOCK_Q  # the first queries that see the block
    for head in range(kv_head * group, (kv_head + 1) * group):
        head_q, head_do = q_ptr + batch * q_b + head * q_h, do_ptr + batch * o_b + head * o_h
        offset = (batch * n_head + head) * T
        for first_q in range(start, T, BLOCK_Q):
            q = load(head_q, q_t, q_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
            do = load(head_do, o_t, o_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
            row = first_q + tl.arange(0, BLOCK_Q)
            # past T, a log_sum of infinity makes p 0
            log_sum = tl.load(log_sum_ptr + offset + row, mask=row < T, other=float("inf"))
            delta = tl.load(delta_ptr + offset + row, mask=row < T, other=0.0)
            s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            s = tl.where(visible(first_q, first_k, T, S, BLOCK_Q, BLOCK_K), s, float("-inf"))
            p = tl.exp2(s - log_sum[:, None])
            dv += dot(tl.trans(p.to(do.dtype)), do, PRECISION)
            dp = dot(do, tl.trans(v), PRECISION)
            ds = p * (dp - delta[:, None]) * scale
            dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
    store(dk_ptr + batch * dk_b + kv_head * dk_h, dk, dk_t, dk_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
    store(dv_ptr + batch * dv_b + kv_head * dv_h, dv, dv_t, dv_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)


@triton.autotune(CONFIGS, key=KEY)
@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, log_sum_ptr, delta_ptr,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    n_head, n_kv_head, T, S, scale,
    dq_b, dq_h, dq_t, dq_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, LENGTH_CLASS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, dq: one block of queries of one head, over all blocks of keys that it sees."""
    first_q = tl.program_id(0) * BLOCK_Q
    batch, head = (tl.program_id(1) // n_head).to(tl.int64), (tl.program_id(1) % n_head).to(tl.int64)
    kv_head = head // (n_head // n_kv_head)
    k_ptr += batch * k_b + kv_head * k_h
    v_ptr += batch * v_b + kv_head * v_h
    q = load(q_ptr + batch * q_b + head * q_h, q_t, q_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    do = load(do_ptr + batch * o_b + head * o_h, o_t, o_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row = first_q + tl.arange(0, BLOCK_Q)
    offset = (batch * n_head + head) * T
    log_sum = tl.load(log_sum_ptr + offset + row, mask=row < T, other=float("inf"))
    delta = tl.load(delta_ptr + offset + row, mask=row < T, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first_k in range(0, tl.minimum(first_q + BLOCK_Q + S - T, S), BLOCK_K):
        k = load(k_ptr, k_t, k_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = load(v_ptr, v_t, v_d, first_k, S, BLOCK_K, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        s = tl.where(visible(first_q, first_k, T, S, BLOCK_Q, BLOCK_K), s, float("-inf"))
        p = tl.exp2(s - log_sum[:, None])
        dp = dot(do, tl.trans(v), PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        dq += dot(ds.to(k.dtype), k, PRECISION)
    store(dq_ptr + batch * dq_b + head * dq_h, dq, dq_t, dq_d, first_q, T, BLOCK_Q, HEAD_DIM, BLOCK_D)
