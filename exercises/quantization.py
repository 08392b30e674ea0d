"""The exercises on quantization: the grid, codes, one loop of GPTQ, and AWQ's fold."""

import torch
from torch import nn

from exercises import properties
from exercises.probe import random
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 8.1 the grid


def matrix() -> torch.Tensor:
    """(5, 10): in groups of 4, some groups have both signs, some only one, one is zero; the last is short."""
    weight = random(5, 10, seed=1)
    weight[1] = weight[1].abs() + 0.7
    weight[2] = -weight[2].abs() - 0.4
    weight[3, 4:8] = 0
    weight[4, 1] = 9.0
    return weight


def grids(m):
    """Short last groups, groups on one side of 0, zeros, and a row of which half is clipped."""
    cases = {
        "4 bits in groups of 4": (4, 4),
        "2 bits and one group a row": (2, None),
        "4 bits and a range shrunk to 0.7": (4, 4, 0.7),
        "3 bits, symmetric": (3, 4, 1.0, True),
        "8 bits": (8, 4),
    }
    found = {}
    for case, arguments in cases.items():
        scale, zero = m.find_grid(matrix(), *arguments)
        found[f"scale at {case} [row, group]"], found[f"zero at {case} [row, group]"] = scale, zero
    return found


def zero_is_exact(m):
    """The weight 0.0 becomes 0.0."""
    scale, zero = m.find_grid(matrix(), 4, 4)
    codes = m.to_codes(torch.zeros(5, 10), scale, zero, 4, 4)
    return properties.close(m.dequantize(m.Quantized(codes, scale, zero, 4, 4)), torch.zeros(5, 10))


def groups_are_apart(m):
    """A large weight in one group changes no other group."""
    weight = matrix()
    before = torch.stack(m.find_grid(weight, 4, 4))
    weight[:, 0] = 50.0
    return properties.close(torch.stack(m.find_grid(weight, 4, 4))[..., 1:], before[..., 1:])


SCALE = "torch.maximum(-low / zero, high / (highest - zero))"
SEVEN_BITS = "torch.ldexp((mantissa * 2**7).round(), exponent - 7)"
GROUPS = "groups = in_groups(weight.float(), group_size)  # (out, groups, group_size)"

GRID = Exercise(
    number="8.1",
    title="The grid of a group",
    minutes=25,
    functions=("find_grid",),
    question="A group's weights lie between -0.3 and 0.45, and a code has 4 bits. How many steps are there "
    "from the first code to the last, and which code should stand for 0.0?",
    shapes="weight (out, in) -> scale and zero (out, groups), float32; in_groups gives (out, groups, "
    "group_size). scale = (high - low) / (2^bits - 1) and zero = round(-low / scale), where low is the "
    "smallest weight or 0 and high the largest or 0. Symmetric: zero = 2^(bits-1), and the scale is the "
    "smallest for which both low and high are on the grid.",
    steps="1. Cut the rows into groups, and take the smallest and the largest weight of each; 0 counts, too. "
    "Multiply both by shrink.\n"
    "2. Symmetric, or 8 bits: the zero is in the middle. Below it there is one code more than above it, so "
    "take the larger of the two scales that low and high need.\n"
    "3. Otherwise: divide the range by the number of steps, and round that to 7 significant bits "
    "(torch.frexp gives a mantissa from 0.5 to 1, and an exponent).\n"
    "4. Round the scale to bfloat16, and go on in float32. Where it is 0, take 1.\n"
    "5. Otherwise: the zero is the code nearest to -low / scale, using the rounded scale.",
    afterwards="One large weight makes the steps coarse for its whole group. That is why groups are small, "
    "although each one has to store a scale and a zero.",
    probes=(grids,),
    properties={
        "the weight 0.0 is on the grid": zero_is_exact,
        "a group's grid does not depend on other groups": groups_are_apart,
    },
    mistakes=(
        Mistake(
            "number of codes",
            (("highest = 2**bits - 1", "highest = 2**bits"),),
            "The range is divided by the number of codes.",
            "16 codes have 15 steps between them. With 16 steps, the largest weight lies beyond the last "
            "code and is clipped.",
            "the number that the range is divided by.",
        ),
        Mistake(
            "whole row",
            (
                (
                    GROUPS,
                    "groups = in_groups(weight.float(), group_size)\n"
                    "    groups = groups.flatten(1)[:, None].expand(-1, groups.size(1), -1)",
                ),
            ),
            "All groups of a row have the same grid: that of the whole row.",
            "one large weight then makes the steps coarse for the whole row. Groups keep it local.",
            "the dimension over which the smallest and the largest weight are taken.",
        ),
        Mistake(
            "zero off the grid",
            ((".clamp(max=0) * shrink", " * shrink"), (".clamp(min=0) * shrink", " * shrink")),
            "The range of a group with only positive or only negative weights does not include 0.",
            "the code for 0.0 would then lie outside of the codes' range. Zeros, such as the padding, must "
            "stay exact.",
            "the smallest and the largest weight, and whether 0 counts among them.",
        ),
        Mistake(
            "range of the largest",
            (("(high - low) / highest", "2 * torch.maximum(-low, high) / highest"),),
            "The range reaches as far below 0 as above it.",
            "if the weights lie mostly on one side, up to half of the codes stand for values that no weight "
            "has. The zero exists so that the range can be shifted.",
            "the range that is divided by the number of steps, if the grid is not symmetric.",
        ),
        Mistake(
            "high alone",
            (("(high - low) / highest", "high / highest"),),
            "The scale is computed from the largest weight alone.",
            "the codes must cover the negative weights, too.",
            "the range that is divided by the number of steps, if the grid is not symmetric.",
        ),
        Mistake(
            "zero not rounded",
            (("(-low / scale).round()", "(-low / scale)"),),
            "The zero is not a whole number.",
            "it is stored as a code, and only then is the weight 0.0 exact.",
            "the last step of computing the zero.",
        ),
        Mistake(
            "zero neither rounded nor clamped",
            (("(-low / scale).round().clamp(0, highest)", "(-low / scale)"),),
            "The zero is not a whole number, and in a group of negative weights it may lie beyond the last "
            "code.",
            "it is stored as a code, and only then is the weight 0.0 exact.",
            "the last steps of computing the zero.",
        ),
        Mistake(
            "zero of high",
            (("(-low / scale)", "(high / scale)"),),
            "The zero is counted from the wrong end: it is the code that should stand for the sum of low and "
            "high.",
            "code 0 must stand for the smallest weight, so the zero lies -low / scale codes above it.",
            "the end of the range that the zero is computed from.",
        ),
        Mistake(
            "sign of the zero",
            (("(-low / scale)", "(low / scale)"),),
            "The zero of a grid that is not symmetric is always 0.",
            "low is negative, so low / scale is negative and is clamped to 0. Then no code is left for "
            "negative weights.",
            "the sign of the zero.",
        ),
        Mistake(
            "8 bits with a zero",
            (
                ("if symmetric or bits == 8:", "if symmetric:"),
                ("if not (symmetric or bits == 8):", "if not symmetric:"),
            ),
            "At 8 bits the grid is not symmetric unless it is asked for.",
            "8-bit kernels and file formats know no zero, so the model could not be exported.",
            "the condition for a symmetric grid.",
        ),
        Mistake(
            "symmetric without the lowest code",
            ((SCALE, "torch.maximum(-low, high) / (highest - zero)"),),
            "The symmetric scale leaves the lowest code unused.",
            "below the zero there is one code more than above it. A group whose largest weight is negative "
            "can use it, and gets finer steps; at 3 bits, by a quarter.",
            "the divisor for the negative side of a symmetric grid.",
        ),
        Mistake(
            "symmetric beyond the highest code",
            ((SCALE, "torch.maximum(-low, high) / zero"),),
            "The symmetric scale is too small where the largest weight is positive: it would need one code "
            "more than there is.",
            "above the zero there is one code fewer than below it, so this weight is clipped.",
            "the divisor for the positive side of a symmetric grid.",
        ),
        Mistake(
            "sum of both sides",
            ((SCALE, "(high - low) / highest"),),
            "The symmetric scale is that of a grid with a zero of its own.",
            "with the zero in the middle, only half of the codes are on either side. Weights that lie mostly "
            "on one side are clipped.",
            "the scale of the symmetric grid.",
        ),
        Mistake(
            "scale in float32",
            (("scale = scale.bfloat16().float()", "scale = scale.float()"),),
            "The symmetric scale is not rounded to bfloat16.",
            "it is stored in bfloat16. The codes would be computed on one grid and read on another.",
            "the dtype that the scale passes through.",
        ),
        Mistake(
            "all bits of bfloat16",
            ((SEVEN_BITS, "torch.ldexp(mantissa, exponent)"),),
            "The scale of a grid with a zero is rounded to the 8 significant bits of bfloat16, not to 7.",
            "7 bits of scale and 4 of zero make a product of at most 11 bits, which GGUF's float16 can store "
            "exactly.",
            "the rounding of the scale if there is a zero.",
        ),
        Mistake(
            "division by zero",
            (("torch.where(scale > 0, scale, 1)", "scale"),),
            "The group of zeros has the scale 0.",
            "weights are divided by the scale: 0 / 0 is NaN, and one such group spoils the model.",
            "what happens if all weights of a group are 0.",
        ),
        Mistake(
            "not shrunk",
            ((".clamp(max=0) * shrink", ".clamp(max=0)"), (".clamp(min=0) * shrink", ".clamp(min=0)")),
            "shrink has no effect.",
            "clipping the largest weights makes the steps finer for all others, and for some groups the "
            "total error is then smaller.",
            "the ends of the range.",
        ),
    ),
    rewrites=(
        Rewrite(
            "aminmax",
            (
                (
                    "low = groups.amin(-1).clamp(max=0)",
                    "low, high = groups.aminmax(dim=-1)\n    low = low.clamp(max=0)",
                ),
                ("high = groups.amax(-1).clamp(min=0)", "high = high.clamp(min=0)"),
            ),
        ),
        Rewrite(
            "a loop over groups and log2",
            """
def find_grid(weight, bits, group_size, shrink=1.0, symmetric=False):
    scales, zeros, top = [], [], 2**bits - 1
    for part in weight.float().split(group_size or weight.shape[1], dim=1):
        low = shrink * torch.minimum(part.min(1).values, torch.tensor(0.0))
        high = shrink * torch.maximum(part.max(1).values, torch.tensor(0.0))
        if symmetric or bits == 8:
            middle = 2 ** (bits - 1)
            step = torch.maximum(low.abs() / middle, high / (middle - 1)).to(torch.bfloat16).float()
            step[step == 0] = 1
            zero = torch.full_like(step, middle)
        else:
            step = (high - low) / top
            step[step == 0] = 1
            unit = 2.0 ** (step.log2().floor() - 6)
            step = (step / unit).round() * unit
            zero = torch.round(low.abs() / step)
        scales.append(step)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)
""",
        ),
        Rewrite(
            "a loop over groups, and a symmetric scale from the largest weight",
            """
def find_grid(weight, bits, group_size, shrink=1.0, symmetric=False):
    scales, zeros, top = [], [], 2**bits - 1
    for part in weight.float().split(group_size or weight.shape[1], dim=1):
        low, high = shrink * part.min(1).values.clamp(max=0), shrink * part.max(1).values.clamp(min=0)
        if symmetric or bits == 8:
            step = shrink * part.abs().max(1).values / (2 ** (bits - 1) - 1)
            step = step.to(torch.bfloat16).float()
            step[step == 0] = 1
            zero = torch.full_like(step, 2 ** (bits - 1))
        else:
            step = (high - low) / top
            step[step == 0] = 1
            unit = 2.0 ** (step.log2().floor() - 6)
            step = (step / unit).round() * unit
            zero = torch.round(-low / step)
        scales.append(step)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)
""",
            mistake="symmetric without the lowest code",
        ),
    ),
)

# ---- 8.2 codes


def codes_and_values(m):
    """Weights beyond both ends of their grids, and codes that need not come from to_codes."""
    weight, scale = random(3, 10, seed=4), random(3, 3, seed=5).abs() * 0.1 + 0.2
    zero = torch.tensor([[3.0, 0.0, 5.0], [4.0, 7.0, 2.0], [1.0, 3.0, 4.0]])
    codes = torch.randint(8, (3, 10), generator=torch.Generator().manual_seed(6)).to(torch.uint8)
    found = {"codes in groups of 4 [row, column]": m.to_codes(weight, scale, zero, 3, 4)}
    found["codes with one group a row [row, column]"] = m.to_codes(weight, scale[:, :1], zero[:, :1], 3, None)
    found["values in groups of 4 [row, column]"] = m.dequantize(m.Quantized(codes, scale, zero, 3, 4))
    one = m.Quantized(codes, scale[:, :1], zero[:, :1], 3, None)
    return found | {"values with one group a row [row, column]": m.dequantize(one)}


def half_a_step(m):
    """Within the grid's range, no weight is off by more than half a step."""
    weight = matrix()
    scale, zero = m.find_grid(weight, 8, 4)
    codes = m.to_codes(weight, scale, zero, 8, 4)
    error = (m.dequantize(m.Quantized(codes, scale, zero, 8, 4)) - weight).abs()
    return bool((error <= 0.501 * m.by_column(scale, 10, 4) + 0.002 * weight.abs()).all())


def grid_values_stay(m):
    """Codes of the values that codes stand for are these codes."""
    scale, zero = random(3, 3, seed=5).abs() + 0.2, torch.full((3, 3), 3.0)
    codes = torch.randint(8, (3, 10), generator=torch.Generator().manual_seed(6)).to(torch.uint8)
    values = m.dequantize(m.Quantized(codes, scale, zero, 3, 4))
    return torch.equal(m.to_codes(values, scale, zero, 3, 4), codes)


TO_CODES = "((weight.float() / scale).round() + zero.float()).clamp(0, 2**bits - 1)"
VALUES = "(q.codes.float() - zero.float()) * scale.float()"
COLUMNS = "by_column(scale, weight.size(1), group_size), by_column(zero, weight.size(1), group_size)"

CODES = Exercise(
    number="8.2",
    title="Round to nearest, and back",
    minutes=15,
    functions=("to_codes", "dequantize"),
    question="The scale is 0.05 and the zero is 6. Which code stands for 0.12, and which value does this "
    "code stand for? Which code stands for 2.0, if there are only 16?",
    shapes="scale and zero (out, groups); by_column repeats them for each column: (out, in). code = round(w "
    "/ scale) + zero, clamped to 0 … 2^bits - 1, as uint8. value = (code - zero) · scale, float32.",
    steps="1. Give each column its group's scale and zero.\n"
    "2. Divide by the scale, round, add the zero.\n"
    "3. Clamp to the codes that there are, last of all, and convert to uint8.\n"
    "4. Back: convert to float32 first, subtract the zero, multiply by the scale.",
    afterwards="This is all of round to nearest. It treats every weight alike; GPTQ and AWQ know which "
    "errors change the outputs.",
    probes=(codes_and_values,),
    properties={
        "no weight within its grid is off by more than half a step": half_a_step,
        "values on the grid stay as they are": grid_values_stay,
    },
    mistakes=(
        Mistake(
            "cut off",
            (("scale).round()", "scale).trunc()"),),
            "The quotient is cut off toward zero, not rounded.",
            "errors are up to a whole step instead of half of one, and all weights become smaller.",
            "how the quotient becomes a whole number. A conversion to an integer cuts off, too.",
        ),
        Mistake(
            "floor",
            (("scale).round()", "scale).floor()"),),
            "The quotient is rounded down.",
            "errors are up to a whole step instead of half of one, and all of them go in one direction, so "
            "they add up.",
            "how the quotient becomes a whole number.",
        ),
        Mistake(
            "not clamped",
            ((".clamp(0, 2**bits - 1).to(torch.uint8)", ".remainder(256).to(torch.uint8)"),),
            "Codes are not clamped.",
            "weights beyond the grid get codes that do not fit into 3 bits; codes below 0 become large "
            "numbers in uint8.",
            "what happens between the sum and the conversion to uint8.",
        ),
        Mistake(
            "clamped without the zero",
            ((TO_CODES, "(weight.float() / scale).round().clamp(0, 2**bits - 1).add(zero.float())"),),
            "The quotient is clamped before the zero is added.",
            "the codes' range is that of the sum. Here all negative weights become 0.0.",
            "the order of the clamp and the addition.",
        ),
        Mistake(
            "one code too many",
            (("2**bits - 1", "2**bits"),),
            "The highest code is one too high.",
            "3 bits have the codes 0 to 7. An 8 does not fit: packed, its bit lands in the next code.",
            "the upper end of the clamp.",
        ),
        Mistake(
            "one code too few",
            (("clamp(0, 2**bits - 1)", "clamp(1, 2**bits - 1)"),),
            "The code 0 is never used.",
            "that is a grid of -3 to 3 as integers have it. Here the code 0 stands for the smallest weight.",
            "the lower end of the clamp.",
        ),
        Mistake(
            "zero not added",
            ((".round() + zero.float()", ".round()"),),
            "The codes are those for a zero of 0.",
            "all negative weights then become 0, which is the lowest code.",
            "what is added to the rounded quotient.",
        ),
        Mistake(
            "zero subtracted",
            ((".round() + zero.float()", ".round() - zero.float()"),),
            "The zero is subtracted from the quotient, not added.",
            "codes are counted from the smallest weight, so 0.0 must get the code zero.",
            "the sign of the zero in both functions: it is added in one and subtracted in the other.",
        ),
        Mistake(
            "multiplied by the scale",
            (("weight.float() / scale", "weight.float() * scale"),),
            "The weights are multiplied by the scale, not divided.",
            "the scale is the distance between two values; the quotient counts how many of them fit.",
            "the operation between weight and scale.",
        ),
        Mistake(
            "groups take turns",
            (
                (
                    COLUMNS,
                    "*(t.repeat(1, group_size or weight.size(1))[:, : weight.size(1)] for t in (scale, "
                    "zero)),",
                ),
            ),
            "Neighbouring columns have the scales of different groups.",
            "a group is group_size neighbours. The shapes agree, and every column but a few gets a grid that "
            "was made for others.",
            "how the groups' numbers are repeated: each by itself, or the whole list.",
        ),
        Mistake(
            "zero added back",
            ((VALUES, "(q.codes.float() + zero.float()) * scale.float()"),),
            "The zero is added to the codes, not subtracted.",
            "the code zero must stand for 0.0.",
            "the sign of the zero in the way back.",
        ),
        Mistake(
            "zero as a value",
            ((VALUES, "q.codes.float() * scale.float() - zero.float()"),),
            "The zero is subtracted after the multiplication.",
            "the zero is a code, not a weight: it must be multiplied by the scale, too.",
            "the order of the subtraction and the multiplication.",
        ),
        Mistake(
            "zero forgotten",
            ((VALUES, "q.codes.float() * scale.float()"),),
            "On the way back the zero has no effect.",
            "then no value is negative.",
            "what is done with the codes before they are multiplied.",
        ),
    ),
    rewrites=(
        Rewrite(
            "round after adding the zero",
            ((TO_CODES, "(weight / scale + zero).round().clamp(0, 2**bits - 1)"),),
        ),
        Rewrite(
            "floor of a half more",
            ((TO_CODES, "torch.clip((weight / scale + 0.5).floor() + zero, 0, (1 << bits) - 1)"),),
        ),
        Rewrite(
            "indexed by group",
            """
def to_codes(weight, scale, zero, bits, group_size):
    group = torch.arange(weight.shape[1]) // (group_size or weight.shape[1])
    codes = torch.round(weight / scale[:, group]) + zero[:, group]
    return torch.minimum(torch.maximum(codes, torch.tensor(0.0)), torch.tensor(2.0**bits - 1)).byte()

def dequantize(q):
    group = torch.arange(q.codes.shape[1]) // (q.group_size or q.codes.shape[1])
    return q.scale[:, group] * q.codes - q.scale[:, group] * q.zero[:, group]
""",
        ),
        Rewrite(
            "converted to an integer",
            """
def to_codes(weight, scale, zero, bits, group_size):
    group = torch.arange(weight.shape[1]) // (group_size or weight.shape[1])
    return ((weight / scale[:, group]).int() + zero[:, group].int()).clip(0, (1 << bits) - 1).byte()
""",
            mistake="cut off",
        ),
    ),
)

# ---- 8.3 GPTQ


def layer_to_round() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (6, 12), and the Hessian (12, 12) of correlated inputs of different sizes, damped."""
    mixed = 0.5 * random(12, 40, seed=7) + 2 * random(1, 40, seed=8) * random(12, 1, seed=9)
    inputs = mixed * torch.linspace(0.5, 2.0, 12)[:, None]
    hessian = inputs @ inputs.T / 40
    return random(6, 12, seed=10), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)


def columns(m):
    found = {}
    for bits in (4, 2):
        weight, hessian = layer_to_round()
        found[f"codes of {bits} bits [row, column]"] = m.round_columns(weight, hessian, bits)
        same = torch.equal(weight, layer_to_round()[0]) and torch.equal(hessian, layer_to_round()[1])
    return found | {"the weight and the Hessian given stay as they are": same}


def output_error(m, codes: torch.Tensor, bits: int) -> float:
    """The squared error of the outputs with these codes."""
    weight, hessian = layer_to_round()
    change = m.dequantize(m.Quantized(codes, *m.find_grid(weight, bits, None), bits, None)) - weight
    return ((change @ hessian) * change).sum().item()


def better_than_nearest(m):
    """The outputs change less than after rounding to nearest."""
    weight, hessian = layer_to_round()
    nearest = m.to_codes(weight, *m.find_grid(weight, 4, None), 4, None)
    return output_error(m, m.round_columns(weight, hessian, 4), 4) < output_error(m, nearest, 4)


def nearest_if_uncorrelated(m):
    """If the inputs are not correlated, nothing can make up for anything: every weight is rounded."""
    weight, _ = layer_to_round()
    codes = m.round_columns(weight, torch.diag(torch.linspace(0.5, 2.0, 12)), 4)
    return torch.equal(codes, m.to_codes(weight, *m.find_grid(weight, 4, None), 4, None))


FACTOR = "upper = torch.linalg.cholesky(inverse, upper=True)"
UPDATE = "current[:, i:] -= error[:, None] * upper[i, i:]"
ERROR = "(current[:, i] - rounded) / upper[i, i]"

GPTQ = Exercise(
    number="8.3",
    title="GPTQ: later columns make up for an error",
    minutes=40,
    functions=("round_columns",),
    question="Two inputs are always equal. The weight of the first was rounded up by 0.1. What should "
    "happen to the weight of the second, before it is rounded?",
    shapes="weight (out, in), hessian (in, in) -> codes (out, in) uint8. U is the upper Cholesky factor of "
    "the inverse Hessian, UᵀU = H⁻¹. Column i: e = (w_i - q_i) / U_ii, one number for each row; then column "
    "j > i loses e · U_ij.",
    steps="1. Find the grid of the original weight, and copy the weight.\n"
    "2. Invert the Hessian, and take the upper Cholesky factor of the inverse.\n"
    "3. For each column, from the first to the last: the code of the weight as it is now, and the value that "
    "this code stands for.\n"
    "4. The error is the weight as it is now minus this value, divided by the factor's diagonal.\n"
    "5. Subtract the error times the factor's row from the columns to the right.",
    afterwards="The codes are those of deploy/quantization/gptq.py without act-order. What it adds is "
    "groups, the order of the columns, and blocks of 128 columns for speed.",
    probes=(columns,),
    properties={
        "the outputs change less than after rounding to nearest": better_than_nearest,
        "with uncorrelated inputs it is round to nearest": nearest_if_uncorrelated,
    },
    mistakes=(
        Mistake(
            "no correction",
            ((UPDATE, "current[:, i] -= error * upper[i, i]"),),
            "The codes are those of round to nearest: no column makes up for the error of another.",
            "the error of a column is fixed once it has its code. Only the columns after it can still move, "
            "and they must do so before they are rounded.",
            "which columns are changed, whether their codes are computed from the changed weights, and "
            "whether the factor is upper triangular: a lower one has nothing to the right of its diagonal.",
        ),
        Mistake(
            "not divided",
            ((ERROR, "current[:, i] - rounded"),),
            "The error is not divided by the diagonal of the factor.",
            "a row of the factor says how the other columns move when column i moves by U_ii. For an error "
            "of 1 it has to be divided by that.",
            "the error.",
        ),
        Mistake(
            "divided by the inverse's diagonal",
            ((ERROR, "(current[:, i] - rounded) / inverse[i, i]"),),
            "The error is divided by the diagonal of the inverse Hessian, while the row is that of the "
            "factor.",
            "the two belong together: with the inverse's diagonal goes the inverse's row, and then the "
            "inverse must be updated after each column. The factor makes that unnecessary.",
            "the matrix whose diagonal the error is divided by.",
        ),
        Mistake(
            "divided by the Hessian's diagonal",
            ((ERROR, "(current[:, i] - rounded) / hessian[i, i]"),),
            "The error is divided by the diagonal of the Hessian.",
            "the correction then has the wrong size for every column: the row comes from another matrix.",
            "the matrix whose diagonal the error is divided by.",
        ),
        Mistake(
            "next diagonal",
            ((ERROR, "(current[:, i] - rounded) / upper.diagonal()[min(i + 1, len(upper) - 1)]"),),
            "The error is divided by the diagonal entry of the next column.",
            "the entry must belong to the column that was rounded.",
            "the index of the diagonal entry.",
        ),
        Mistake(
            "inverse itself",
            ((FACTOR, "upper = inverse"),),
            "The rows are those of the inverse Hessian, as if no column were fixed yet.",
            "for the first column that is right. After it, the columns before are fixed and can no longer "
            "help, so the inverse of the remaining Hessian is needed. The Cholesky factor holds all of them.",
            "the matrix that the rows are taken from.",
        ),
        Mistake(
            "factor of the Hessian",
            ((FACTOR, "upper = torch.linalg.cholesky(hessian, upper=True)"),),
            "The factor is that of the Hessian, not of its inverse.",
            "the correction then goes in the wrong direction: of two inputs that move together, both weights "
            "are rounded the same way.",
            "the matrix that is factorized.",
        ),
        Mistake(
            "inverse of the factor",
            ((FACTOR, "upper = torch.linalg.inv(torch.linalg.cholesky(hessian)).T"),),
            "The factor is the transposed inverse of the Hessian's own Cholesky factor. It is upper "
            "triangular, but it has UUᵀ = H⁻¹, not UᵀU.",
            "this is the factor for the opposite order: its rows are right if the last column comes first.",
            "the order of the inversion and the factorization.",
        ),
        Mistake(
            "added",
            ((UPDATE, "current[:, i + 1 :] += error[:, None] * upper[i, i + 1 :]"),),
            "The correction has the wrong sign.",
            "the error of a column is doubled in the outputs, not made up for.",
            "the sign of the correction, and that of the error.",
        ),
        Mistake(
            "next column only",
            ((UPDATE, "current[:, i : i + 2] -= error[:, None] * upper[i, i : i + 2]"),),
            "Only the next column is corrected.",
            "all columns to the right can help, and the most suitable may be far away.",
            "the columns that are changed.",
        ),
        Mistake(
            "error of the original",
            ((ERROR, "(weight[:, i] - rounded) / upper[i, i]"),),
            "The error is measured from the original weight, not from the corrected one.",
            "the corrected weight makes up for earlier errors. Measured from the original, this help is "
            "taken back.",
            "the weight from which the rounded value is subtracted.",
        ),
        Mistake(
            "zero forgotten",
            (("(codes[:, i].float() - zero[:, 0]) * scale[:, 0]", "codes[:, i].float() * scale[:, 0]"),),
            "The value of a code is computed without the zero.",
            "the error is then far too large, and so are the corrections.",
            "the value that the code stands for.",
        ),
        Mistake(
            "new grid for each column",
            (
                (
                    "to_codes(current[:, i, None], scale, zero,",
                    "to_codes(current[:, i, None], *find_grid(current, bits, None),",
                ),
            ),
            "The grid is found anew as the weights change.",
            "a row has one scale and one zero. The codes of its columns must all be on that grid.",
            "the weights that the grid is computed from, and when.",
        ),
        Mistake(
            "in place",
            (("current, codes = weight.clone(), ", "current, codes = weight, "),),
            "The weight that was given is changed.",
            "the caller still needs it, for instance to measure the error.",
            "the tensor that the corrections are subtracted from.",
        ),
    ),
    rewrites=(
        Rewrite("all columns", ((UPDATE, "current -= torch.outer(error, upper[i])"),)),
        Rewrite(
            "lower factor, by columns",
            (
                (FACTOR, "upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT"),
                (UPDATE, "current[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]"),
            ),
        ),
        Rewrite(
            "the inverse of what remains, each time",
            """
def round_columns(weight, hessian, bits):
    scale, zero = find_grid(weight, bits, None)
    w, out = weight.double(), []
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:].double())
        code = ((w[:, i] / scale[:, 0]).round() + zero[:, 0]).clamp(0, 2**bits - 1)
        error = w[:, i] - (code - zero[:, 0]) * scale[:, 0]
        w = torch.cat([w[:, :i], w[:, i:] - torch.outer(error / inverse[0, 0], inverse[0])], 1)
        out.append(code)
    return torch.stack(out, 1).byte()
""",
        ),
        Rewrite(
            "a lower factor taken for an upper one",
            """
def round_columns(weight, hessian, bits):
    scale, zero = find_grid(weight, bits, None)
    w, out = weight.clone(), []
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian))
    for i in range(w.shape[1]):
        code = ((w[:, i] / scale[:, 0]).round() + zero[:, 0]).clamp(0, 2**bits - 1)
        error = (w[:, i] - (code - zero[:, 0]) * scale[:, 0]) / factor[i, i]
        w = w - torch.outer(error, factor[i])
        out.append(code)
    return torch.stack(out, 1).byte()
""",
            mistake="no correction",
        ),
        Rewrite(
            "the inverse of the whole Hessian each time",
            """
def round_columns(weight, hessian, bits):
    scale, zero = find_grid(weight, bits, None)
    w, inverse, out = weight.clone(), torch.linalg.inv(hessian), []
    for i in range(w.shape[1]):
        code = ((w[:, i] / scale[:, 0]).round() + zero[:, 0]).clamp(0, 2**bits - 1)
        error = (w[:, i] - (code - zero[:, 0]) * scale[:, 0]) / inverse[i, i]
        w = w - torch.outer(error, inverse[i])
        out.append(code)
    return torch.stack(out, 1).byte()
""",
            mistake="inverse itself",
        ),
    ),
)

# ---- 8.4 AWQ's fold


class Experts(nn.Module):
    """Two experts, whose weights are stacked."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(random(2, 6, 6, seed=1))


def places(m, source: str):
    """A fold before three readers: of one norm, of two norms side by side, or of a linear layer."""
    sources = [nn.LayerNorm(6)] if source == "a norm" else [nn.LayerNorm(3), nn.LayerNorm(3)]
    if source == "a linear layer":
        sources = [nn.Linear(6, 6)]
    experts = Experts()
    readers = [nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)]
    for i, module in enumerate([*sources, *readers]):
        for name, parameter in module.named_parameters():
            parameter.data = random(*parameter.shape, seed=10 * i + len(name), mean=1.0)
    if source == "a norm":
        sources[0].weight.data[4] = 0.0
    named = [*((reader, "weight") for reader in readers), (experts, "gate_up_proj")]
    return m.Fold(sources, named, ""), random(6, seed=3).exp()


@torch.no_grad()
def folded(m):
    """bfloat16 rounds a norm's weights, one of which is 0; all modules have biases."""
    found = {}
    for source in ("a norm", "two norms", "a linear layer"):
        fold, scales = places(m, source)
        m.apply(fold, scales.clone(), torch.bfloat16)
        for i, module in enumerate(fold.sources):
            which = source if len(fold.sources) == 1 else f"{source}, number {i + 1},"
            found[f"weight of {which} afterwards"] = module.weight.data
            found[f"bias of {which} afterwards"] = module.bias.data
        for i, (module, name) in enumerate(fold.readers):
            of = f"reader {i + 1} after {source}"
            kinds = "[row, column]" if i < 2 else "[expert, row, column]"
            found[f"{name} of {of} {kinds}"] = getattr(module, name).data
    return found


@torch.no_grad()
def outputs_stay(m):
    """What the readers compute from the norm's or the layer's output is as before."""
    for source in ("a norm", "two norms", "a linear layer"):
        fold, scales = places(m, source)
        x = random(4, 6, seed=20)

        def read(fold=fold, x=x):
            parts = [
                source(part)
                for source, part in zip(fold.sources, x.chunk(len(fold.sources), -1), strict=True)
            ]
            y = torch.cat(parts, -1)
            return torch.cat([(y @ getattr(module, name).data.mT).flatten() for module, name in fold.readers])

        before = read()
        m.apply(fold, scales, torch.float32)
        if not properties.close(read(), before):
            return False
    return True


SPLIT = "parts = scales.split([source.weight.size(0) for source in fold.sources])"
USED = "scales = torch.where(usable, before / after, 1)"
READ = "parameter.data = parameter.data * scales"

FOLD = Exercise(
    number="8.4",
    title="AWQ: scales fold into the operation before",
    minutes=30,
    functions=("apply", "divide"),
    source="deploy/quantization/awq.py",
    question="W x = (W s)(x / s). If a norm makes x, how can x be divided by s without an operation more? "
    "And if three matrices read x, which of them must be multiplied?",
    shapes="scales (in,). A norm's weight and bias (in,) are divided by them, or a linear layer's rows: "
    "weight (in, …), bias (in,). Every reader's weight (…, in) is multiplied, column by column. Two sources "
    "side by side share the scales: each gets as many as it has outputs.",
    steps="1. Split the scales among the sources.\n"
    "2. A linear layer: divide its rows, which are its outputs.\n"
    "3. A norm: divide its weight, and round to the dtype in which it is stored. The scale that was really "
    "used is the old weight divided by the new one. If the new one is 0 or infinite, keep the old one, and "
    "the scale is 1.\n"
    "4. Divide the bias, if there is one, by the scales used, and return them.\n"
    "5. Multiply the columns of all readers by the scales used.",
    afterwards="Nothing is computed differently yet: the outputs stay the same. But rounding now hurts the "
    "channels with large scales less.",
    probes=(folded,),
    properties={"the readers' outputs stay the same": outputs_stay},
    mistakes=(
        Mistake(
            "one reader",
            (("in fold.readers:", "in fold.readers[:1]:"),),
            "Only the first of the readers is multiplied.",
            "all of them get the divided input: for a norm before attention these are q, k and v.",
            "the loop over the readers.",
        ),
        Mistake(
            "experts forgotten",
            ((READ, "parameter.data = parameter.data * scales if parameter.dim() == 2 else parameter.data"),),
            "The experts' weights, which have three dimensions, are not multiplied.",
            "they read the same input as the router and the shared experts.",
            "the readers that are skipped.",
        ),
        Mistake(
            "readers divided",
            ((READ, "parameter.data = parameter.data / scales"),),
            "The readers are divided, too.",
            "then the output is divided twice. One of the two has to undo the other.",
            "the operation between a reader's weight and the scales.",
        ),
        Mistake(
            "rows of the readers",
            ((READ, "parameter.data = parameter.data * scales[:, None]"),),
            "The readers' rows are multiplied, not their columns.",
            "a row makes an output; the input's channels are the columns. If the matrix is square, the "
            "shapes agree all the same.",
            "the dimension of the readers' weights along which the scales lie.",
        ),
        Mistake(
            "inverted",
            ((SPLIT, "parts = (1 / scales).split([source.weight.size(0) for source in fold.sources])"),),
            "The sources are multiplied and the readers divided.",
            "the outputs stay the same, so nothing seems wrong. But the channels that matter most now have "
            "the smallest weights, and lose the most when these are rounded.",
            "which side is divided by the scales.",
        ),
        Mistake(
            "source not divided",
            (
                (
                    "torch.cat([divide(source, s, dtype) for source, s in zip(fold.sources, parts, "
                    "strict=True)])",
                    "torch.cat(parts)",
                ),
            ),
            "The sources are not divided.",
            "the readers are larger, and nothing undoes it.",
            "what is done with the sources.",
        ),
        Mistake(
            "same scales for both",
            (
                (
                    "zip(fold.sources, parts, strict=True)",
                    "zip(fold.sources, [parts[0]] * len(parts), strict=True)",
                ),
            ),
            "Both of two norms are divided by the first part of the scales.",
            "their outputs lie side by side: the second part of the scales belongs to the second norm.",
            "which scales each source gets.",
        ),
        Mistake(
            "columns of the source",
            (("before / scales[:, None]", "before / scales"),),
            "The columns of a linear layer before are divided, not its rows.",
            "its columns are its own inputs. Its outputs, which the readers see, are the rows.",
            "the dimension of the linear layer's weight along which the scales lie.",
        ),
        Mistake(
            "bias forgotten",
            (('if getattr(source, "bias", None) is not None:', "if False:"),),
            "The biases of the sources are not divided.",
            "the bias is part of the output that the readers see.",
            "the parameters of a source.",
        ),
        Mistake(
            "scales as asked",
            ((USED, "scales = torch.where(usable, scales, 1)"),),
            "The readers are multiplied by the scales that were asked for, not by those that were used.",
            "the norm's weight was rounded to bfloat16, so it was divided by a slightly different number. "
            "The readers can undo exactly that.",
            "the scales that are returned for a norm.",
        ),
        Mistake(
            "norm in float32",
            (("(before / scales).to(dtype).float()", "before / scales"),),
            "A norm's weights are not rounded to the dtype in which they are stored.",
            "they are rounded later, when the model is written, and then the readers' factors no longer fit.",
            "the dtype that the new weights pass through.",
        ),
        Mistake(
            "weight of 0",
            (("after.isfinite() & (after != 0)", "after.isfinite()"),),
            "A norm's weight of 0 leads to NaN.",
            "0 divided by anything stays 0, and the scale that was used would be 0 / 0. Such a channel keeps "
            "the scale 1.",
            "how the scale that was used is computed if the weight is 0.",
        ),
    ),
    rewrites=(
        Rewrite(
            "in place",
            """
def apply(fold, scales, dtype):
    used, start = [], 0
    for source in fold.sources:
        width = source.weight.shape[0]
        used.append(divide(source, scales[start : start + width], dtype))
        start += width
    used = torch.cat(used)
    for module, name in fold.readers:
        getattr(module, name).data.mul_(used)
""",
        ),
        Rewrite(
            "matrices instead of broadcasting",
            (
                ("before / scales[:, None]", "torch.diag(1 / scales) @ before"),
                (READ, "parameter.data = parameter.data @ torch.diag(scales)"),
            ),
        ),
        Rewrite(
            "norms only, channel by channel",
            """
def divide(source, scales, dtype):
    used = scales.clone()
    for i, s in enumerate(scales):
        if isinstance(source, nn.Linear):
            source.weight.data[i] /= s
        else:
            old = source.weight.data[i].clone()
            new = (old / s).to(dtype).float()
            if new == 0 or not new.isfinite():
                new, used[i] = old, 1.0
            else:
                used[i] = old / new
            source.weight.data[i] = new
        if source.bias is not None:
            source.bias.data[i] /= used[i]
    return used
""",
        ),
        Rewrite(
            "scales as asked, in another style",
            """
def divide(source, scales, dtype):
    weight = source.weight.data
    if isinstance(source, nn.Linear):
        weight.div_(scales.unsqueeze(1))
    else:
        weight.div_(scales)
        scales = torch.where(weight == 0, torch.ones_like(scales), scales)
        weight.copy_(weight.to(dtype))
    source.bias.data.div_(scales)
    return scales
""",
            mistake="scales as asked",
        ),
    ),
)

# ---- 8.5 the choice of scales


def searched(m):
    """Two readers of inputs of very different sizes, first with an input that is always 0, then without."""
    found = {}
    for case, seed in (("with an input that is always 0", 1), ("without one", 2)):
        x = random(30, 8, seed=seed) * torch.tensor([8.0, 0.3, 1.0, 0.1, 4.0, 0.5, 2.0, 0.2])
        x[:, 3] *= case == "without one"
        readers = [nn.Linear(8, 5, bias=False), nn.Linear(8, 6, bias=False)]
        for i, reader in enumerate(readers):
            reader.weight.data = random(*reader.weight.shape, seed=10 * seed + i)
        before = [reader.weight.data.clone() for reader in readers]
        outputs = []

        def output(readers=readers, x=x, outputs=outputs):
            outputs.append(torch.cat([x @ reader.weight.data.mT for reader in readers], -1))
            return outputs[-1]

        named = [(reader, "weight") for reader in readers]
        scales, alpha = m.best_scales(x.abs().mean(0), named, output, 3, 4)
        found[f"scales {case}"], found[f"α {case}"] = scales, float(alpha)
        changes = [(y - outputs[0]).square().mean().sqrt().item() for y in outputs]
        found[f"smallest change of the output tried {case}"] = min(
            (c for c in changes if c > 1e-4), default=0.0
        )
        found[f"largest change of the output tried {case}"] = max(changes, default=0.0)
        after = [reader.weight.data for reader in readers]
        found[f"the weights are as before, {case}"] = all(map(torch.equal, before, after))
    return found


def scales_are_centred(m):
    """The largest and the smallest scale have the product 1."""
    reader, x = nn.Linear(8, 5, bias=False), random(30, 8, seed=3) * torch.arange(1, 9)
    reader.weight.data = random(5, 8, seed=4)
    scales, _ = m.best_scales(x.abs().mean(0), [(reader, "weight")], lambda: x @ reader.weight.data.mT, 3, 4)
    return properties.close(scales.max() * scales.min(), torch.tensor(1.0))


POWER = "scales = mean.pow(alpha).clamp(min=1e-4)"
CENTRED = "scales = scales / (scales.max() * scales.min()).sqrt()"
TRIED = "round_to_nearest(weight * scales, bits, group_size) / scales"
LOSS = "loss = (output() - wanted).square().mean().item()"
ALL_READERS = """in zip(readers, weights, strict=True):
            getattr(module, name).data = round"""
RESTORED = """
        getattr(module, name).data = weight
"""

SCALES = Exercise(
    number="8.5",
    title="AWQ: which scales change the output least",
    minutes=30,
    functions=("best_scales",),
    source="deploy/quantization/awq.py",
    question="Some input channels are a hundred times as large as others. Should the scales be as far apart "
    "as the channels, or all equal, or something in between? How could that be found out?",
    shapes="mean (in,): the mean |x| of each channel. s = mean^α, at least 1e-4, divided by √(max s · min "
    "s). α = step / N_ALPHA for N_ALPHA steps from 0. A reader's weight (out, in) becomes round(W · s) / s. "
    "Returns the scales (in,) and α.",
    steps="1. Keep the readers' weights, and the output that they give.\n"
    "2. For each α: the scales; then every reader gets its original weight times s, rounded, divided by s.\n"
    "3. The loss is the mean squared change of the output. Keep the scales and α with the smallest.\n"
    "4. Give the readers their weights back.",
    afterwards="α = 0 is round to nearest, so on the text that was tried the choice is never worse than "
    "that.",
    probes=(searched,),
    properties={"the largest and the smallest scale have the product 1": scales_are_centred},
    mistakes=(
        Mistake(
            "α inverted",
            ((POWER, "scales = mean.pow(-alpha).clamp(min=1e-4)"),),
            "Large channels get small scales.",
            "the rounding error of a weight is divided by its scale, so the channels that matter most need "
            "the largest.",
            "the sign of α.",
        ),
        Mistake(
            "not centred",
            ((CENTRED, "pass"),),
            "The scales are not divided by the root of the largest and the smallest.",
            "only their ratios matter for the rounding. But they divide a norm's weights, which would "
            "become very large or small.",
            "what happens after the power.",
        ),
        Mistake(
            "divided by the largest",
            ((CENTRED, "scales = scales / scales.max()"),),
            "The largest scale is 1.",
            "all others are below it, so dividing the norm's weights by them only makes these larger. Like "
            "the authors' code, the course centres the range around 1.",
            "the number that the scales are divided by.",
        ),
        Mistake(
            "scales of 0",
            ((".clamp(min=1e-4)", ""),),
            "A channel that is always 0 gets the scale 0.",
            "dividing by it gives NaN, and then no α but 0 seems to be usable.",
            "the smallest scale.",
        ),
        Mistake(
            "not undone",
            ((TRIED, "round_to_nearest(weight * scales, bits, group_size)"),),
            "The rounded weights are not divided by the scales.",
            "the input is not divided here, so the weights must be. Otherwise the larger the scales, the "
            "more the output changes, and α = 0 looks best.",
            "the weights that the output is computed with.",
        ),
        Mistake(
            "last α",
            (("if loss < best_loss:", "if True:"),),
            "The last α is returned, whatever its loss.",
            "too large an α makes the small channels so coarse that they matter.",
            "the comparison of losses.",
        ),
        Mistake(
            "α up to 1",
            (("alpha = step / N_ALPHA", "alpha = step / (N_ALPHA - 1)"),),
            "The values of α are further apart: they reach from 0 to 1.",
            "this is possible, too, but the numbers then differ from the authors' 0, 0.05 … 0.95.",
            "the number that the step is divided by.",
        ),
        Mistake(
            "loss of the weights",
            (
                (
                    LOSS,
                    "loss = sum((getattr(a, b).data - w).square().mean().item()"
                    " for (a, b), w in zip(readers, weights, strict=True))",
                ),
            ),
            "The α is that for which the weights change least.",
            "what counts is the output. A small error in the weight of a large channel is worse than a "
            "large one in the weight of a small channel.",
            "what the loss compares.",
        ),
        Mistake(
            "rounded again",
            ((TRIED, "round_to_nearest(getattr(module, name).data * scales, bits, group_size) / scales"),),
            "Each α begins with the weights that the one before has rounded.",
            "errors pile up, so small α look best.",
            "the weights that are multiplied by the scales.",
        ),
        Mistake(
            "one reader",
            ((ALL_READERS, ALL_READERS.replace("readers, weights, strict=True", "readers[:1], weights")),),
            "Only the first of the readers is rounded.",
            "all of them share the scales, and all of them will be rounded: the α must suit them together.",
            "the loop over the readers.",
        ),
        Mistake(
            "not restored",
            ((RESTORED, "\n        pass\n"),),
            "The readers keep the weights of the last α.",
            "they would be rounded twice: here, and at the end on the final grid.",
            "the readers' weights when the search is over.",
        ),
    ),
    rewrites=(
        Rewrite(
            "min over a list",
            """
def best_scales(mean, readers, output, bits, group_size):
    originals, wanted, tried = [getattr(*r).data for r in readers], output(), []
    for alpha in [i / N_ALPHA for i in range(N_ALPHA)]:
        s = torch.clamp(mean**alpha, min=1e-4)
        s /= torch.sqrt(s.max() * s.min())
        for (module, name), w in zip(readers, originals):
            getattr(module, name).data = round_to_nearest(w * s, bits, group_size) / s
        tried.append((F.mse_loss(output(), wanted).item(), alpha, s))
    for (module, name), w in zip(readers, originals):
        getattr(module, name).data = w
    _, alpha, s = min(tried, key=lambda t: t[0])
    return s, alpha
""",
        ),
        Rewrite(
            "sum of squares, and exponentials",
            (
                (LOSS, "loss = ((output() - wanted) ** 2).sum().item()"),
                (CENTRED, "scales = scales * torch.exp(-0.5 * (scales.max().log() + scales.min().log()))"),
            ),
        ),
        Rewrite(
            "min over a list, and weights left rounded",
            """
def best_scales(mean, readers, output, bits, group_size):
    originals, wanted, tried = [getattr(*r).data for r in readers], output(), []
    for alpha in [i / N_ALPHA for i in range(N_ALPHA)]:
        s = torch.clamp(mean**alpha, min=1e-4)
        s /= torch.sqrt(s.max() * s.min())
        for (module, name), w in zip(readers, originals):
            getattr(module, name).data = round_to_nearest(w * s, bits, group_size) / s
        tried.append((F.mse_loss(output(), wanted).item(), alpha, s))
    _, alpha, s = min(tried, key=lambda t: t[0])
    return s, alpha
""",
            mistake="not restored",
        ),
    ),
)

# ---- predictions


def step_of_example() -> float:
    from deploy.quantization.grid import find_grid

    return find_grid(torch.tensor([[-0.3, 0.1, 0.45]]), 4, None)[0].item()


def packed_bytes() -> int:
    from deploy.quantization.grid import pack

    return 4096 * pack(torch.zeros(1, 4096, dtype=torch.uint8), 3).size(1)


def rounds_with(hessian: torch.Tensor) -> int:
    """How many codes of GPTQ differ from those of round to nearest."""
    from deploy.quantization.gptq import gptq
    from deploy.quantization.rtn import rtn

    weight = random(16, 64, seed=1)
    return int((gptq(weight, hessian, 4, None).codes != rtn(weight, 4, None).codes).sum())


QUESTIONS = (
    Question(
        "A weight has 4 bits, and each group of 64 a scale of 16 bits and a zero of 8. How many bits are "
        "that for each weight?",
        lambda: 4 + (16 + 8) / 64,
        "4 + (16 + 8) / 64 = {answer} bits.",
    ),
    Question(
        "The weights of a group lie between -0.3 and 0.45. How large is a step of its grid of 4 bits?",
        step_of_example,
        "0.75 / 15 = 0.05, and {answer} after rounding to 7 significant bits.",
        tolerance=0.01,
    ),
    Question(
        "How many bytes do the codes of a matrix of 4096 · 4096 weights take, with 3 bits each?",
        packed_bytes,
        "8 codes fit into 3 bytes: 4096 · 4096 · 3 / 8 = {answer} bytes.",
    ),
    Question(
        "The 64 inputs of a layer are not correlated, so its Hessian is diagonal. Of its 1,024 weights, how "
        "many get another code from GPTQ than from round to nearest?",
        lambda: rounds_with(torch.diag(torch.linspace(0.5, 2.0, 64))),
        "{answer}: no input can make up for the error of another.",
    ),
)

CHAPTER = Chapter(
    number="8",
    name="quantization",
    title="quantization",
    source="deploy/quantization/grid.py",
    beyond="exercises/beyond/quantization.py",
    exercises=(GRID, CODES, GPTQ, FOLD, SCALES),
    questions=QUESTIONS,
)
