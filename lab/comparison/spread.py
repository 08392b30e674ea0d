"""Means, their spread, and whether two of them differ by more than chance."""

import math
import statistics

from lab import optional

LEVEL = 0.05  # the share of cases in which chance alone would look like a difference


def summary(values: list[float]) -> dict:
    """Mean, standard deviation (of the sample; None for a single value) and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": std, "values": list(values)}


def means_differ(a: list[float], b: list[float]) -> bool | None:
    """Welch's t-test on independent values; None where either has fewer than 2."""
    if min(len(a), len(b)) < 2:
        return None
    if statistics.variance(a) + statistics.variance(b) == 0:
        return statistics.mean(a) != statistics.mean(b)
    return bool(scipy_stats().ttest_ind(a, b, equal_var=False).pvalue < LEVEL)


def rounds_differ(a: list[float], b: list[float]) -> bool | None:
    """A paired t-test on the ratios of speeds measured in turn; None for fewer than 2 rounds.

    Neighbours in time see the same machine load, so their ratio is steadier than either of them.
    """
    ratios = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    if len(ratios) < 2:
        return None
    if statistics.variance(ratios) == 0:
        return ratios[0] != 0
    return bool(scipy_stats().ttest_1samp(ratios, 0.0).pvalue < LEVEL)


def scipy_stats():
    """scipy.stats, which only compare.py needs; a UserError where it is not installed."""
    return optional.load("scipy.stats", extra="compare", needed_for="compare.py")
