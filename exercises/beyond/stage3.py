"""Exercise 3.2, beyond the stage: the width of the MLP, which the stage computes in its config."""

import math


def swiglu_width(n_embd: int, multiple: int) -> int:
    """The width at which three matrices have the parameters of two that are 4 · n_embd wide.

    Rounded up to the next multiple, since matrix products are fastest at such widths.
    """
    return math.ceil(8 * n_embd / (3 * multiple)) * multiple
