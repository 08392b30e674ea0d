"""Modules that compute with quantized weights. They replace a model's own modules; its code stays as it is.

A module stores packed codes, scales and zeros, and computes in one of two ways:

- In bfloat16 and for few tokens at a time, torch's 4-bit kernel (on a CPU or CUDA) or 8-bit kernel (on a CPU)
  multiplies by the codes themselves. Decoding is bound by reading the weights, so it becomes faster the fewer
  bytes they have. The kernels want the codes in an order of their own: `prepare` makes it.
- Otherwise the weights are dequantized for each product. That costs time, but with many tokens the product
  itself takes longer, and the result is exactly that of the dequantized weights.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from deploy.quantization.grid import Quantized, by_column, in_groups, pack, unpack

# The kernels, and the most rows (tokens) for which they are faster than dequantizing: measured on a CPU with
# AVX512 and 576 x 1536 weights. From there on they are slower, in proportion to the rows. With 8 bits there
# is a third way in between, see int8_product.
KERNEL_ROWS = {"int4 on cpu": 64, "int8 on cpu": 64, "int4 on cuda": 64}
INT8_KERNEL_ROWS = 8
KERNEL_GROUPS = (128, 64, 32)  # group sizes of the 4-bit kernel
ROWS_AT_ONCE = 4096  # a large vocabulary's head is dequantized in parts


class Packed(nn.Module):
    """The codes of a matrix, or of one per expert: packed (…, out, bytes), scale and zero (…, out, groups).

    The scale is a parameter, so it has the dtype of the model: `model.to(dtype)` and `runs.load` convert it.
    """

    def __init__(self, shape: tuple, bits: int, group_size: int | None):
        super().__init__()
        *stack, n_out, n_in = shape
        n_groups = -(-n_in // group_size) if group_size else 1
        self.shape, self.bits, self.group_size = torch.Size(shape), bits, group_size
        self.register_buffer("packed", torch.empty(*stack, n_out, -(-n_in // 8) * bits, dtype=torch.uint8))
        self.register_buffer("zero", torch.empty(*stack, n_out, n_groups, dtype=torch.uint8))
        self.scale = nn.Parameter(torch.empty(*stack, n_out, n_groups), requires_grad=False)

    def fill(self, parts: list[Quantized]):
        """Takes over the codes of a matrix, or of one for each expert."""
        packed, zero, scale = (
            torch.stack(each).view(like.shape)
            for each, like in (
                ([pack(q.codes, q.bits) for q in parts], self.packed),
                ([q.zero for q in parts], self.zero),
                ([q.scale for q in parts], self.scale),
            )
        )
        self.packed, self.zero = packed, zero.to(torch.uint8)
        self.scale.data = scale.to(self.scale.dtype)
        return self

    def quantized(self, *expert: int) -> Quantized:
        """The matrix, or that of one expert, as codes on a grid."""
        codes = self.codes(slice(None), *expert)
        return Quantized(codes, self.scale[expert].data, self.zero[expert], self.bits, self.group_size)

    def codes(self, rows: slice | torch.Tensor, *expert: int) -> torch.Tensor:
        """The codes of some rows (rows, in)."""
        return unpack(self.packed[expert][rows], self.bits, self.shape[-1])

    def dense(self, dtype: torch.dtype, *expert: int) -> torch.Tensor:
        """The weights (out, in), dequantized. In dtype: the exact products, rounded once."""
        zero, scale = self.zero[expert], self.scale[expert].to(dtype)
        weight = torch.empty(self.shape[-2:], dtype=dtype, device=zero.device)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            # Differences up to 255 are exact in 16 bits.
            groups = in_groups(self.codes(rows, *expert).to(dtype), self.group_size)
            groups = (groups - zero[rows].to(dtype).unsqueeze(-1)) * scale[rows].unsqueeze(-1)
            weight[rows] = groups.flatten(1)[:, : self.shape[-1]]
        return weight

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some rows of the matrix, dequantized: indices (…) -> (…, in)."""
        at = indices.flatten()
        codes = self.codes(at)
        zero, scale = (
            by_column(each[at], self.shape[-1], self.group_size) for each in (self.zero, self.scale)
        )
        return ((codes.to(scale.dtype) - zero.to(scale.dtype)) * scale).view(*indices.shape, -1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Scales are saved in bfloat16, which holds them exactly (see grid.find_grid)."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is None:  # only the kernel's copy is in memory
            destination[prefix + "packed"] = pack(self.codes(slice(None)), self.bits)
        destination[prefix + "scale"] = destination[prefix + "scale"].bfloat16()


def int8_product(x, codes, scales):
    """x Wᵀ of x (rows, in) and W = codes (out, in) * scales (out,).

    For more than a few rows, the codes are converted, which is exact, and the product is scaled. That takes a
    tenth of the time of dequantizing a large head: its weights are never written to memory as a whole.
    """
    if len(x) <= INT8_KERNEL_ROWS:
        return torch.ops.aten._weight_int8pack_mm(x, codes, scales)
    y = x.new_empty(len(x), len(codes))
    for start in range(0, len(codes), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        torch.mul(F.linear(x, codes[part].to(x.dtype)), scales[part], out=y[:, part])
    return y


def kernels_of(device: torch.device) -> str | None:
    """Whose kernels compute with codes on this device: "cpu", "cuda" (Ampere and later), or None."""
    if device.type == "cuda" and torch.version.cuda is not None:  # else it is ROCm, which we have not tried
        return "cuda" if torch.cuda.get_device_capability(device) >= (8, 0) else None
    return "cpu" if device.type == "cpu" else None


def pack_for_cuda(codes: torch.Tensor) -> torch.Tensor:
    """Codes (out, in) in the order of the tensor cores. Widths are multiples of 32.

    The kernel reads 2, 4 or 8 tiles of 16 columns at a time: the more, the faster.
    """
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    tiles = next(n for n in (8, 4, 2) if codes.size(1) % (16 * n) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)


class QuantizedLinear(Packed):
    """Stands in for an nn.Linear: y = x Wᵀ + bias, for x (…, in)."""

    def __init__(self, q: Quantized, bias: torch.Tensor | None = None):
        super().__init__(tuple(q.codes.shape), q.bits, q.group_size)
        self.out_features, self.in_features = self.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.kernel, self.is_embedding = None, False
        self.keeps_weight, self.kept_weight = False, None
        if not q.codes.is_meta:
            self.fill([q])

    def forward(self, x):
        n_rows = x.numel() // max(1, x.size(-1))
        suits = self.kernel is not None and x.dtype == torch.bfloat16 and x.device == self.kernel[1].device
        if suits and n_rows <= KERNEL_ROWS[self.kernel[0]]:
            y = self.kernel_product(x.reshape(-1, x.size(-1))).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense(x.dtype), bias)

    def codes(self, rows: slice | torch.Tensor, *expert: int) -> torch.Tensor:
        """The codes of some rows: those stored, or else those of the kernel's copy."""
        if self.packed is not None:
            return super().codes(rows)
        name, codes, _, _, width = self.kernel
        if name == "int8 on cpu":
            codes = codes[rows].view(torch.uint8) ^ 128
        else:  # in blocks of 64 rows: a byte has a code of row i and of row i + 32
            first, last, _ = rows.indices(self.out_features)  # rows begin with a block
            pairs = codes.view(-1, width, 32)[first // 64 : -(-last // 64)]  # (blocks, in, 32)
            codes = torch.cat((pairs & 15, pairs >> 4), -1).transpose(1, 2).reshape(-1, width)
            codes = codes[: last - first]
            if self.bits < 4:
                codes = codes + by_column(self.zero[rows], width, self.group_size) - 8
        return codes[:, : self.in_features].to(self.zero.device)

    def kernel_product(self, x):
        """x Wᵀ of x (rows, in), computed from the codes."""
        name, codes, scales, group_size, width = self.kernel
        if width != self.in_features:
            x = F.pad(x, (0, width - self.in_features))
        if name == "int8 on cpu":
            return int8_product(x, codes, scales)
        if name == "int4 on cuda":
            y = torch.ops.aten._weight_int4pack_mm(x.contiguous(), codes, group_size, scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group_size, scales)
        return y[:, : self.out_features]

    def prepare(self) -> None:
        """Makes the kernel's copy of the codes, where there is a kernel for them.

        The stored codes are then dropped, if they can be read from the copy: its order is the processor's. On
        CUDA they are kept.
        """
        device = self.scale.device
        if self.packed is None and self.kernel[1].device != device:  # the model was moved
            self.packed = pack(self.codes(slice(None)), self.bits)
        if self.packed is None or self.scale.dtype != torch.bfloat16 or kernels_of(device) is None:
            return
        self.kernel = self.make_kernel()
        if self.kernel is None or self.kernel[0] == "int4 on cuda":
            return
        if self.is_embedding and self.kernel[0] != "int8 on cpu":  # rows are looked up
            return
        packed, stored, self.packed = self.packed, self.codes(slice(None)), None
        if self.kernel[1].numel() % 32 or not torch.equal(self.codes(slice(None)), stored):
            self.packed = packed

    def make_kernel(self) -> tuple | None:
        """What kernel_product needs: (name, codes, scales, group size, width); None without a kernel.

        The 4-bit kernels want groups of 32, 64, 128 or 256 and a multiple of 16 rows (CUDA: 8). They are
        padded, the rows to blocks of 64.
        It computes (code - 8) * scale + offset, with an offset in bfloat16. Codes of 2 and 3 bits are moved
        so that 8 is their zero, and the offset is 0. The 8-bit kernel has one scale for each row and no
        zero (groups of 8-bit codes are always dequantized), and reads columns in blocks of 32.
        """
        codes, scale, zero, bits, group_size = self.quantized()
        where = kernels_of(codes.device)
        if bits == 8:
            if where == "cpu" and group_size is None and bool((zero == 128).all()):
                codes = F.pad((codes ^ 128).view(torch.int8), (0, -self.in_features % 32))  # code - 128
                return "int8 on cpu", codes, scale.view(-1), None, codes.size(1)
            return None
        # The kernel's groups: those of the grid, or parts of them that all have the same scale.
        size = next((each for each in KERNEL_GROUPS if (group_size or each) % each == 0), None)
        if size is None:
            return None
        n_groups = -(-self.in_features // size)
        repeats = group_size // size if group_size else n_groups
        pad_rows = -self.out_features % 64
        if bits < 4:
            codes = codes + 8 - by_column(zero, self.in_features, group_size)  # from 1 to 15
            zero = torch.full_like(zero, 8)
        codes = F.pad(codes, (0, n_groups * size - self.in_features, 0, pad_rows)).int()
        offset = (8 - zero.float()) * scale.float()
        both = torch.stack((scale, offset.bfloat16()), -1)  # (out, groups, 2)
        both = both.repeat_interleave(repeats, 1)[:, :n_groups]
        both = F.pad(both, (0, 0, 0, 0, 0, pad_rows)).transpose(0, 1).contiguous()  # (groups, out, 2)
        if where == "cuda":
            packed = pack_for_cuda(codes)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return f"int4 on {where}", packed, both, size, codes.size(1)

    @property
    def weight(self) -> torch.Tensor:
        """The weights, dequantized in the dtype of the model, for code that reads them.

        With keeps_weight, they stay in memory.
        """
        if not self.keeps_weight:
            return self.dense(self.scale.dtype)
        if self.kept_weight is None or self.kept_weight.dtype != self.scale.dtype:
            self.kept_weight = self.dense(self.scale.dtype)
        return self.kept_weight


class QuantizedEmbedding(nn.Module):
    """Stands in for an nn.Embedding that shares its weights with a quantized head: looks tokens up in it."""

    def __init__(self, head: QuantizedLinear):
        super().__init__()
        self.heads = (head,)  # in a tuple, so that the head's tensors are not counted and saved twice

    def forward(self, idx):
        return self.heads[0].rows(idx)


class QuantizedExperts(nn.Module):
    """Stands in for a stage's routed experts, of which it dequantizes only those that some token has chosen.

    The stage's own code computes with them.
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.compute = type(experts).forward
        for name, parameter in experts.named_parameters():
            setattr(self, name, parameter)

    def forward(self, x, weights, indices):
        chosen, indices = indices.unique(return_inverse=True)
        stacks = {}
        for name in (*self._parameters, *self._modules):
            stack = getattr(self, name)
            if isinstance(stack, Packed):
                stacks[name] = torch.stack([stack.dense(x.dtype, expert) for expert in chosen.tolist()])
            else:
                stacks[name] = stack[chosen]
        return self.compute(SimpleNamespace(**stacks), x, weights, indices)


def replace(model: nn.Module, quantized: dict[str, Quantized | list[Quantized]]) -> None:
    """Puts quantized modules in the places of a model's own.

    A key is the name of an nn.Linear, such as "model.layers.0.self_attn.q_proj", or of a stacked parameter,
    such as "model.layers.0.mlp.experts.down_proj", whose value is a list: one Quantized for each expert. A
    tied "lm_head" stays tied: the embedding then reads the same codes.
    """
    for name, q in quantized.items():
        if isinstance(q, list):
            put_stack(model, name, (len(q), *q[0].codes.shape), q[0].bits, q[0].group_size).fill(q)
        else:
            put_linear(model, name, q)
    prepare(model)


def put_linear(model: nn.Module, name: str, q: Quantized) -> None:
    """Replaces one nn.Linear."""
    parent, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    module = QuantizedLinear(q, getattr(parent, own).bias)
    module.scale.data = module.scale.data.to(getattr(parent, own).weight.dtype)
    module.keeps_weight = own == "kv_b_proj"  # absorbed attention reads its weights at every step
    if name == "lm_head" and model.config.tie_word_embeddings:
        model.model["embed_tokens"], module.is_embedding = QuantizedEmbedding(module), True
    setattr(parent, own, module)


def put_stack(model: nn.Module, name: str, shape: tuple, bits: int, group_size: int | None) -> Packed:
    """Replaces one stacked parameter of a module of experts; returns what replaced it, still empty."""
    at, own = name.rpartition(".")[0], name.rpartition(".")[2]
    experts = model.get_submodule(at)
    if not isinstance(experts, QuantizedExperts):
        experts = QuantizedExperts(experts)
        setattr(model.get_submodule(at.rpartition(".")[0]), at.rpartition(".")[2], experts)
    stack = Packed(shape, bits, group_size)
    stack.scale.data = stack.scale.data.to(getattr(experts, own).dtype)
    delattr(experts, own)
    setattr(experts, own, stack)
    return stack


def prepare(model: nn.Module) -> None:
    """Prepares a model's kernels. Call it again when the model's device or dtype has changed."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.prepare()
