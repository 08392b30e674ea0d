"""How long calls take: by the wall clock or, where it says so, in processor time.

`clock` returns seconds. None: time.perf_counter, the wall clock. With time.process_time and one thread, other
programs on the machine hardly change what is measured.
"""

import statistics
import time
from collections.abc import Callable

import torch

from lab import device as devices


def seconds_of(
    call: Callable[[], object],
    times: int,
    device: torch.device,
    warm_ups: int = 0,
    limit: float = float("inf"),
    clock: Callable[[], float] | None = None,
) -> list[float]:
    """Seconds of each of `times` calls, including the device's work; fewer if `limit` seconds have passed.

    warm_ups: the number of calls before them that do not count.
    """
    clock = clock or time.perf_counter
    seconds, began = [], time.perf_counter()
    for _ in range(warm_ups + times):
        started = clock()
        call()
        devices.synchronize(device)
        seconds.append(clock() - started)
        if time.perf_counter() - began > limit:
            break
    return seconds[warm_ups:]


def in_turn(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_ups: int = 0,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round. Each round makes every call once, so that all see the same load.

    warm_ups: the number of rounds before them that do not count.
    """
    seconds = {name: [] for name in calls}
    for _ in range(warm_ups + rounds):
        for name, call in calls.items():
            seconds[name] += seconds_of(call, 1, device, clock=clock)
    return {name: of[warm_ups:] for name, of in seconds.items()}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the rounds' ratios, which varies less than the ratio of the medians."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
