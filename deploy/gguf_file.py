"""Reads GGUF, the file format of llama.cpp: metadata, then tensors (github.com/ggml-org/ggml, docs/gguf.md).

The package gguf has a reader too, but it trusts the file: a length that the file does not have makes it fill
the memory. Here every length is checked before it is used. The package converts quantized tensors to floats.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from lab import optional
from lab.errors import UserError, shown
from lab.storage import checkpoint

# The numbers in the metadata by type: format and size in bytes (7 is bool, 8 string, 9 array).
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8"}
NUMBERS |= {12: "<f8"}
STRING, ARRAY = 8, 9
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # not quantized


def package():
    """The package gguf."""
    return optional.load("gguf", extra="deploy", needed_for="a GGUF file")


@dataclass
class TensorInfo:
    """Where a tensor is in the file, and how it is stored."""

    kind: str
    """Name of its type: F32, Q4_0, …"""
    shape: tuple[int, ...]
    """As in PyTorch: (out, in)."""
    offset: int
    """Bytes from the start of the file."""


class Damaged(Exception):
    """The file's content contradicts the format."""


class Cursor:
    """Reads values from bytes one after the other. Raises Damaged at the end of the bytes."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def take(self, n_bytes: int) -> bytes:
        end = self.position + n_bytes
        if end > len(self.data):
            raise Damaged(f"it ends inside its header, at byte {len(self.data):,}")
        self.position, start = end, self.position
        return self.data[start:end]

    def integer(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return self.take(self.integer("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"a text before byte {self.position:,} is not UTF-8") from None

    def value(self):
        """A value of the metadata, with its type before it."""
        kind = self.integer("<I")
        if kind == ARRAY:
            kind, count = self.integer("<I"), self.integer("<Q")
            if kind == STRING:
                return [self.string() for _ in range(count)]  # stops at the end of the file
            return self.numbers(kind, count)
        return self.string() if kind == STRING else self.numbers(kind, 1)[0]

    def numbers(self, kind: int, count: int) -> list:
        if kind not in NUMBERS:
            raise Damaged(f"it has a value of type {kind}, which the format does not have")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


class GGUFFile:
    """The header of a GGUF file; `tensor` reads one tensor from it. Raises UserError for a damaged file."""

    def __init__(self, path: Path):
        self.path = path
        self.gguf = package()
        try:
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise UserError(f"{shown(path)} is not a GGUF file: it does not start with GGUF")
                self.size = path.stat().st_size
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._read_header(Cursor(data))
        except OSError as error:
            raise UserError(f"cannot read {shown(path)}: {error.strerror}") from None
        except Damaged as error:
            raise checkpoint.damaged(path, error) from None

    def _read_header(self, cursor: Cursor) -> None:
        cursor.take(4)
        version = cursor.integer("<I")
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise UserError(f"{shown(self.path)} is big-endian: only little-endian GGUF is read")
            raise UserError(f"{shown(self.path)} has version {version} of GGUF: only 2 and 3 are read")
        n_tensors, n_values = cursor.integer("<Q"), cursor.integer("<Q")
        self.metadata = {}
        for _ in range(n_values):  # a wrong number ends at the end of the file
            key = cursor.string()
            if key in self.metadata:
                raise Damaged(f"it has {key} twice")
            self.metadata[key] = cursor.value()
        n_files = self.metadata.get("split.count", 1)
        if n_files != 1:
            raise UserError(
                f"{shown(self.path)} is one of {n_files} parts of a model\n"
                "join them first: llama-gguf-split --merge FIRST_PART ONE_FILE"
            )
        self.tensors = {}
        for _ in range(n_tensors):
            name = cursor.string()
            if name in self.tensors:
                raise Damaged(f"it has the tensor {name} twice")
            self.tensors[name] = self._tensor_info(name, cursor)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise Damaged(f"general.alignment is {alignment!r}: it must be a power of two")
        start = -(-cursor.position // alignment) * alignment
        for name, info in self.tensors.items():
            info.offset += start
            if info.offset + self._n_bytes(info) > self.size:
                raise Damaged(f"{name} lies beyond its end, at byte {self.size:,}")

    def _tensor_info(self, name: str, cursor: Cursor) -> TensorInfo:
        n_dims = cursor.integer("<I")
        if not 1 <= n_dims <= 4:
            raise Damaged(f"{name} has {n_dims} dimensions")
        shape = tuple(cursor.integer("<Q") for _ in range(n_dims))[::-1]
        number, offset = cursor.integer("<I"), cursor.integer("<Q")
        try:
            kind = self.gguf.GGMLQuantizationType(number).name
        except ValueError:
            raise UserError(
                f"{shown(self.path)}: {name} has type number {number}, which is unknown"
            ) from None
        info = TensorInfo(kind, shape, offset)
        block, _ = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType[kind]]
        if 0 in shape or shape[-1] % block:
            raise Damaged(f"{name} is {shape}, which does not fit its type {kind}")
        return info

    def _n_bytes(self, info: TensorInfo) -> int:
        block, n_bytes = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType[info.kind]]
        return prod(info.shape) // block * n_bytes

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and content."""
        left, right = self.tensors[one], self.tensors[other]
        if (left.kind, left.shape) != (right.kind, right.shape):
            return False
        size = self._n_bytes(left)
        with open(self.path, "rb") as file:
            for start in range(0, size, 2**24):
                parts = []
                for info in (left, right):
                    file.seek(info.offset + start)
                    parts.append(file.read(min(2**24, size - start)))
                if parts[0] != parts[1]:
                    return False
        return True

    def tensor(self, name: str, first: int | None = None) -> torch.Tensor:
        """Reads a tensor, or its part `first` along the first dimension; quantized ones as float32."""
        info = self.tensors[name]
        shape, offset, n_bytes = info.shape, info.offset, self._n_bytes(info)
        if first is not None:
            n_bytes //= shape[0]
            shape, offset = shape[1:], offset + first * n_bytes
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = np.fromfile(file, np.uint8, n_bytes)
        if info.kind in FLOATS:
            return torch.from_numpy(data).view(FLOATS[info.kind]).view(shape)
        kind = self.gguf.GGMLQuantizationType[info.kind]
        rows = data.reshape(-1, n_bytes // prod(shape[:-1]))
        try:
            return torch.from_numpy(self.gguf.quants.dequantize(rows, kind)).view(shape)
        except NotImplementedError:
            raise UserError(
                f"{shown(self.path)}: {name} has type {info.kind}, which cannot be converted to floats"
            ) from None
