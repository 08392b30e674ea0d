"""FlashAttention-2 in plain PyTorch: causal attention whose score matrix never exists as a whole.

Dao 2023, arXiv 2307.08691: the forward pass is its Algorithm 1, the backward pass its Algorithm 2. To read,
and to check kernel.py against; a loop in Python is not fast.
"""

import torch
from torch.autograd.function import once_differentiable


def tiled_attention(q, k, v, block_q=64, block_k=64):
    """softmax(q kᵀ / sqrt(head_dim) + causal mask) v, block by block: memory grows with T + S, not T · S.

    q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim). The last
    query sees every key (lower-right alignment); query head h reads key/value head h · n_kv_head / n_head.
    Blocks are of block_q queries by block_k keys. Raises ValueError for more queries than keys.
    """
    if q.size(2) > k.size(2):
        raise ValueError(f"{q.size(2)} queries but {k.size(2)} keys: the first queries would see none")
    q = q.unflatten(1, (k.size(1), -1))  # (B, n_kv_head, group, T, head_dim)
    k, v = k.unsqueeze(2), v.unsqueeze(2)  # one head for its whole group
    return TiledAttention.apply(q, k, v, block_q, block_k).flatten(1, 2)


class TiledAttention(torch.autograd.Function):
    """Saves the output and, for each query, the logarithm of its softmax's denominator; no score."""

    @staticmethod
    def forward(ctx, q, k, v, block_q, block_k):
        precise = torch.promote_types(q.dtype, torch.float32)  # 16-bit sums would lose digits
        out = torch.empty_like(q)
        log_sum = torch.empty(q.shape[:-1], dtype=precise, device=q.device)
        for rows in blocks(0, q.size(-2), block_q):
            o = torch.zeros_like(q[..., rows, :], dtype=precise)
            total = torch.zeros_like(o[..., :1])  # sum of exp(score - highest) so far
            highest = torch.full_like(total, -torch.inf)  # of the scores so far
            for columns in visible_keys(rows, q, k, block_k):
                s = scores(q, k, rows, columns)
                higher = torch.maximum(highest, s.amax(-1, keepdim=True))
                p = torch.exp(s - higher)
                shrink = torch.exp(highest - higher)  # what was summed relative to a lower maximum
                total = shrink * total + p.sum(-1, keepdim=True)
                o = shrink * o + p @ v[..., columns, :].to(precise)
                highest = higher
            out[..., rows, :] = o / total
            log_sum[..., rows] = (highest + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks = block_q, block_k
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, log_sum = ctx.saved_tensors
        block_q, block_k = ctx.blocks
        precise = log_sum.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=precise) for x in (q, k, v))
        # Softmax's gradient needs the sum over keys of p · dp: the dot product of out and its gradient.
        delta = (d_out.to(precise) * out.to(precise)).sum(-1, keepdim=True)
        scale = q.size(-1) ** -0.5
        for rows in blocks(0, q.size(-2), block_q):
            d_o = d_out[..., rows, :].to(precise)
            for columns in visible_keys(rows, q, k, block_k):
                p = torch.exp(scores(q, k, rows, columns) - log_sum[..., rows, None])  # recomputed
                dp = d_o @ v[..., columns, :].to(precise).mT
                ds = p * (dp - delta[..., rows, :]) * scale
                dv[..., columns, :] += (p.mT @ d_o).sum(2, keepdim=True)  # over the heads of a group
                dk[..., columns, :] += (ds.mT @ q[..., rows, :].to(precise)).sum(2, keepdim=True)
                dq[..., rows, :] += ds @ k[..., columns, :].to(precise)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def blocks(start, end, size):
    """start … end in slices of `size`, the last one shorter where it does not divide."""
    return [slice(at, min(at + size, end)) for at in range(start, end, size)]


def visible_keys(rows, q, k, block_k):
    """The blocks of keys that any of these queries sees: those right of the diagonal cost nothing."""
    earlier = k.size(-2) - q.size(-2)  # keys from before the first query
    return blocks(0, rows.stop + earlier, block_k)


def scores(q, k, rows, columns):
    """Scores of a block (…, rows, columns); -inf where the key comes after the query."""
    precise = torch.promote_types(q.dtype, torch.float32)
    s = q[..., rows, :].to(precise) * q.size(-1) ** -0.5 @ k[..., columns, :].to(precise).mT
    earlier = k.size(-2) - q.size(-2)
    if columns.stop - 1 <= rows.start + earlier:  # all of the block is left of the diagonal
        return s
    query = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + earlier
    key = torch.arange(columns.start, columns.stop, device=q.device)
    return s.masked_fill(key > query, -torch.inf)
