"""Exports a run for other programs: python -m deploy.export --run runs/… --to hf --out DIR

--to hf: a folder that stock transformers loads. pipeline("text-generation", DIR) continues a prompt with the
same text as `sample.py --temperature 0`, up to the context length. (Beyond it, sample.py slides its window
and transformers stops.) Stage 0 becomes GPT2LMHeadModel, stages 3 to 5 and llama3 LlamaForCausalLM, stage 6
with the softmax router and without shared experts MixtralForCausalLM, deepseek_v2 DeepseekV2ForCausalLM,
stages 7a, 7 and deepseek_v3 DeepseekV3ForCausalLM, mistral MistralForCausalLM, qwen2 Qwen2ForCausalLM,
qwen3 Qwen3ForCausalLM, qwen3_moe (also with that router and without shared experts) Qwen3MoeForCausalLM, and
gpt_neox GPTNeoXForCausalLM. An imported run, or one fine-tuned from it, gets back its tokenizer's files, its
generation_config.json and the ids of its special tokens, and its chat template. Transformers honours these:
it may sample. Both stop at an end-of-text token, if the run has one; transformers may print it.

--to gguf: one file for llama.cpp, --out NAME.gguf. --outtype is the type of its matrices. Stage 0 becomes
the architecture gpt2; stages 3 to 5, llama3 and mistral become llama; stage 6 becomes llama with experts or,
with the sigmoid router or shared experts, glm4moe; deepseek_v3 with a latent for the queries becomes
deepseek2; and the other models of family/ become their namesakes. See deploy/gguf_write.py.

A quantized run keeps its codes, scales and zeros in both: --to hf writes the format compressed-tensors
(pack-quantized; transformers needs pip install compressed-tensors), and --to gguf blocks of Q4_1, Q4_0
or Q8_0. See deploy/quantization/export.py for what these cannot hold.

--to llama2c: model.bin and tokenizer.bin for the C program `run` of karpathy/llama2.c. That program puts a
newline and a space before every prompt; see deploy/llama2c.py.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from data.tokenizers import HF_CONFIG, end_tokens, read_object
from deploy import (
    architectures,
    deepseek,
    deepseek_v2,
    gguf_write,
    gpt2,
    gpt_neox,
    llama,
    llama2c,
    mistral,
    mixtral,
    qwen,
    qwen_moe,
    tokenizer_json,
)
from deploy.output import new_file, new_folder
from deploy.quantization import export as quantized
from lab import cli, device
from lab.errors import UserError, shown
from lab.storage import checkpoint, runs, tensors

COUNTERPARTS = {
    "stage0_gpt": gpt2,
    "stage3_swiglu": llama,
    "stage4_gqa": llama,
    "stage5_flash": llama,
    "stage6_moe": mixtral,
    "stage7a_mla": deepseek,
    "stage7_mla_mtp": deepseek,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek,
    "gpt_neox": gpt_neox,
    "llama3": llama,
    "mistral": mistral,
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen3_moe": qwen_moe,
}

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # exported as they were imported


@dataclass
class Settings:
    """Exports a run for transformers, llama.cpp or llama2.c."""

    run: str
    """Folder of the run."""
    to: Literal["hf", "gguf", "llama2c"]
    """hf: a folder for transformers. gguf: a file for llama.cpp. llama2c: model.bin and tokenizer.bin for
    llama2.c's `run`, which puts a newline and a space before every prompt."""
    out: str
    """Folder to create; with --to gguf, file to create, NAME.gguf."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to export: best (lowest validation loss) or last."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the exported weights; auto: that of the run. llama2c always has float32."""
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"] = "auto"
    """The same with --to gguf, where it may be quantized."""

    def __post_init__(self):
        if self.to == "gguf" and self.dtype != "auto":
            raise ValueError("--to gguf takes --outtype instead of --dtype")
        if self.to != "gguf" and self.outtype != "auto":
            raise ValueError(f"--outtype goes with --to gguf, not with --to {self.to}")


@device.memory_errors(
    "export needs about the memory of the weights: close other programs, or use a larger machine"
)
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    run, out = Path(settings.run), Path(settings.out)
    config, meta = runs.read_config(run), runs.read_meta(run)
    runs.warn_of_edits(run, config)
    stage = architectures.of_run(run, config)
    if settings.to == "hf" and stage not in COUNTERPARTS:
        raise UserError(
            f"{stage} has no counterpart in transformers\nexport stage 0 (GPT2LMHeadModel), 3, 4, 5 "
            "(LlamaForCausalLM), 6 (MixtralForCausalLM), 7a, 7 or a model of family/"
        )
    if settings.to == "gguf":
        write_gguf(settings, run, out, stage, config, meta)
        return
    if settings.to == "llama2c":
        runs.refuse_quantized(run, config, "exported to llama2.c, which has float32 only")
    if settings.to == "hf" and "quantization" in config and COUNTERPARTS[stage] is gpt2:
        runs.refuse_quantized(run, config, "exported to transformers: its GPT-2 has no linear layers to pack")
    with new_folder(out, run) as folder:
        stored = runs.weights_dtype(run, config)
        dtype = stored if settings.dtype == "auto" else getattr(torch, settings.dtype)
        model, _ = runs.load(run, settings.checkpoint, torch.device("cpu"), dtype)
        grids = config["quantization"]["grids"] if "quantization" in config else None
        weights = quantized.words(model, "compressed-tensors") if grids else checkpoint.weights(model)
        sizes = asdict(model.config)
        if settings.to == "hf":
            write_hf(folder, COUNTERPARTS[stage], weights, sizes, meta, run, dtype, grids)
            use = f'transformers.pipeline("text-generation", "{shown(out)}")'
        else:
            llama2c.write(folder, stage, weights, sizes, meta)
            use = f'./run {shown(out)}/model.bin -z {shown(out)}/tokenizer.bin -t 0 -n 0 -i "…"'
        names = sorted(path.name for path in folder.iterdir())
    print(f"exported {stage} from {shown(run)} to {shown(out)}: {', '.join(names)}")
    if settings.to == "hf" and COUNTERPARTS[stage] in (deepseek, deepseek_v2):
        print("RoPE rotates adjacent dimensions, as in DeepSeek's files (rope_interleave = true), not halves")
    if settings.to == "llama2c":
        before = llama2c.before_prompt(runs.tokenizer(run))
        print(f"llama2.c's run puts {before!r} before every prompt and continues both together")
    print(f"to use it: {use}")


def write_gguf(settings: Settings, run: Path, out: Path, stage: str, config: dict, meta: dict) -> None:
    """Writes a file for llama.cpp."""
    if stage not in COUNTERPARTS:
        raise UserError(
            f"llama.cpp cannot run {stage}: it has no architecture with {gguf_write.NO_COUNTERPART[stage]}\n"
            "export stage 0, 3, 4, 5 or 6, or a model of family/"
        )
    if out.suffix != ".gguf":
        raise UserError(
            f"{shown(out)} does not end in .gguf\nname the file to create: --out {shown(out)}.gguf"
        )
    if "quantization" in config and settings.outtype != "auto":
        raise UserError(
            f"{shown(run)} is quantized, and is exported with its own codes: leave --outtype out\n"
            "or export the run that it was made from"
        )
    with new_file(out, run) as path:
        model, _ = runs.load(run, settings.checkpoint, torch.device("cpu"))
        is_quantized, sizes = "quantization" in config, asdict(model.config)
        tensors = quantized.words(model, "GGUF") if is_quantized else checkpoint.weights(model)
        kind = settings.outtype
        if kind == "auto":
            kind = gguf_write.OUTTYPES[config.get("weights_dtype", "float32")]
        kind = gguf_write.write(path, COUNTERPARTS[stage], tensors, sizes, meta, run, kind)
    print(f"exported {stage} from {shown(run)} to {shown(out)} as {kind}")
    print(f"to use it: llama-cli -m {shown(out)}")


def write_hf(
    folder: Path,
    counterpart,
    weights: dict,
    sizes: dict,
    meta: dict,
    run: Path,
    dtype: torch.dtype,
    grids: list[dict] | None = None,
) -> None:
    """Writes a folder for transformers. counterpart is a module such as llama; dtype is the weights'.

    grids: those of a quantized run, whose weights are words (see deploy/quantization/export.py).
    """
    tokenizer = runs.tokenizer(run)
    imported = read_object(run / HF_CONFIG)  # empty if the run was not imported
    config = counterpart.to_config(sizes) | {"dtype": str(dtype).removeprefix("torch.")}
    if imported:
        for key in TOKEN_IDS:
            config.pop(key, None)  # a missing field means the default of the model's class
        config |= {key: imported[key] for key in TOKEN_IDS if key in imported}
    theirs = counterpart.to_tensors(weights, sizes)
    if grids:
        theirs, config["quantization_config"] = quantized.compress(theirs, grids, dtype)
    tensors.write(folder / "model.safetensors", theirs, {"format": "pt"})
    tokenizer_json.write(meta, run, folder, sizes["block_size"])
    if imported and imported["model_type"] != config["model_type"]:
        tokenizer_json.unbind(folder)
    # Greedy decoding within the context, unless the imported generation_config.json says otherwise.
    generation = read_object(run / "generation_config.json")
    if not generation:
        generation = {"do_sample": False, "max_length": sizes["block_size"]}
        generation |= {key: imported[key] for key in TOKEN_IDS if key in imported}
        ends = end_tokens(run, meta, tokenizer)
        if ends and not imported:
            generation["eos_token_id"] = min(ends)  # our own have one at most: stop where sample.py does
    # Never generate ids that only pad the vocabulary.
    padding = range(tokenizer.vocab_size, sizes["vocab_size"])
    if padding:
        generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or []), *padding})
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        runs.write_json(folder / name, content)


if __name__ == "__main__":
    cli.run(main)
