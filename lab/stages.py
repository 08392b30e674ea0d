"""Finds a stage's folder by number or name and loads its model.py.

Every folder beside this package's that holds a model.py is a stage. Those of the course are listed here; any
other is a variant, made by copying a stage's folder (cp -r stage3_swiglu my_relu) and editing the copy.
"""

import difflib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from lab.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COURSE = (
    "stage0_gpt",
    "stage1_rmsnorm",
    "stage2_rope",
    "stage3_swiglu",
    "stage4_gqa",
    "stage5_flash",
    "stage6_moe",
    "stage7_mla_mtp",
)


def names() -> dict[int, str]:
    """The stages of the course, in order: number -> name of the folder."""
    return {number(name): name for name in COURSE if (ROOT / name / "model.py").exists()}


def folders() -> list[str]:
    """The folders of all stages: the course's in order, then the variants by name."""
    found = sorted(path.parent.name for path in ROOT.glob("*/model.py") if path.parent.name[0] != ".")
    course = list(names().values())
    return course + [name for name in found if name not in course]


def find(stage: str) -> str:
    """The folder's name of a stage given as "4", "gqa" or "stage4_gqa", also as a path (stage4_gqa/).

    UserError where it is unknown, or where several folders claim it.
    """
    wanted = stage.strip().rstrip("/\\").removeprefix("./")
    if Path(wanted).parent == ROOT:
        wanted = Path(wanted).name
    known = folders()
    if wanted in known:
        return wanted
    given = re.sub(r"^stage(?=\d+$)", "", wanted.lower())
    fitting = [name for name in known if given in (str(number(name)), word(name))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"stage {stage!r} could be {' or '.join(fitting)}: give the folder's name")
    close = difflib.get_close_matches(given, [*known, *map(word, known)], n=1)
    guess = f"did you mean {close[0]}? The" if close else "the"
    raise UserError(f"unknown stage {stage!r}; {guess} stages are: {listing()}")


def listing() -> str:
    """All stages in a line, for messages."""
    course = names().values()
    return ", ".join(f"{number(name)} ({name})" if name in course else name for name in folders())


def number(name: str) -> int | None:
    """A stage's number, from its folder's name; None for a variant without one."""
    match = re.match(r"stage(\d+)_", name)
    return int(match.group(1)) if match else None


def word(name: str) -> str:
    """A stage's name without its number: "gqa" of stage4_gqa."""
    return re.sub(r"^stage\d+_", "", name).lower()


def label(name: str) -> str:
    """A stage in a picture or a table: "4 gqa", or a variant's folder."""
    return f"{number(name)} {name.split('_', 1)[1]}" if name in COURSE else name


def load(name: str) -> ModuleType:
    """The module <name>/model.py, which has GPTConfig and GPT.

    It is loaded by its path, so that a variant's folder may have any name, also that of another package.
    """
    if str(ROOT) not in sys.path:  # for what a model.py imports, when a script in another folder loads it
        sys.path.append(str(ROOT))
    module_name, path = f"{name}.model", ROOT / name / "model.py"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if not path.exists():
        raise UserError(f"there is no stage {name} here: {path} is missing")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their own module up while it is loaded
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            raise UserError(f"{name}/model.py, line {error.lineno}: {error.msg}") from None
        raise
    for needed in ("GPTConfig", "GPT"):
        if not hasattr(module, needed):
            raise UserError(f"{name}/model.py has no {needed}: a stage's model.py defines GPTConfig and GPT")
    return module


def attention(stage: ModuleType, config, device: torch.device, dtype: torch.dtype) -> str | None:
    """The name of what computes attention in training, None for a stage without the choice (before 5).

    A UserError where --model.attention asks for what can't be used.
    """
    if not hasattr(stage, "choose_attention"):
        return None
    width, value_width = head_widths(config)
    q = torch.empty((1, config.n_head, config.block_size, width), device=device, dtype=dtype)
    chosen = stage.choose_attention(config.attention, q, q, None, config.dropout)
    if chosen in ("flash_attn", "triton") and width != value_width:
        chosen = "sdpa"  # as in stage 7, for those know a single width
    if chosen == "triton" and not 16 <= width <= 128:
        raise UserError(
            f"--model.attention triton needs heads of 16 to 128 dimensions; here they have {width}"
        )
    if config.attention not in ("auto", chosen):
        needs = {
            "flash_attn": "CUDA, the package flash-attn (pip install -e '.[flash]') and --dtype bfloat16",
            "triton": "CUDA and --model.dropout 0",
        }[config.attention]
        given = f"here it is {device.type}, {str(dtype).removeprefix('torch.')}, dropout {config.dropout}"
        if width != value_width:
            needs = "queries and values of one width"
            given = f"here they have {width} and {value_width}"
        raise UserError(f"--model.attention {config.attention} needs {needs}; {given}")
    return chosen


def head_widths(config) -> tuple[int, int]:
    """Dimensions of a head's queries and of its values."""
    if hasattr(config, "v_head_dim"):  # stage 7
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return (config.n_embd // config.n_head,) * 2
