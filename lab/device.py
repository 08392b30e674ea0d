"""Everything that depends on the device: choosing it, its precision, memory, speed and random generators."""

import contextlib
import ctypes
import errno
import re
import sys
from pathlib import Path

import torch

from lab.errors import UserError

# Peak dense bfloat16 FLOP/s with float32 accumulation, from the vendors' data sheets, by torch's device name.
# Model FLOPs utilisation (MFU) is relative to it. (Cards of one generation differ: an H100 PCIe has 3/4 of an
# SXM's.)
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "AMD Instinct MI300X": 1307e12,
}


def choose(name: str) -> torch.device:
    """The device called name; "auto" picks the first available of cuda, mps and cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, usable in available.items() if usable))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in available:
        raise UserError(f"unknown device {name!r}; use auto, cuda, mps or cpu")
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available[device.type] or (device.index or 0) >= n_devices:
        kinds = ", ".join(kind for kind, usable in available.items() if usable)
        raise UserError(f"device {name!r} is not available (available: {kinds}); try --device auto")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called name; "auto" is bfloat16 if the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 lacks it
        native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def sampling_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to sample in: the one called name; "auto" is that of the stored weights if the device is fast
    with it, else that of `choose_dtype`."""
    if name != "auto":
        return getattr(torch, name)
    fast = {torch.float32, choose_dtype("auto", device)}
    if device.type != "cpu":
        fast.add(torch.float16)
    return stored if stored in fast else choose_dtype("auto", device)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """A context that runs matrix products in dtype."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def prepare(device: torch.device) -> None:
    """Sets process-wide options that make training faster on this device."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for float32 matrix products
        if device.index is not None:
            torch.cuda.set_device(device)  # Triton launches its kernels on the current device
    if device.type == "cpu" and sys.platform == "linux":
        # By default, glibc returns large freed blocks to the system and maps them again, page by page, in
        # every step. Keeping them in the process saves that time. -3 is M_MMAP_THRESHOLD, for which some
        # versions accept at most 32 MiB; -1 is M_TRIM_THRESHOLD.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            accepted = libc.mallopt(-3, 1 << 30)
            if not accepted:
                libc.mallopt(-3, 32 << 20)
            libc.mallopt(-1, 1 << 30)


# How torch, numpy and Python report an allocation that is too large. (For some, the byte count overflows.)
TOO_LARGE = (
    "out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|[Cc]annot allocate memory|"
    "Storage size calculation overflowed|integer multiplication overflow|Overflow when unpacking long|"
    "too large to convert to C|cannot fit 'int' into"
)


@contextlib.contextmanager
def memory_errors(remedy: str):
    """Turns the error of an allocation too large for the device into a UserError with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError, OverflowError, OSError) as error:
        known = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if not known and not re.search(TOO_LARGE, str(error)):
            raise
        size = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        more = f" for {size[1]} more" if size else ""
        raise UserError(f"there is not enough memory{more}\n{remedy}") from error


def require_compiler(device: torch.device) -> None:
    """Raises UserError if the C++ compiler that torch.compile needs on a CPU is missing."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc  # this import takes over a second

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(
            "--compile needs a C++ compiler: apt install g++, set CXX to your compiler, or leave it out"
        ) from None


def compile_options(device: torch.device) -> dict[str, object]:
    """Options of torch.compile. On a CPU, tanh (in GELU) is computed from one exponential: half the time."""
    return {"cpp.use_decompose_tanh": True} if device.type == "cpu" else {}


def training_options(device: torch.device, one_pass: bool) -> dict[str, object]:
    """Options of torch.compile for training. one_pass: whether a step is a single pass of a single process.

    Then one CUDA graph replays the forward pass and another the backward pass, so that the GPU does not wait
    for Python. Each replay overwrites the results of the one before, so the gradients of several passes could
    not be added up.
    """
    options = compile_options(device)
    if device.type == "cuda" and one_pass:
        options |= {"triton.cudagraphs": True}
    return options


def step_options(device: torch.device) -> dict[str, object]:
    """Options of torch.compile for decoding one token.

    They take Python out of the step: with a CUDA graph on CUDA, with a C++ wrapper on a CPU. On a CPU, the
    operations other than matrix products use one thread: for one token, they are too small to share. And the
    weights are constants ("freezing"), in the layout that oneDNN reads fastest.
    """
    options = compile_options(device)
    if device.type == "cpu":
        options |= {"cpp_wrapper": True, "cpp.threads": 1, "freezing": True}
    if device.type == "cuda":
        options |= {"triton.cudagraphs": True}
    return options


def package_options() -> dict[str, object]:
    """Options of AOTInductor for decoding one token on a CPU. (`step_options` says why one thread.)"""
    return compile_options(torch.device("cpu")) | {"cpp.threads": 1}


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its queued work, so that elapsed time can be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random generators that training uses."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores the random generators; a state from another kind of device is ignored."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s in bfloat16, or None if unknown."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far, in bytes: the allocator's on CUDA, the process's elsewhere (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # getrusage would include the parent process
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024
    import resource  # only on Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
