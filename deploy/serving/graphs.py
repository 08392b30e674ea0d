"""The decode step on CUDA as recorded graphs: the GPU repeats them without Python.

A decode step starts hundreds of small kernels, and Python takes longer to start them than the GPU to compute
them. A CUDA graph records the kernels once, with the addresses of their tensors, and starts them all in one
call. So the batch must have the same shapes and addresses each time: rows and blocks are padded to powers of
two, and every step copies its tables into the tensors of the recording.
"""

from collections.abc import Callable
from functools import partial

import torch

from deploy.quantization.linear import QuantizedExperts
from deploy.serving.pool import Batch, Pool

WARM_UP = 2  # runs before recording: libraries allocate memory and choose kernels in the first ones


def can_be_recorded(model: torch.nn.Module) -> bool:
    """Whether no operation of a decode step waits for the GPU, which cannot be recorded.

    Quantized experts ask it which of them were chosen. So does torch's product of grouped rows, except in
    bfloat16.
    """
    if not hasattr(model, "routers"):  # a stage without experts
        return True
    is_quantized = any(isinstance(module, QuantizedExperts) for module in model.modules())
    return next(model.parameters()).dtype == torch.bfloat16 and not is_quantized


class Graphs:
    """Computes decode steps. Records one graph for each padded shape, when a step first has that shape.

    record(compute) runs compute() and returns what it returned, and a function that computes it again.
    """

    def __init__(self, model: torch.nn.Module, pool: Pool, record: Callable | None = None):
        self.model, self.pool = model, pool
        # One pool of memory for all graphs, because only one of them runs at a time.
        self.record = record or partial(record_cuda_graph, pool=torch.cuda.graph_pool_handle())
        self.recorded: dict[tuple[int, int], tuple] = {}

    def decode(self, tokens: list[int], tables: list[list[int]], starts: list[int]) -> torch.Tensor:
        """Logits (B, 1, vocab) after one more token of every row, in memory that the next step overwrites."""
        n_rows = power_of_two(len(tables))
        n_blocks = power_of_two(max(starts) // self.pool.block_size + 1)
        padding = n_rows - len(tables)  # rows that read and write the null block
        batch = Batch(self.pool, tables + [[]] * padding, starts + [0] * padding, 1, n_blocks)
        idx = torch.tensor(tokens + [0] * padding, device=self.pool.device)[:, None]  # (B, 1)
        if (n_rows, n_blocks) not in self.recorded:
            logits, again = self.record(lambda: self.model(idx, cache=batch)[0])
            self.recorded[n_rows, n_blocks] = idx, batch, logits, again
        else:
            static_idx, static_batch, logits, again = self.recorded[n_rows, n_blocks]
            static_idx.copy_(idx)
            static_batch.copy(batch)
            again()
        return logits[: len(tables)]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def record_cuda_graph(compute: Callable, pool: tuple[int, int]) -> tuple[torch.Tensor, Callable]:
    """Records the kernels of compute(). It computes the same each time, so the runs before it do no harm."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = compute()
    graph.replay()
    return result, graph.replay
