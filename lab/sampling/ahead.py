"""Compiles the decoding step on a CPU in another process, so that the text need not wait for it.

AOTInductor writes the step as a package of machine code (.pt2). The weights and the cache are arguments of
that code: one package serves every run of the same code and sizes, and a text goes on in the cache in which
it began. A package is a program, so it is kept in the user's own cache folder, and none is ever read from a
run's folder, which may have been downloaded.

The other process is `python -m lab.sampling.ahead`. It has a low priority, and it ends with the process that
started it at the latest (lab/background.py).
"""

import os
import sys

from lab import background

if __name__ == "__main__":
    TASK = background.prepare(niceness=int(sys.argv[2]))  # first, since importing torch takes seconds
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, not in a pool of others

import contextlib
import hashlib
import io
import json
import platform
import stat
import subprocess
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from lab import atomic, stages
from lab import device as devices
from lab.errors import UserError
from lab.sampling import packed
from lab.sampling.compiled import StaticCache, by_layer

KEPT = 50  # packages; each has a few MB
OURS = ("ahead.py", "compiled.py", "packed.py", "../device.py")  # the code that a package depends on


class BackgroundStep:
    """Decodes one token like CompiledStep, at first with the model and then with compiled code.

    Compiling starts with the constructor, in another process, unless an earlier start has left a package for
    the same code, sizes and machine. `code` is the hash of the stage's code, `length` the length of the cache
    in tokens, `niceness` how much less priority than the text compiling has: 0 to 19. `problem` is one line
    that says why there is no compiled code, once that is known.
    """

    def __init__(self, model: torch.nn.Module, stage: str, code: str, length: int, niceness: int = 19):
        self.model, self.cache = model, model.new_cache(1, length)
        self.problem, self.seconds, self.process = None, 0.0, None
        layers = by_layer(self.cache)
        position = torch.zeros(1, dtype=torch.int64)
        weights = dict([*model.named_parameters(), *model.named_buffers()])
        self.position = position
        self.inputs = [position, *weights.values(), *(tensor for layer in layers for tensor in layer)]
        self.task = {
            "stage": stage,
            "sizes": asdict(model.config),
            "packed": any(isinstance(module, packed.PackedLinear) for module in model.modules()),
            "weights": [[name, *described(tensor)] for name, tensor in weights.items()],
            "layers": [[described(tensor) for tensor in layer] for layer in layers],
            "depends on": [code, ours(), torch.__version__, processor()],
        }
        name = hashlib.sha256(json.dumps(self.task).encode()).hexdigest()[:32]
        self.package = folder() / f"{name}.pt2"
        self.compiled = load(self.package)
        if self.compiled is None:
            self.start(niceness)

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """Logits (1, 1, vocab_size) after the token idx (1, 1), which the cache then holds."""
        if self.compiled is None:
            if self.process:
                self.look()
            return self.model(idx, cache=self.cache)[0]
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        return self.compiled.boxed_run([idx, *self.inputs])[0]

    def start(self, niceness: int) -> None:
        """Starts the other process."""
        self.problem = unusable(self.package.parent)
        if self.problem:
            return
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.sampling.ahead", self.package, str(niceness)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=stages.ROOT,
            text=True,
        )
        with contextlib.suppress(BrokenPipeError):  # it has ended already; look says why
            self.process.stdin.write(json.dumps(self.task) + "\n")
            self.process.stdin.flush()

    def look(self) -> None:
        """Loads the package if the other process has written it."""
        if self.process.poll() is None:
            return
        self.seconds = time.perf_counter() - self.started
        said = self.process.stdout.read().splitlines()
        if self.process.returncode == 0:
            self.compiled = load(self.package)
        if self.compiled is None:
            self.problem = said[-1] if said else f"compiling ended with status {self.process.returncode}"
        self.process = None

    def wait(self) -> None:
        """Waits until there is compiled code, or a problem."""
        if self.process:
            self.process.wait()
            self.look()

    def stop(self) -> None:
        """Ends the other process. The steps that follow do without compiled code, if there is none yet."""
        if self.process:
            self.process.stdin.close()
            self.process = None


def described(tensor: torch.Tensor) -> list:
    """Shape, strides and dtype of an argument of the compiled code. oneDNN's own layout has no strides."""
    strides = None if tensor.is_mkldnn else tensor.stride()
    return [tensor.shape, strides, str(tensor.dtype).removeprefix("torch.")]


def like(shape: list[int], strides: list[int] | None, dtype: str) -> torch.Tensor:
    """A tensor as `described`, with any content. Its memory is never touched, so it takes none."""
    if strides is None:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype))


def folder() -> Path:
    """Where the packages are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).absolute() / "eight-small-diffs"


def unusable(folder: Path) -> str | None:
    """Why packages cannot be kept in the folder, which is made if it is missing. None: they can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make {folder} ({error.strerror})"
    if not os.access(folder, os.W_OK):
        return f"cannot write in {folder}"
    if not is_private(folder):
        return f"others can write in {folder}: chmod go-w {folder}"
    return None


def is_private(folder: Path) -> bool:
    """Whether only this user can have written what is in the folder."""
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def load(package: Path):
    """The compiled code of a package. None if there is no such package, or it is damaged."""
    if not package.exists() or not is_private(package.parent):
        return None
    try:
        with zipfile.ZipFile(package) as parts:
            if parts.testzip():  # a checksum is wrong
                return None
        # What torch._inductor.aoti_load_package calls; importing that takes over a second.
        return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, -1)
    except Exception:  # zipfile and the loader have many ways to say that a file is damaged
        return None


def ours() -> str:
    """A hash of the code here that a package depends on."""
    files = (Path(__file__).parent / name for name in OURS)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def processor() -> str:
    """What kind of processor this is: compiled code uses the instructions of the one that it is made on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = set(cpuinfo.read_text().splitlines()) if cpuinfo.exists() else ()
    kinds = sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return " ".join([platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability(), *kinds])


class Step(torch.nn.Module):
    """What is compiled: one token through the model. All tensors are arguments, none is a part of it."""

    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__()
        self.apply_model = lambda *arguments: torch.func.functional_call(model, *arguments)[0]
        self.names = names

    def forward(self, idx, position, weights, layers):
        """idx (1, 1), position (1,), the model's weights, and the cache's tensors by layer -> logits."""
        cache = StaticCache(layers, position)
        return self.apply_model(dict(zip(self.names, weights, strict=True)), (idx,), {"cache": cache})


def compile_step(task: dict) -> bytes:
    """The package for a BackgroundStep.task."""
    from torch._inductor import ir, lowering, mkldnn_ir  # this import takes over a second

    stage = stages.load(task["stage"])
    with torch.device("meta"):  # the weights are arguments
        model = stage.GPT(stage.GPTConfig(**task["sizes"])).eval()
    if task["packed"]:
        packed.replace_linears(model, layout=lambda weight: weight)
        # inductor would accept this product, and what it fuses with it, only with weights that are constants
        torch.backends.mkldnn.set_flags(False)
        lowering.register_lowering(torch.ops.mkldnn._linear_pointwise.default, type_promotion_kind=None)(
            lambda *arguments: ir.TensorBox.create(mkldnn_ir.LinearUnary.create(*arguments))
        )
    names = [name for name, *_ in task["weights"]]
    weights = [like(*tensor) for _, *tensor in task["weights"]]
    layers = [tuple(like(*tensor) for tensor in layer) for layer in task["layers"]]
    idx, position = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(Step(model, names), (idx, position, weights, layers))
    package = io.BytesIO()
    options = devices.package_options()
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    return package.getvalue()


def main() -> None:
    """Compiles TASK, a BackgroundStep.task, into the package named on the command line.

    If that fails, a line on stdout says why, and the exit status is 1.
    """
    package = Path(sys.argv[1])
    try:
        devices.require_compiler(torch.device("cpu"))
        atomic.write(package, compile_step(json.loads(TASK)))
    except UserError as error:
        print(error)
        sys.exit(1)
    except Exception as error:  # inductor has many types of exceptions, and most are wrapped in others
        message = str(error).strip() or type(error).__name__
        print(f"compiling failed ({message.splitlines()[0][:200]})")
        sys.exit(1)
    packages = sorted(package.parent.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
    for old in packages[:-KEPT]:
        old.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
