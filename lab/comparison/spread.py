"""Means, standard deviations, and tests for significant differences."""

import math
import statistics

from lab import optional

LEVEL = 0.05  # significance level: how often chance alone looks like a difference


def summary(values: list[float]) -> dict:
    """Mean, sample standard deviation (None for a single value) and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": std, "values": list(values)}


def means_differ(a: list[float], b: list[float]) -> bool | None:
    """Whether two means differ, by Welch's t-test; None if either has fewer than 2 values."""
    if min(len(a), len(b)) < 2:
        return None
    if statistics.variance(a) + statistics.variance(b) == 0:
        return statistics.mean(a) != statistics.mean(b)
    return bool(scipy_stats().ttest_ind(a, b, equal_var=False).pvalue < LEVEL)


def rounds_differ(a: list[float], b: list[float]) -> bool | None:
    """Whether speeds measured in turn differ, by a paired t-test on their ratios; None below 2 rounds.

    The two speeds of a round see the same machine load, so their ratio varies less than the speeds do.
    """
    ratios = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    if len(ratios) < 2:
        return None
    if statistics.variance(ratios) == 0:
        return ratios[0] != 0
    return bool(scipy_stats().ttest_1samp(ratios, 0.0).pvalue < LEVEL)


def scipy_stats():
    """The module scipy.stats, which only compare.py needs. Raises UserError if it is not installed."""
    return optional.load("scipy.stats", extra="compare", needed_for="compare.py")
