"""Quantized runs on disk. A quantized run is a run folder like any other, except that

- config.json has "quantization": {"method": …, "grids": [{"bits", "group_size", "modules": [names]}, …], …},
- the weights of such a module NAME are in model.safetensors as NAME.packed (codes, see grid.pack), NAME.scale
  and NAME.zero,
- it cannot be trained: it has no optimizer, and codes have no gradient.
"""

from pathlib import Path

import torch

from data.tokenizers import HF_CONFIG, copy_side_files
from deploy.quantization import linear
from deploy.quantization.grid import BITS, Quantized
from lab.errors import UserError, shown
from lab.storage import checkpoint, runs


def save(folder: Path, source: Path, model: torch.nn.Module, about: dict, name: str = "best") -> None:
    """Writes a quantized model into `folder`, which exists and is empty.

    source: the run that it was made from, and name its checkpoint. about: what config.json is to say beside
    the grids, such as {"method": "gptq", "calibration_tokens": …}.
    """
    config = runs.read_config(source)
    runs.refuse_quantized(source, config, "quantized again")
    found = checkpoint.find(source, runs.existing(source, name))
    dtype = model.model.norm.weight.dtype
    config |= {
        "quantization": {"source": str(source.resolve()), **about, "grids": grids(model)},
        "weights_dtype": str(dtype).removeprefix("torch."),
    }
    metadata = checkpoint.metadata(found)
    metadata.pop("val_loss", None)  # that of the unquantized weights
    checkpoint.save(folder, "last", model, metadata)
    copy_side_files(source, folder, HF_CONFIG)
    runs.write_json(folder / "meta.json", runs.read_meta(source))
    runs.write_json(folder / "config.json", config)


def grids(model: torch.nn.Module) -> list[dict]:
    """The names of the quantized modules, by their bits and group size."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, linear.Packed):
            found.setdefault((module.bits, module.group_size), []).append(name)
    return [{"bits": bits, "group_size": size, "modules": names} for (bits, size), names in found.items()]


def make_room(run: Path, config: dict, model: torch.nn.Module) -> None:
    """Puts empty quantized modules into a model without memory, for the weights of a quantized run.

    Raises UserError if config.json does not fit the model.
    """
    path = shown(run / "config.json")
    try:
        listed = [
            (name, grid["bits"], grid["group_size"])
            for grid in config["quantization"]["grids"]
            for name in grid["modules"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its quantization has no {error}") from None
    with torch.device("meta"):
        for name, bits, size in listed:
            if bits not in BITS or not (size is None or (isinstance(size, int) and size > 0)):
                raise UserError(f"{path} is damaged: {name} has {bits} bits in groups of {size}")
            try:
                parent, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                module = getattr(parent, own)
            except AttributeError:
                raise UserError(f"{path} has a quantized {name}, but the model has none") from None
            if isinstance(module, torch.nn.Parameter):
                linear.put_stack(model, name, tuple(module.shape), bits, size)
            else:
                codes = torch.empty(module.weight.shape, dtype=torch.uint8)
                linear.put_linear(model, name, Quantized(codes, None, None, bits, size))
