"""Finds a stage's file by number or name, and loads it.

The stages of the course are listed here; their relatives are in family/. Any other folder with a model.py is
a variant, made by copying a stage's folder (cp -r stage3_swiglu my_relu) and editing the copy. A model in
my/, where the exercises are written, is a variant, too: my/stage4.py has the name my_stage4.
"""

import difflib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from lab.errors import UserError, shown

ROOT = Path(__file__).resolve().parent.parent
MY = ROOT / "my"
COURSE = {  # in order
    "stage0_gpt": "stage0_gpt/model.py",
    "stage1_rmsnorm": "stage1_rmsnorm/model.py",
    "stage2_rope": "stage2_rope/model.py",
    "stage3_swiglu": "stage3_swiglu/model.py",
    "stage4_gqa": "stage4_gqa/model.py",
    "stage5_flash": "stage5_flash/model.py",
    "stage6_moe": "stage6_moe/model.py",
    "stage7a_mla": "stage7_mla_mtp/mla.py",
    "stage7_mla_mtp": "stage7_mla_mtp/model.py",
}


def course() -> list[str]:
    """The names of the course's stages, in order."""
    return [name for name, file in COURSE.items() if (ROOT / file).exists()]


def relatives() -> list[str]:
    """The names of the course's relatives in family/."""
    return sorted(file.parent.name for file in ROOT.glob("family/*/model.py"))


def names() -> list[str]:
    """The names of all stages: the course's in order, then its relatives and the variants by name."""
    folders = sorted(file.parent.name for file in ROOT.glob("*/model.py") if file.parent.name[0] != ".")
    variants = [name for name in folders if name not in COURSE and name not in relatives()]
    return [*course(), *relatives(), *variants, *written()]


def written() -> list[str]:
    """The names of the models in my/."""
    return [f"my_{file.stem}" for file in sorted(MY.glob("*.py")) if b"\nclass GPT(" in file.read_bytes()]


def path(name: str) -> Path:
    """The file of a stage, whether or not it exists."""
    if name in COURSE:
        return ROOT / COURSE[name]
    relative, variant = ROOT / "family" / name / "model.py", ROOT / name / "model.py"
    if relative.exists() and variant.exists():
        raise UserError(f"{name} could be {name}/ or family/{name}/: rename your folder")
    mine = MY / f"{name.removeprefix('my_')}.py"
    if name.startswith("my_") and mine.exists():
        if variant.exists():
            raise UserError(f"{name} could be {name}/ or {shown(mine)}: rename your folder")
        return mine
    return relative if relative.exists() else variant


def find(stage: str) -> str:
    """The name of a stage given as "4", "gqa" or "stage4_gqa", or by the path of its folder or its file.

    Raises UserError if no stage fits, or more than one.
    """
    file = Path(stage.strip())
    if file.suffix == ".py" and MY in ((ROOT / file).parent, file.resolve().parent):
        return find_written(file.stem)
    wanted = stage.strip().rstrip("/\\").removeprefix("./").removesuffix("/model.py")
    if Path(wanted).parent in (ROOT, Path("family"), ROOT / "family"):
        wanted = Path(wanted).name
    known, files = names(), {file: name for name, file in COURSE.items()}
    if wanted in files:
        return files[wanted]
    if wanted in known:
        return wanted
    given = re.sub(r"^stage(?=\d+[a-z]?$)", "", wanted.lower())
    fitting = [name for name in known if given in (number(name), word(name))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"stage {stage!r} could be {' or '.join(fitting)}: give the folder's name")
    close = difflib.get_close_matches(given, [*known, *map(word, known)], n=1)
    guess = f"did you mean {close[0]}? The" if close else "the"
    raise UserError(f"unknown stage {stage!r}; {guess} stages are: {listing()}")


def find_written(stem: str) -> str:
    """The name of a model in my/. Raises UserError if there is no such file, or no model in it."""
    file = MY / f"{stem}.py"
    if not file.exists():
        begin = f"python exercise.py start {stem.removeprefix('stage')}"
        raise UserError(f"{shown(file)} does not exist{f': {begin}' if stem.startswith('stage') else ''}")
    if f"my_{stem}" not in written():
        raise UserError(f"{shown(file)} has no class GPT: it is no model that could be trained")
    return f"my_{stem}"


def listing() -> str:
    """All stages in a line, for messages."""
    return ", ".join(f"{number(name)} ({name})" if name in COURSE else name for name in names())


def number(name: str) -> str | None:
    """A stage's number, such as "4" or "7a", from its name; None for one without a number."""
    match = re.match(r"stage(\d+[a-z]?)_", name)
    return match.group(1) if match else None


def word(name: str) -> str:
    """A stage's name without its number: "gqa" of stage4_gqa."""
    return re.sub(r"^stage\d+[a-z]?_", "", name).lower()


def label(name: str) -> str:
    """A stage in a picture or a table: "4 gqa"; for a relative or a variant the name of its folder."""
    return f"{number(name)} {name.split('_', 1)[1]}" if name in COURSE else name


def load(name: str) -> ModuleType:
    """The module of a stage, which has GPTConfig and GPT.

    It is loaded by its path, so that a variant's folder may have any name, also that of another package.
    """
    module_name, file = f"{name}.model", path(name)
    if module_name in sys.modules:
        return sys.modules[module_name]
    if not file.exists():
        raise UserError(f"there is no stage {name} here: {shown(file)} is missing")
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their own module up while it is loaded
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            raise UserError(f"{shown(file)}, line {error.lineno}: {error.msg}") from None
        raise
    for needed in ("GPTConfig", "GPT"):
        if not hasattr(module, needed):
            raise UserError(f"{shown(file)} has no {needed}: a stage's file defines GPTConfig and GPT")
    return module
