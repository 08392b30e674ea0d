"""FlashAttention-2 in plain PyTorch: causal attention that never stores the whole score matrix.

Dao 2023, arXiv 2307.08691: the forward pass is Algorithm 1, the backward pass Algorithm 2. This file is for
reading and for checking kernel.py; loops in Python are slow.
"""

import torch
from torch.autograd.function import once_differentiable


def tiled_attention(q, k, v, block_q=64, block_k=64):
    """Computes softmax(q kᵀ / sqrt(head_dim) + causal mask) v block by block.

    Memory grows with T + S, not with T · S. q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim)
    -> (B, n_head, T, head_dim). The causal mask is aligned to the lower right: the last query sees every key.
    Query head h reads key/value head h · n_kv_head // n_head. A block has block_q queries and block_k keys.
    Raises ValueError if there are more queries than keys.
    """
    if q.size(2) > k.size(2):
        raise ValueError(f"{q.size(2)} queries but {k.size(2)} keys: the first queries would see no key")
    q = q.unflatten(1, (k.size(1), -1))  # (B, n_kv_head, group, T, head_dim)
    k, v = k.unsqueeze(2), v.unsqueeze(2)  # (B, n_kv_head, 1, S, head_dim): broadcast over the group
    return TiledAttention.apply(q, k, v, block_q, block_k).flatten(1, 2)


class TiledAttention(torch.autograd.Function):
    """For the backward pass, saves the output and, per query, the log of the softmax denominator."""

    @staticmethod
    def forward(ctx, q, k, v, block_q, block_k):
        accum_dtype = torch.promote_types(q.dtype, torch.float32)  # 16-bit sums would lose precision
        out = torch.empty_like(q)
        log_sum = torch.empty(q.shape[:-1], dtype=accum_dtype, device=q.device)
        for rows in blocks(0, q.size(-2), block_q):
            o = torch.zeros_like(q[..., rows, :], dtype=accum_dtype)
            row_sum = torch.zeros_like(o[..., :1])  # running sum of exp(score - row_max)
            row_max = torch.full_like(row_sum, -torch.inf)  # running maximum of the scores
            for columns in visible_keys(rows, q, k, block_k):
                s = scores(q, k, rows, columns)
                new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
                p = torch.exp(s - new_max)
                rescale = torch.exp(row_max - new_max)  # rescales the sums so far to the new maximum
                row_sum = rescale * row_sum + p.sum(-1, keepdim=True)
                o = rescale * o + p @ v[..., columns, :].to(accum_dtype)
                row_max = new_max
            out[..., rows, :] = o / row_sum
            log_sum[..., rows] = (row_max + row_sum.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks = block_q, block_k
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, log_sum = ctx.saved_tensors
        block_q, block_k = ctx.blocks
        accum_dtype = log_sum.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=accum_dtype) for x in (q, k, v))
        # The softmax gradient needs the sum of p · dp over the keys, which equals out · d_out.
        delta = (d_out.to(accum_dtype) * out.to(accum_dtype)).sum(-1, keepdim=True)
        scale = q.size(-1) ** -0.5
        for rows in blocks(0, q.size(-2), block_q):
            d_o = d_out[..., rows, :].to(accum_dtype)
            for columns in visible_keys(rows, q, k, block_k):
                p = torch.exp(scores(q, k, rows, columns) - log_sum[..., rows, None])  # recomputed
                dp = d_o @ v[..., columns, :].to(accum_dtype).mT
                ds = p * (dp - delta[..., rows, :]) * scale
                dv[..., columns, :] += (p.mT @ d_o).sum(2, keepdim=True)  # sum over the heads of the group
                dk[..., columns, :] += (ds.mT @ q[..., rows, :].to(accum_dtype)).sum(2, keepdim=True)
                dq[..., rows, :] += ds @ k[..., columns, :].to(accum_dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def blocks(start, end, size):
    """Splits the range from start to end into slices of `size`; the last one may be shorter."""
    return [slice(first, min(first + size, end)) for first in range(start, end, size)]


def visible_keys(rows, q, k, block_k):
    """The blocks of keys that these queries see; blocks entirely right of the diagonal are skipped."""
    n_past = k.size(-2) - q.size(-2)  # number of keys before the first query
    return blocks(0, rows.stop + n_past, block_k)


def scores(q, k, rows, columns):
    """The scores of a block (…, rows, columns), with -inf where the key comes after the query."""
    accum_dtype = torch.promote_types(q.dtype, torch.float32)
    s = q[..., rows, :].to(accum_dtype) * q.size(-1) ** -0.5 @ k[..., columns, :].to(accum_dtype).mT
    n_past = k.size(-2) - q.size(-2)
    if columns.stop - 1 <= rows.start + n_past:  # the whole block is left of the diagonal: nothing to mask
        return s
    query = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + n_past
    key = torch.arange(columns.start, columns.stop, device=q.device)
    return s.masked_fill(key > query, -torch.inf)
