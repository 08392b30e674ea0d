"""Which device and precision to compute with, and what differs between devices: all of it is here."""

import contextlib
import ctypes
import errno
import re
import sys
from pathlib import Path

import torch

from lab.errors import UserError

# Dense bfloat16 FLOP/s with float32 sums, by the name that torch gives, from the makers' data sheets: model
# FLOPs utilisation is relative to it. (Cards of one generation differ: an H100 PCIe has 3/4 of an SXM's.)
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
    """The device called name; "auto" is the first of cuda, mps and cpu that is present."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in present:
        raise UserError(f"unknown device {name!r}; use auto, cuda, mps or cpu")
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if not present[device.type] or (device.index or 0) >= n_devices:
        there = ", ".join(kind for kind, there in present.items() if there)
        raise UserError(f"device {name!r} is not present here (there is: {there}); --device auto chooses")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called name; "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 cannot tell
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context that runs matrix products in dtype."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def prepare(device: torch.device) -> None:
    """Settings of the process that make training faster on this device."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
        if device.index is not None:
            torch.cuda.set_device(device)  # Triton starts its kernels on the current one
    if device.type == "cpu" and sys.platform == "linux":
        # glibc gives large freed blocks back to the system and gets them again, page by page, in
        # every step; kept in the process they cost nothing. Numbers are M_MMAP_ and M_TRIM_THRESHOLD; some
        # versions take no more than 32 MiB for the first.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            accepted = libc.mallopt(-3, 1 << 30)
            if not accepted:
                libc.mallopt(-3, 32 << 20)
            libc.mallopt(-1, 1 << 30)


# What torch, numpy and Python say of too large an allocation; of some sizes they cannot even count the bytes.
TOO_LARGE = (
    "out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|[Cc]annot allocate memory|"
    "Storage size calculation overflowed|integer multiplication overflow|Overflow when unpacking long|"
    "too large to convert to C|cannot fit 'int' into"
)


@contextlib.contextmanager
def memory_errors(remedy: str):
    """Makes a UserError, with the remedy, of an allocation that was too large for the device."""
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
    """A UserError where torch.compile would find no C++ compiler, which it needs on a CPU."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc  # takes over a second: for those alone who compile

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(
            "--compile needs a C++ compiler: apt install g++, or leave it out (CXX names another compiler)"
        ) from None


def compile_options(device: torch.device) -> dict[str, object]:
    """Options of torch.compile: on a CPU, tanh (of GELU) from one exponential, in half of the time."""
    return {"cpp.use_decompose_tanh": True} if device.type == "cpu" else {}


def step_options(device: torch.device) -> dict[str, object]:
    """Options of torch.compile for the step from one token to the next.

    Both leave Python out of the step: a CUDA graph there, a C++ program on a CPU, where one token is
    too little work, outside the matrix products, to share between threads.
    """
    options = compile_options(device)
    if device.type == "cpu":
        options |= {"cpp_wrapper": True, "cpp.threads": 1}
    if device.type == "cuda":
        options |= {"triton.cudagraphs": True}
    return options


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts the generators back; those of another kind of device stay as they are."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device can do in bfloat16, where known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: of the allocator on CUDA, of the process elsewhere (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # getrusage would count the process that started this one, too
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024
    import resource  # Unix alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
