"""Writes safetensors files tensor by tensor, reads them memory-mapped, and makes models without memory.

So a model needs its own size in memory once, and not again for the file's content or for random weights.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES |= {torch.bool: "BOOL"}
# torch aligns its own tensors to this many bytes. With another alignment, results differ in the last bits.
ALIGNMENT = 64


def write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    dtypes: dict[str, torch.dtype] | None = None,
) -> None:
    """Writes a safetensors file, and waits until it is on disk.

    dtypes: the dtype to convert a tensor to. Each tensor is converted and made contiguous when it is written;
    safetensors' own save_file needs all of them in that form at once.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()} | (dtypes or {})
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    # Those that keep the next one aligned come first.
    names = sorted(tensors, key=lambda name: (sizes[name] % ALIGNMENT > 0, -dtypes[name].itemsize, name))
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + sizes[name]
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(content(tensors[name], dtypes[name]))
        file.flush()
        os.fsync(file.fileno())


def content(tensor: torch.Tensor, dtype: torch.dtype):
    """The bytes of a tensor in a file, as a numpy array; not a copy if the tensor has them so."""
    return tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Those that it holds aligned are memory-mapped."""
    return {name: t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for name, t in load_file(path).items()}


class WithoutMemory(TorchFunctionMode):
    """A context in which parameters are made on the meta device: initializing them takes no time or memory.

    Modules make them with torch.empty. Any other tensor, such as a table that a model computes, is real.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)
