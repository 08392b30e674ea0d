"""The grid of quantized weights, their packing, the modules that compute with them, and their files."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call

import sample
import train
from deploy.quantization import linear, storage
from deploy.quantization.grid import BITS, Quantized, dequantize, find_grid, pack, to_codes, unpack
from deploy.quantization.linear import QuantizedLinear, prepare, replace
from lab import stages
from lab.comparison import overview
from lab.errors import UserError
from lab.storage import checkpoint, edits, runs, tensors

CPU = torch.device("cpu")


def quantized(weight, bits, group_size, **options):
    """The weight rounded to its nearest codes."""
    scale, zero = find_grid(weight, bits, group_size, **options)
    return Quantized(to_codes(weight, scale, zero, bits, group_size), scale, zero, bits, group_size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 43, 64])
def test_packed_codes_come_back_bit_for_bit(bits, width):
    codes = torch.randint(0, 2**bits, (5, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-width // 8) * bits)
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_moves_no_weight_by_more_than_half_a_step(bits, group_size, symmetric):
    """Also in a ragged last group. Half a step more at the ends: the zero and the scale are rounded too."""
    weight = torch.randn(16, 172) * 0.02 + 0.01
    q = quantized(weight, bits, group_size, symmetric=symmetric)
    assert q.scale.shape == q.zero.shape == (16, 1 if group_size is None else -(-172 // group_size))
    steps = (dequantize(q) - weight).abs() / q.scale.repeat_interleave(group_size or 172, 1)[:, :172]
    assert steps.max() <= 1.1
    assert (steps <= 0.5 + 1e-4).float().mean() > 0.85
    assert torch.equal(q.scale, q.scale.bfloat16().float())
    assert q.zero.min() >= 0 and q.zero.max() < 2**bits and torch.equal(q.zero, q.zero.round())


@pytest.mark.parametrize("bits", BITS)
def test_values_on_the_grid_are_kept_exactly(bits):
    """Quantizing what has been dequantized gives the same codes, and zero weights stay zero."""
    weight = torch.randn(8, 96)
    weight[3] = 0
    weight[:, 10] = 0
    q = quantized(weight, bits, 32)
    again = to_codes(dequantize(q), q.scale, q.zero, bits, 32)
    assert torch.equal(again, q.codes)
    assert not dequantize(q)[3].any() and not dequantize(q)[:, 10].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_of_one_sign_keeps_its_range(sign):
    weight = sign * (torch.rand(4, 64) + 0.5)
    q = quantized(weight, 4, 64)
    assert (dequantize(q) - weight).abs().max() <= 0.6 * q.scale.max()


def test_shrinking_clips_the_range():
    weight = torch.randn(4, 64)
    clipped = dequantize(quantized(weight, 8, 64, shrink=0.5))
    assert clipped.abs().amax(1).sub(0.5 * weight.abs().amax(1)).abs().max() < 0.05


def near(a, b, tolerance):
    """Whether two tensors differ by at most this part of the larger one's norm."""
    return (a.float() - b.float()).norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize(
    "bits, group_size", [(2, 32), (3, 64), (4, 32), (4, 64), (4, 256), (4, None), (8, None)]
)
@pytest.mark.parametrize("shape", [(48, 128), (43, 344), (7, 20)])
def test_the_kernel_gives_what_the_dequantized_weights_give(bits, group_size, shape):
    """For widths that are no multiple of the group, and heights that are no multiple of 16, too."""
    q = quantized(torch.randn(shape), bits, group_size)
    module, x = QuantizedLinear(q, torch.randn(shape[0]).bfloat16()).bfloat16(), torch.randn(2, 3, shape[1])
    assert torch.equal(module.weight, dequantize(q).bfloat16())
    exact = F.linear(x.bfloat16().float(), dequantize(q), module.bias.float())
    slow = module(x.bfloat16())
    module.prepare()
    assert module.kernel is not None
    fast = module(x.bfloat16())
    assert fast.shape == (2, 3, shape[0]) and fast.dtype == torch.bfloat16
    assert near(slow, exact, 0.005) and near(fast, exact, 0.008)
    some = torch.randn(16, shape[1]).bfloat16()  # in 8 bits, computed in another way than few
    assert near(module(some), F.linear(some.float(), dequantize(q), module.bias.float()), 0.008)
    many = torch.randn(100, shape[1]).bfloat16()
    assert torch.equal(module(many), F.linear(many, module.weight, module.bias))


@pytest.mark.parametrize("width", [32, 64, 128, 344, 576])
def test_codes_for_cuda_are_pairs_of_neighbours_and_as_many_tiles_as_divide_the_row(width, monkeypatch):
    """Of each byte, the high half is the first column: that is what torch's kernel for CUDA documents."""
    packed = []
    monkeypatch.setattr(
        torch.ops.aten, "_convert_weight_to_int4pack", lambda pairs, tiles: packed.append((pairs, tiles))
    )
    width += -width % 32
    codes = torch.randint(0, 16, (8, width), dtype=torch.int32)
    linear.pack_for_cuda(codes)
    pairs, tiles = packed[0]
    assert torch.equal(torch.stack((pairs >> 4, pairs & 15), -1).flatten(1).int(), codes)
    assert width % (16 * tiles) == 0 and (tiles == 8 or width % (32 * tiles))


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 32), (4, 256), (4, None)])
@pytest.mark.parametrize("shape", [(43, 344), (7, 20), (576, 64)])
def test_the_kernel_for_cuda_is_given_what_it_multiplies_by(bits, group_size, shape, monkeypatch):
    """Without a GPU: what the kernel documents, (code - 8) * scale + offset, is computed here."""

    def product(x, pairs, size, scales):
        assert x.is_contiguous() and x.dtype == scales.dtype == torch.bfloat16
        assert size in (32, 64, 128, 256) and x.size(1) % size == 0 and len(pairs) % 8 == 0
        assert scales.shape == (x.size(1) // size, len(pairs), 2)
        codes = torch.stack((pairs >> 4, pairs & 15), -1).view(len(pairs), -1, size).float()
        scale, offset = scales.transpose(0, 1).float().unsqueeze(-2).unbind(-1)
        return (x.float() @ ((codes - 8) * scale + offset).flatten(1).T).bfloat16()

    monkeypatch.setattr(linear, "kernels_of", lambda device: "cuda")
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda pairs, tiles: pairs)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", product)
    q = quantized(torch.randn(shape), bits, group_size)
    module, x = QuantizedLinear(q, torch.randn(shape[0]).bfloat16()).bfloat16(), torch.randn(shape[1], 6)
    module.prepare()
    x = x.bfloat16().T.unsqueeze(0)  # not contiguous
    assert module.kernel[0] == "int4 on cuda"
    exact = F.linear(x.float(), dequantize(q), module.bias.float())
    assert near(module(x), exact, 0.008) and module(x).shape == (1, 6, shape[0])
    assert torch.equal(module.codes(slice(None)), q.codes)  # these stay: the kernel's order is not read back


@pytest.mark.parametrize(
    "device, version, capability, kernels",
    [
        ("cuda", "13.0", (8, 0), "cuda"),
        ("cuda", "13.0", (7, 5), None),  # Turing: the kernel would return without an error or a result
        ("cuda", None, (9, 4), None),  # ROCm
        ("cpu", None, None, "cpu"),
        ("mps", None, None, None),
    ],
)
def test_a_device_without_a_kernel_dequantizes(device, version, capability, kernels, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert linear.kernels_of(torch.device(device)) == kernels


def test_in_float32_the_result_is_exactly_that_of_the_dequantized_weights():
    q = quantized(torch.randn(24, 40), 3, 32)
    x = torch.randn(2, 40)
    assert torch.equal(QuantizedLinear(q)(x), F.linear(x, dequantize(q)))


def rounded(model, bits, group_size, head=False, **options):
    """All projections of a model's blocks, rounded to their nearest codes: an argument of `replace`."""
    found = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            found[name] = quantized(module.weight.detach(), bits, group_size, **options)
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                found[f"{name}.{own}"] = [
                    quantized(each.detach(), bits, group_size, **options) for each in parameter
                ]
    if head:
        found["lm_head"] = quantized(model.lm_head.weight.detach(), 8, None)
    return found


def with_dense_weights(model, found):
    """The same model with dequantized weights in its own modules."""
    for name, q in found.items():
        parent, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(q, list):
            getattr(parent, own).data = torch.stack([dequantize(each) for each in q])
        elif name == "lm_head":
            parent.lm_head.weight.data = dequantize(q)  # the embedding's too, if they are tied
        else:
            getattr(parent, own).weight.data = dequantize(q)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_model_computes_with_the_dequantized_weights(make_model, dtype):
    """With and without a cache; in bfloat16 the cached steps use the kernels."""
    model = make_model()
    found = rounded(model, 4, 32, head=True)
    dense = with_dense_weights(make_model(), found)
    idx = torch.randint(0, 65, (2, 9))
    expected = dense(idx)[0]
    replace(model, found)
    model.to(dtype)
    prepare(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert near(model(idx)[0], expected, tolerance)
    cache = model.new_cache(2, 9)
    steps = [model(part, cache=cache)[0] for part in idx.split([5, 1, 2, 1], dim=1)]
    assert near(torch.cat(steps, dim=1), expected, tolerance)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(stage): the folder of a tiny untrained run of the stage, whose vocabulary is all of ASCII."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            folder = made[name] = tmp_path_factory.mktemp("runs") / name
            stage = stages.load(name)
            sizes = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
            model = stage.GPT(stage.GPTConfig(**sizes))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
            characters = "\n" + "".join(map(chr, range(33, 97)))
            meta = {"tokenizer": "char", "characters": characters, "vocab_size": 65, "name": "ascii"}
            config = {"format": 2, "stage": name, "code": edits.code_hash(name), "dataset": "ascii"}
            config |= {"settings": {"data": "ascii", "seed": 0}, "model": asdict(model.config)}
            folder.mkdir()
            checkpoint.save(folder, "last", model, {"stage": name, "step": "0"})
            runs.write_json(folder / "meta.json", meta)
            runs.write_json(folder / "config.json", config)
        return made[name]

    return make


@pytest.fixture
def quantized_run(trained, tmp_path):
    """quantized_run(stage, bits, group_size, head): a quantized copy of a tiny run of the stage."""

    def make(name, bits=4, group_size=32, head=False, dtype=None):
        source, folder = trained(name), tmp_path / f"{name}-{bits}"
        model, _ = runs.load(source, "last", CPU, dtype)
        replace(model, rounded(model, bits, group_size, head))
        folder.mkdir()
        storage.save(folder, source, model, {"method": "rtn"})
        return folder, model

    return make


@torch.inference_mode()
@pytest.mark.parametrize("name", ["stage0_gpt", "stage4_gqa", "stage6_moe", "stage7_mla_mtp", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_quantized_run_loads_like_any_other(quantized_run, name, dtype):
    folder, saved = quantized_run(name, 3, 32, head=True)
    loaded, config = runs.load(folder, "best", CPU, dtype)
    idx = torch.randint(0, 65, (1, 12))
    prepare(saved.to(dtype))
    assert torch.equal(loaded(idx)[0], saved(idx)[0])
    assert {grid["bits"] for grid in config["quantization"]["grids"]} == {3, 8}
    assert [
        key for key, tensor in saved.state_dict().items() if not torch.equal(tensor, loaded.state_dict()[key])
    ] == []


@torch.inference_mode()
def test_a_run_loaded_as_it_is_stored_has_one_dtype(quantized_run):
    """Its scales are stored in bfloat16, but absorbed attention multiplies float32 by its weights."""
    folder, _ = quantized_run("stage7_mla_mtp")
    model, _ = runs.load(folder, "last", CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    cache = model.new_cache(1, 9)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    assert model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)[0].dtype == torch.float32


@pytest.mark.parametrize("bits", BITS)
def test_a_model_whose_codes_only_the_kernels_have_is_saved_too(quantized_run, bits):
    """And no module holds its codes twice where the kernel's order is known: on CPUs with AVX512."""
    exact, _ = quantized_run("stage4_gqa", bits, None, head=True)
    exact = tensors.read(exact.rename(exact.with_name("exact")) / "last" / "model.safetensors")
    folder, model = quantized_run("stage4_gqa", bits, None, head=True, dtype=torch.bfloat16)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert all(m.packed is None for m in model.modules() if isinstance(m, QuantizedLinear))
    found = tensors.read(folder / "last" / "model.safetensors")
    packed = [name for name in exact if name.endswith(".packed")]
    model, _ = runs.load(folder, "last", CPU)
    assert len(packed) == 15 and set(exact) == set(found)
    for name in packed:
        module = model.get_submodule(name.removesuffix(".packed"))
        assert torch.equal(unpack(found[name], module.bits, module.in_features), module.codes(slice(None)))
        assert found[name].shape == exact[name].shape


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="codes are read from the file"
)
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_loaded_model_keeps_no_page_of_its_file_in_memory(quantized_run):
    """One tensor that is memory-mapped would keep those of all codes, beside the kernels' copies."""
    folder, saved = quantized_run("stage4_gqa", head=True, dtype=torch.bfloat16)
    model, _ = runs.load(folder, "last", CPU, torch.bfloat16)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    idx = torch.zeros(1, 4, dtype=torch.int64)
    assert torch.equal(model(idx)[0], saved(idx)[0])


def test_a_large_matrix_is_dequantized_in_parts(monkeypatch):
    monkeypatch.setattr(linear, "ROWS_AT_ONCE", 64)
    q, bias, x = quantized(torch.randn(200, 32), 4, 32), torch.randn(200), torch.randn(3, 5, 32)
    module, made, part = QuantizedLinear(q, bias), [], linear.Packed.dense_part

    def counted(self, rows, *rest):
        made.append(part(self, rows, *rest))
        return made[-1]

    monkeypatch.setattr(linear.Packed, "dense_part", counted)
    torch.testing.assert_close(module(x), F.linear(x, dequantize(q), bias))
    assert [len(each) for each in made] == [64, 64, 64, 8]


def test_scales_are_stored_in_16_bits_and_codes_packed(quantized_run):
    folder, _ = quantized_run("stage4_gqa", 4, 32)
    held = tensors.read(folder / "last" / "model.safetensors")
    q_proj = {key.rpartition(".")[2]: held[key] for key in held if "layers.0.self_attn.q_proj" in key}
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in q_proj.items()} == {
        "packed": (torch.uint8, (32, 16)),
        "scale": (torch.bfloat16, (32, 1)),
        "zero": (torch.uint8, (32, 1)),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [[], ["--draft"]])
def test_sample_continues_a_prompt_with_a_quantized_run(quantized_run, monkeypatch, capsys, dtype, flags):
    folder, _ = quantized_run("stage7_mla_mtp")
    options = ["--max-new-tokens", 20, "--temperature", 0, "--dtype", dtype, *flags]
    assert call(monkeypatch, sample, "--run", folder, "--prompt", "HELLO", *options) == 0
    assert len(capsys.readouterr().out) == len("HELLO") + 20 + 1


def test_a_quantized_run_is_not_compiled(quantized_run, monkeypatch, capsys):
    """inductor gave stage 6 numbers that are none, and compiled for minutes."""
    folder, _ = quantized_run("stage0_gpt")
    assert call(monkeypatch, sample, "--run", folder, "--compile") == 2
    assert "is quantized, and --compile cannot compile that" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--init-from"], ["--resume", "--out"]])
def test_a_quantized_run_is_not_trained(quantized_run, monkeypatch, capsys, flags):
    folder, _ = quantized_run("stage0_gpt")
    assert call(monkeypatch, train, *flags, folder) == 2
    error = capsys.readouterr().err
    assert "is quantized: it cannot be trained" in error and error.count("\n") == 2


def test_the_list_of_runs_says_how_a_run_is_quantized(quantized_run):
    folder, _ = quantized_run("stage0_gpt", head=True)
    assert overview.row(folder)[3:5] == ["rtn, 4 and 8 bits", "–"]


def test_a_quantized_run_is_not_quantized_again(quantized_run, tmp_path):
    folder, model = quantized_run("stage0_gpt")
    with pytest.raises(UserError, match="cannot be quantized again"):
        storage.save(tmp_path / "again", folder, model, {})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"modules": ["model.layers.7.mlp.c_fc"]}, "the model has none"),
        ({"bits": 5}, "has 5 bits"),
        ({"group_size": 0}, "in groups of 0"),
        ({"bits": 2}, "does not fit this model"),
        ({"modules": 3}, "is damaged"),
    ],
)
def test_a_config_that_does_not_fit_the_file_is_refused(quantized_run, change, said):
    folder, _ = quantized_run("stage0_gpt")
    config = runs.read_config(folder)
    config["quantization"]["grids"][0] |= change
    runs.write_json(folder / "config.json", config)
    with pytest.raises(UserError, match=said):
        runs.load(folder, "best", CPU)
