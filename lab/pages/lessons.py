"""Updates the generated parts of the front page, the lessons and docs/: python -m lab.pages.lessons

The diff from the previous stage goes between `<!-- diff -->` and `<!-- end -->`, a table of measurements
(results/results.json) between `<!-- table -->` and `<!-- end -->`, and so on. A test fails if a page is not
up to date.
"""

import json
import re
from pathlib import Path

from exercises import chapters
from lab import formats, stages
from lab.comparison import diffs, markdown, report
from lab.pages import scale

RESULTS = stages.ROOT / "results" / "results.json"
IDEAS = stages.ROOT / "results" / "ideas"


def read_results() -> dict:
    """The measurements so far; empty before the first one."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    formats.check(results, formats.RESULTS, str(RESULTS))
    return results


def ladder(names: list[str], results: dict) -> str:
    """The table of these stages, with a column for each measurement."""
    return report.ladder({name: results["stages"].get(name, {}) for name in names})


def short_ladder(results: dict) -> str:
    """The table of all stages for the front page: what changes, lines, loss and speed, with links."""
    rows = []
    for name in stages.course():
        row = results["stages"][name]
        loss = report.noise(row, "val_loss") + report.with_std(row["val_loss"], 3)
        speed = "training_tokens_per_second"
        speed = report.noise(row, speed) + f"{row[speed]['median']:,.0f}"
        link = f"[{stages.label(name)}]({stages.path(name).parent.name}/README.md)"
        rows.append([link, report.IDEAS[name], row["lines_changed"], loss, speed])
    heads = ["stage", "what changes", "lines", "validation loss", "training tokens/s"]
    return markdown.table(heads, rows)


def nanogpt(measured: dict) -> str:
    """The table that compares our stage with nanoGPT."""
    speed, sampling = (
        measured["training_tokens_per_second"],
        measured["sampling_tokens_per_second_at_context_256"],
    )
    loss, memory = measured["val_loss_after_2000_steps"], measured["peak_memory_mib"]
    step = measured["muon_step"]
    speeds = {
        "training tokens/s": speed,
        "training tokens/s, both compiled": speed["compiled"],
        "sampling tokens/s, context 256": sampling,
        "sampling tokens/s, context 256, ours with `--compile`": sampling["compiled"],
    }
    rows = [
        [what, f"{row['nanogpt']:,.0f}", f"{row['ours']:,.0f}", f"{row['ratio']:.2f}"]
        for what, row in speeds.items()
    ]
    for name, ratio in measured.get("training_ratio_by_stage", {}).items():
        if name != measured["stage"]:
            rows.append([f"training tokens/s, our stage {stages.number(name)}", "", "", f"{ratio:.2f}"])
    rows += raced(measured["seconds_to_nanogpts_loss"])
    what = f"ms of our stage {stages.number(step['stage'])}'s step, with AdamW and with Muon"
    rows.append([what, f"{step['adamw']:.0f}", f"{step['muon']:.0f}", f"{step['ratio']:.2f}"])
    what = "validation loss, 2000 steps, all of val"
    rows.append([what, f"{loss['nanogpt']:.3f}", f"{loss['ours']:.3f}", ""])
    what, ratio = "peak memory of the training process, MiB", memory["ours"] / memory["nanogpt"]
    rows.append([what, f"{memory['nanogpt']:,.0f}", f"{memory['ours']:,.0f}", f"{ratio:.2f}"])
    return markdown.table(["", "nanoGPT", "ours", "ratio"], rows)


def raced(measured: dict) -> list[list[str]]:
    """Rows with the seconds that each of our configurations takes to reach nanoGPT's final loss."""
    rows = []
    for way, row in measured["ours"].items():
        reached = row["seconds"] is not None
        ours = [f"{row['seconds']:.0f}", f"{row['ratio']:.2f}"] if reached else ["not reached", ""]
        what = f"seconds to nanoGPT's final loss, our stage {stages.number(measured['stage'])}, {way}"
        rows.append([what, f"{measured['nanogpt']:.0f}", *ours])
    return rows


def rates(results: dict) -> str:
    """The table of final losses by learning rate, for the stages that were tuned."""
    tuned = {name: row["tuned"]["tried"] for name, row in results["stages"].items() if "tuned" in row}
    tried = sorted({rate for row in tuned.values() for rate in row}, key=float)
    rows = []
    for name, row in tuned.items():
        losses = {rate: f"{loss['mean']:.3f}" for rate, loss in row.items()}
        best = min(row, key=lambda rate: row[rate]["mean"])
        losses[best] = f"**{losses[best]}**"
        rows.append([stages.label(name), *(losses.get(rate, "") for rate in tried)])
    return markdown.table(["stage", *tried], rows)


def crossover(measured: dict) -> str:
    """The table of SDPA's time relative to naive attention, by context."""
    contexts = list(measured["float32"])
    rows = ([dtype, *(f"{ratio:.2f}" for ratio in ratios.values())] for dtype, ratios in measured.items())
    return markdown.table(["context", *contexts], rows)


def balancing(measured: dict) -> str:
    """The table of methods that balance experts."""
    rows = []
    for name, way in measured.items():
        loss = report.with_std(way["val_loss"], 3)
        rows.append([name, loss, f"{way['busiest_expert']:.0%}", f"{way['router_entropy']:.2f}"])
    heads = ["", "val loss", "busiest expert's share", "entropy of the scores (nats)"]
    return markdown.table(heads, rows)


def speeds(measured: dict) -> str:
    """The table of one speed relative to others, with a column for each precision."""
    rows = []
    for name in next(iter(measured.values())):
        values = (f"{by_name[name]:.2f}×" for by_name in measured.values())
        rows.append([name.replace("_", " "), *values])
    return markdown.table(["", *measured], rows)


def caches(results: dict) -> str:
    """The table of cache bytes per token, for the stages that change them."""
    sizes = {
        name: results["stages"][name]["cache_bytes_per_token"]
        for name in ("stage3_swiglu", "stage4_gqa", "stage7a_mla")
    }
    largest = max(sizes.values())
    rows = ([stages.label(name), f"{size:,.0f}", f"{size / largest:.3f}"] for name, size in sizes.items())
    return markdown.table(["stage", "bytes", "relative"], rows)


def mla_training(measured: dict) -> str:
    """The table of training speed relative to stage 6."""
    rows = ([name, f"{ratio:.2f}×"] for name, ratio in measured.items())
    return markdown.table(["", "of stage 6's tokens/s"], rows)


def transformers(measured: dict) -> str:
    """The table that compares sampling with transformers."""
    rows = []
    for name, row in measured.items():
        speeds = (f"{row[f'{way}_tokens_per_second']:,.0f}" for way in ("ours", "compiled", "theirs"))
        rows.append([name, *speeds, f"{row['ratio']:.2f}", f"{row['compiled_ratio']:.2f}"])
    speeds = ["ours, tokens/s", "with `--compile`", "transformers, tokens/s"]
    return markdown.table(["stage", *speeds, "ratio", "with `--compile`"], rows)


def step_profile(measured: dict) -> str:
    """The table of where a training step's time goes, a column for each stage."""
    of = measured["stages"]
    rows = [["milliseconds", *(f"{one['milliseconds']:.0f}" for one in of.values())]]
    rows.append(["operations of torch", *(f"{one['operations']:,.0f}" for one in of.values())])
    for kind in next(iter(of.values()))["shares"]:
        rows.append([kind, *(f"{one['shares'][kind]:.0%}" for one in of.values())])
    return markdown.table(["", *map(stages.label, of)], rows)


def compiled_sampling(measured: dict) -> str:
    """The table of whole calls of sample.py, with --compile and without."""
    rows = []
    for call in measured["calls"]:
        times = [f"{seconds:.1f}" for seconds in call["seconds"].values()]
        of_it = call["of_the_time_without"]
        ratios = [f"{of_it[start]:.2f}" for start in ("first start", "later start")]
        first = call["first_token_seconds"]["later start"]
        rows.append([call["stage"], f"{call['tokens']:,}", *times, *ratios, f"{first:.1f}"])
    heads = ["stage", "tokens", "without, s", "first start, s", "later start, s", "first / without"]
    heads += ["later / without", "a later start's first token, s"]
    return markdown.table(heads, rows)


def pretrained(measured: dict) -> str:
    """The table of a pretrained model's speed beside transformers and llama.cpp."""
    rows = []
    for prompt in measured["prompts"]:
        for one in prompt["programs"]:
            name = one["program"].replace("fp32", "float32").replace("bf16", "bfloat16").replace(" ", ", ", 1)
            ratio = f"{one['of_transformers']:.2f}" if "of_transformers" in one else ""
            speeds = [f"{one['prefill_seconds']:.2f}", f"{one['tokens_per_second']:.1f}", ratio]
            rows.append([name, prompt["prompt"], *speeds, f"{one['share']:.0%}"])
    heads = ["program", "prompt", "prefill, s", "tokens/s", "of transformers'", "of the memory's speed"]
    return markdown.table(heads, rows)


def side_by_side(results: dict) -> str:
    """The table of our speed beside the other programs', one row for each setting."""
    nanogpt, stock = results["against_nanogpt"], results["against_transformers"]["stages"]
    training = nanogpt["training_tokens_per_second"]
    sampling = nanogpt["sampling_tokens_per_second_at_context_256"]
    prompt = results["pretrained"]["prompts"][0]
    decoding = {one["program"]: one["tokens_per_second"] for one in prompt["programs"]}
    answers = results["serving"]["tokens_per_second"]
    served = {name: answers[name]["mix"]["median"] for name in answers if "mix" in answers[name]}
    alone = {name: answers[name]["alone"]["median"] for name in answers if "alone" in answers[name]}
    small, large, server = "stage 0, 0.8 M", "SmolLM2, 135 M", "SmolLM2, serving"
    # what, then the tokens/s of: ours, nanoGPT, transformers, llama.cpp, vLLM
    rows = [
        [f"{small}: training", training["ours"], training["nanogpt"]],
        [f"{small}: training, compiled", training["compiled"]["ours"], training["compiled"]["nanogpt"]],
        [
            f"{small}: decoding",
            sampling["ours"],
            sampling["nanogpt"],
            stock["stage0_gpt"]["theirs_tokens_per_second"],
        ],
        [f"{small}: decoding, `--compile`", sampling["compiled"]["ours"]],
        [f"{large}: decoding, float32", decoding["ours fp32"], None, decoding["transformers fp32"]],
        [
            f"{large}: decoding, 16 bits",
            decoding["ours bf16"],
            None,
            decoding["transformers bf16"],
            decoding.get("llama.cpp F16"),
        ],
        [f"{large}: decoding, 4 bits", decoding.get("ours int4"), None, None, decoding.get("llama.cpp Q4_1")],
        [
            f"{server}: one request",
            alone["this engine"],
            None,
            alone["transformers, padded batches"],
            None,
            alone.get("vLLM"),
        ],
        [
            f"{server}: 16 at a time",
            served["this engine"],
            None,
            served["transformers, continuous batching"],
            None,
            served.get("vLLM"),
        ],
    ]
    rows = [
        [what, *(f"{speed:,.0f}" if speed else "" for speed in (speeds + [None] * 5)[:5])]
        for what, *speeds in rows
    ]
    return markdown.table(["tokens/s", "ours", "nanoGPT", "transformers", "llama.cpp", "vLLM"], rows)


def serving(measured: dict) -> str:
    """The table of the serving engine's throughput beside others."""
    kinds = {
        "mix": f"{measured['requests']} requests, {measured['slots']} at a time",
        "alone": "one request",
        "shared": "prompts that share 512 tokens",
    }
    rows = []
    for name, speeds in measured["tokens_per_second"].items():
        rows.append([name, *(f"{speeds[kind]['median']:.1f}" if kind in speeds else "" for kind in kinds)])
    return markdown.table(["output tokens/s", *kinds.values()], rows)


def serving_waste(measured: dict) -> str:
    """The table of cache memory that is held and stores no token."""
    return markdown.table(["the cache", "waste"], [[name, f"{part:.1%}"] for name, part in measured.items()])


def read_idea(idea: str) -> dict:
    """What results/ideas/<idea>.json holds."""
    path = IDEAS / f"{idea}.json"
    measured = json.loads(path.read_text())
    formats.check(measured, formats.RESULTS, str(path))
    return measured


def where_it_pays(idea: str) -> str:
    """The picture (if any) and the table of results/ideas/<idea>.json, for a page one folder down."""
    measured = read_idea(idea)
    table = markdown.table(measured["table"]["heads"], measured["table"]["rows"])
    if not measured["picture"]:
        return table
    return "\n".join(
        (
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="../results/ideas/{idea}-dark.png">',
            f'  <img alt="{measured["picture"]}" src="../results/ideas/{idea}.png">',
            "</picture>",
            "",
            table,
        )
    )


def filled(page: str, name: str, results: dict) -> str:
    """The page with its generated parts updated; name as in `pages`."""
    parts = generated_parts(name, results)
    for part, content in parts.items():
        page = re.sub(
            rf"<!-- {part} -->\n.*?<!-- end -->",
            lambda match, part=part, content=content: f"<!-- {part} -->\n{content}\n<!-- end -->",
            page,
            flags=re.DOTALL,
        )
    return re.sub(
        r"<!-- pays ([\w-]+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- pays {match[1]} -->\n{where_it_pays(match[1])}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def exercises_of(file: str) -> str:
    """The table of a chapter's exercises, and the command that starts them."""
    (chapter,) = [each for each in chapters.CHAPTERS if each.name == file]
    rows = [[each.number, each.title, each.minutes] for each in chapter.exercises]
    if chapter.whole:
        rows.append([chapter.number, chapter.whole.title, chapter.whole.minutes])
    command = f"Write it yourself: `python exercise.py start {chapter.number}`, then `check`"
    more = "([how the exercises work](../{}exercises/README.md))."
    return "\n".join(
        (
            f"{command} {more.format('' if file.startswith('stage') else '../')}",
            "",
            markdown.table(["exercise", "what to write", "minutes"], rows),
        )
    )


def generated_parts(name: str, results: dict) -> dict[str, str]:
    """The generated parts of a page, by marker."""
    if name == "front":
        return {"ladder": short_ladder(results), "rates": rates(results)}
    if name == "scale":
        return scale.tables(results)
    if name == "benchmarks":
        parts = {
            "table": ladder(stages.course(), results),
            "nanogpt": nanogpt(results["against_nanogpt"]),
            "transformers": transformers(results["against_transformers"]["stages"]),
        }
        if "step_profile" in results:
            parts["step_profile"] = step_profile(results["step_profile"])
        if "compiled_sampling" in results:
            parts["compiled_sampling"] = compiled_sampling(results["compiled_sampling"])
        if "pretrained" in results:
            parts |= {"pretrained": pretrained(results["pretrained"]), "programs": side_by_side(results)}
        return parts
    if name == "serving":
        return {
            "throughput": serving(results["serving"]),
            "waste": serving_waste(results["serving"]["waste"]),
            "exercises": exercises_of("serving"),
        }
    if name == "quantization":
        return {"exercises": exercises_of("quantization")}
    parts = of_stage(name, results)
    if name in stages.COURSE:
        parts["exercises"] = exercises_of(name.partition("_")[0])
    if name == "stage5_flash":
        parts["crossover"] = crossover(results["attention"]["crossover"])
    if name == "stage6_moe":
        parts["balancing"] = balancing(results["moe"]["balancing"])
        parts["speeds"] = speeds(results["moe"]["speeds"])
    if name == "stage7_mla_mtp":  # its lesson has two stages
        parts |= {f"{part}7a": content for part, content in of_stage("stage7a_mla", results).items()}
        parts["caches"] = caches(results)
        parts["training"] = mla_training(results["mla"]["training"])
    return parts


def of_stage(name: str, results: dict) -> dict[str, str]:
    """The diff from the previous stage and, in the course, the rows of both in the ladder."""
    before, parts = diffs.origin(name), {}
    if name in stages.COURSE:
        parts["table"] = ladder([stage for stage in (before, name) if stage], results)
    if before:
        parts["diff"] = f"```diff\n{diffs.diff(name)}```"
    return parts


def pages() -> dict[Path, str]:
    """Every page with generated parts, and its name in `filled`: for a lesson, its stage."""
    found = {stages.ROOT / "README.md": "front"}
    found |= {stages.ROOT / "docs" / f"{name}.md": name for name in ("scale", "benchmarks")}
    found |= {stages.ROOT / "deploy" / name / "README.md": name for name in ("quantization", "serving")}
    for name in stages.names():
        file = stages.path(name)
        if file.name == "model.py" and (file.parent / "README.md").exists():
            found[file.parent / "README.md"] = name
    return found


if __name__ == "__main__":
    results = read_results()
    for path, name in pages().items():
        path.write_text(filled(path.read_text(), name, results))
