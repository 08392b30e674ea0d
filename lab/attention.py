"""Selects the attention implementation of stages 5 and later: train.py --attention-kernel."""

import functools
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F

from lab.errors import UserError

Kernel = Literal["auto", "explicit", "sdpa", "tiled", "triton"]


def use(kernel: Kernel, stage: ModuleType, config, device: torch.device) -> None:
    """Makes the models of a stage compute attention with this kernel; auto: as the stage's code chooses.

    Raises UserError if the kernel does not support the stage, the model's sizes or the device.
    """
    if kernel == "auto":
        return
    if not hasattr(stage, "explicit_attention"):
        raise UserError(
            f"--attention-kernel {kernel} needs stage 5 or later: earlier stages have only one implementation"
        )
    if kernel == "explicit":
        stage.attention = stage.explicit_attention
    elif kernel == "sdpa":
        stage.attention = sdpa
    else:
        check_own_kernel(kernel, config, device)
        stage.attention = own_kernel(kernel, stage.attention)


def sdpa(q, k, v, mask, dropout):
    """PyTorch's scaled_dot_product_attention, even if the stage itself would choose another implementation.

    Shapes as in stage5_flash/model.py.
    """
    T, S = q.size(2), k.size(2)
    if mask is None and 1 < T < S:
        mask = torch.full((T, S), -torch.inf, device=q.device).triu(S - T + 1)
    is_causal = mask is None and T > 1
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=True)


def own_kernel(kernel: Kernel, otherwise):
    """stage5_flash/tiled.py or kernel.py as a stage's attention; `otherwise` handles calls with a mask."""
    if kernel == "triton":
        from stage5_flash.kernel import triton_attention as causal_attention
    else:
        from stage5_flash.tiled import tiled_attention

        causal_attention = functools.partial(tiled_attention, block_q=128, block_k=128)

    def attention(q, k, v, mask, dropout):
        if mask is not None:
            return otherwise(q, k, v, mask, dropout)
        return causal_attention(q, k, v)

    return attention


def check_own_kernel(kernel: Kernel, config, device: torch.device) -> None:
    """Raises UserError if tiled.py or kernel.py does not support the configuration or the device."""
    head_dim, value_dim = head_widths(config)
    if config.dropout:
        raise UserError(f"--attention-kernel {kernel} has no dropout: use --model.dropout 0")
    if head_dim != value_dim:
        raise UserError(
            f"--attention-kernel {kernel} needs queries and values of the same width; here they have "
            f"{head_dim} and {value_dim}"
        )
    if kernel == "triton" and device.type != "cuda":
        raise UserError(
            f"--attention-kernel triton needs CUDA, not {device.type}: use --attention-kernel tiled"
        )
    if kernel == "triton" and not 16 <= head_dim <= 128:
        raise UserError(
            f"--attention-kernel triton needs heads of 16 to 128 dimensions; here they have {head_dim}"
        )


def head_widths(config) -> tuple[int, int]:
    """The width of a head's queries and of its values."""
    if hasattr(config, "v_head_dim"):  # latent attention
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    head_dim = getattr(config, "head_dim", config.n_embd // config.n_head)
    return head_dim, head_dim
