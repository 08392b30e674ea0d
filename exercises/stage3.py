"""The exercises of stage 3: SwiGLU."""

from exercises import properties
from exercises.measured import CHANGES, loss_change
from exercises.probe import random, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 3.1 the MLP


def gated(m):
    """The MLP of a small model, on inputs that reach both sides of the gate."""
    mlp = small_model(m).model.layers[0].mlp
    return {"MLP [token, dimension]": mlp(random(40, 48, seed=1, scale=0.6))}


def zero_for_zero(m):
    mlp = small_model(m).model.layers[0].mlp
    return properties.close(mlp(random(2, 48, scale=0.0)), random(2, 48, scale=0.0))


def tokens_are_apart(m):
    mlp, x = small_model(m).model.layers[0].mlp, random(4, 5, 48, seed=1)
    return properties.close(mlp(x)[1, 2], mlp(x[1, 2]))


GATED = "F.silu(self.gate_proj(x)) * self.up_proj(x)"

SWIGLU = Exercise(
    number="3.1",
    title="SwiGLU",
    minutes=10,
    functions=("MLP.forward",),
    question="One matrix computes values, another decides how much of each passes. Which of the two goes "
    "through silu, and how are they joined?",
    shapes="x (…, n_embd) -> gate and up (…, intermediate_size) -> (…, n_embd): down(silu(gate(x)) · up(x)), "
    "where silu(z) = z · sigmoid(z), and the product is taken element by element.",
    steps="1. Project x with gate_proj, and apply silu.\n"
    "2. Project x with up_proj.\n"
    "3. Multiply both, element by element, and project with down_proj.",
    afterwards="The gate decides for each element and each token. The names gate, up and down are those of "
    "Llama's files.",
    probes=(gated,),
    properties={
        "zero stays zero": zero_for_zero,
        "each token is computed by itself": tokens_are_apart,
    },
    mistakes=(
        Mistake(
            "gate and up exchanged",
            ((GATED, "F.silu(self.up_proj(x)) * self.gate_proj(x)"),),
            "silu is applied to up_proj, and gate_proj passes as it is.",
            "it trains just as well, since only names differ. A Llama's weights come with these names, and "
            "would give nonsense.",
            "the projection inside silu.",
        ),
        Mistake(
            "sigmoid",
            (("F.silu(", "F.sigmoid("),),
            "The gate is a sigmoid: this is a GLU.",
            "silu also multiplies with its input. Weights trained with one do not fit the other.",
            "the function of the gate.",
        ),
        Mistake(
            "gelu",
            (("F.silu(", "F.gelu("),),
            "The gate is a GELU: this is GeGLU.",
            "both curves look alike, and the loss hardly differs; weights trained with one do not quite fit "
            "the other.",
            "the function of the gate.",
        ),
        Mistake(
            "relu",
            (("F.silu(", "F.relu("),),
            "The gate is a ReLU: this is ReGLU.",
            "where the gate is negative nothing passes, and no gradient either.",
            "the function of the gate.",
        ),
        Mistake(
            "silu of the product",
            ((GATED, "F.silu(self.gate_proj(x) * self.up_proj(x))"),),
            "silu is applied to the product of both projections.",
            "the gate should decide alone; here the value takes part in the decision.",
            "the parenthesis that closes silu.",
        ),
        Mistake(
            "sum",
            (("F.silu(self.gate_proj(x)) * self", "F.silu(self.gate_proj(x)) + self"),),
            "Gate and values are added, not multiplied.",
            "a sum lets everything pass. Only a product can close the gate.",
            "what joins the two projections.",
        ),
        Mistake(
            "no silu",
            (("F.silu(self.gate_proj(x))", "self.gate_proj(x)"),),
            "There is no silu: the output is a product of two projections.",
            "a bilinear layer learns too, yet its gate never closes, and large inputs grow with their "
            "square.",
            "the function of the gate.",
        ),
        Mistake(
            "gate alone",
            ((" * self.up_proj(x)", ""),),
            "up_proj has no effect.",
            "this is a plain MLP with a narrower hidden layer: a third of the parameters lies idle.",
            "what the gate is multiplied with.",
        ),
        Mistake(
            "down forgotten",
            (("self.down_proj(" + GATED + ")", "(" + GATED + ") @ self.up_proj.weight"),),
            "The last projection is not down_proj.",
            "the shapes agree with the transpose of another matrix, and its parameters would do two jobs.",
            "the matrix that leads back to n_embd.",
        ),
    ),
    rewrites=(
        Rewrite(
            "sigmoid written out",
            ((GATED, "(lambda g: g / (1 + (-g).exp()))(self.gate_proj(x)) * self.up_proj(x)"),),
        ),
        Rewrite(
            "silu by sigmoid",
            """
class MLP:
    def forward(self, x):
        g, u = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(g * u * torch.sigmoid(g))
""",
        ),
        Rewrite(
            "one product for both",
            """
class MLP:
    def forward(self, x):
        both = x @ torch.cat((self.gate_proj.weight, self.up_proj.weight)).T
        gate, up = both.chunk(2, dim=-1)
        return nn.SiLU()(gate).mul(up) @ self.down_proj.weight.T
""",
        ),
        Rewrite(
            "one product, halves exchanged",
            """
class MLP:
    def forward(self, x):
        both = x @ torch.cat((self.gate_proj.weight, self.up_proj.weight)).T
        value, gate = both.chunk(2, dim=-1)
        return self.down_proj(value * nn.functional.silu(gate))
""",
            mistake="gate and up exchanged",
        ),
    ),
)

# ---- 3.2 the width


def widths(m):
    """Widths for models of several sizes."""
    sizes = ((128, 8), (768, 8), (768, 256), (4096, 256), (100, 8), (100, 1), (96, 64), (129, 8))
    return {f"width for n_embd {n}, in multiples of {k}": m.swiglu_width(n, k) for n, k in sizes}


def as_many_parameters(m):
    """Three matrices have at least the parameters of two that are 4 n_embd wide, and at most 5 % more."""
    ratio = 3 * m.swiglu_width(768, 8) / (2 * 4 * 768)
    return 1 <= ratio <= 1.05


WIDTH = Exercise(
    number="3.2",
    title="As many parameters as before",
    minutes=10,
    functions=("swiglu_width",),
    question="Two matrices of n_embd by 4 n_embd become three. How wide may they be, if the number of "
    "parameters is to stay?",
    shapes="3 · n_embd · width = 2 · n_embd · 4 n_embd, so width = 8/3 · n_embd, rounded up to a multiple.",
    steps="1. Write down the parameters of both layers, and solve for the width.\n"
    "2. Divide it by the multiple, round up, and multiply again.\n"
    "3. Return an int.",
    afterwards="So a difference in the loss comes from the gate, not from more parameters.",
    probes=(widths,),
    properties={
        "three matrices have as many parameters as two of 4 n_embd, or up to 5 % more": as_many_parameters
    },
    mistakes=(
        Mistake(
            "four times",
            (("8 * n_embd / (3 * multiple)", "4 * n_embd / multiple"),),
            "The width is 4 n_embd, as before.",
            "with three matrices that is half as many parameters again: a lower loss would prove nothing.",
            "the number of matrices on each side of the equation.",
        ),
        Mistake(
            "twice",
            (("8 * n_embd / (3 * multiple)", "2 * n_embd / multiple"),),
            "The width is 2 n_embd.",
            "three matrices of this width have three quarters of the parameters.",
            "the number of matrices on each side of the equation.",
        ),
        Mistake(
            "rounded down",
            (("math.ceil(", "math.floor("),),
            "The width is rounded down.",
            "published models round up, so their matrices would not fit; and a small model could end up at "
            "0.",
            "how the division by the multiple is rounded.",
        ),
        Mistake(
            "rounded to the nearest",
            (("math.ceil(", "round("),),
            "The width is rounded to the nearest multiple.",
            "published models round up, so some of their matrices would not fit.",
            "how the division by the multiple is rounded.",
        ),
        Mistake(
            "not rounded to a multiple",
            (("math.ceil(8 * n_embd / (3 * multiple)) * multiple", "math.ceil(8 * n_embd / 3)"),),
            "The width is no multiple: it is only rounded to an integer.",
            "matrix products are fastest at multiples of 8 or more, and published models have such widths.",
            "where the multiple comes in.",
        ),
        Mistake(
            "one multiple too many",
            (("math.ceil(8 * n_embd / (3 * multiple))", "(8 * n_embd // (3 * multiple) + 1)"),),
            "A width that is a multiple already gets one more.",
            "rounding down and adding 1 is not rounding up, where the division has no remainder.",
            "what happens to a width that needs no rounding.",
        ),
    ),
    rewrites=(
        Rewrite(
            "integers only",
            """
def swiglu_width(n_embd, multiple):
    return -(-8 * n_embd // (3 * multiple)) * multiple
""",
        ),
        Rewrite(
            "as in Llama's code",
            """
def swiglu_width(n_embd, multiple):
    thirds = 8 * n_embd
    step = 3 * multiple
    return multiple * ((thirds + step - 1) // step)
""",
        ),
        Rewrite(
            "a loop",
            """
def swiglu_width(n_embd, multiple):
    width = multiple
    while 3 * width < 8 * n_embd:
        width += multiple
    return width
""",
        ),
    ),
)


# ---- the whole file


def whole_model(m):
    """The parameters' shapes, logits, default widths, a given width, and impossible ones."""
    model, idx = small_model(m), tokens(2, 11)
    found = {f"parameter {name}": tuple(weight.shape) for name, weight in model.named_parameters()}
    found["logits [batch, position, token]"] = model(idx)[0]
    for n_embd in (48, 128, 768):
        width = m.GPTConfig(n_head=4, n_embd=n_embd).intermediate_size
        found[f"intermediate_size by default, for n_embd {n_embd}"] = width
    found["intermediate_size, where 100 is given"] = m.GPTConfig(intermediate_size=100).intermediate_size
    try:
        m.GPTConfig(intermediate_size=0)
        found["intermediate_size 0"] = "accepted"
    except ValueError:
        found["intermediate_size 0"] = "refused"
    fresh = m.GPT(m.GPTConfig(vocab_size=400, block_size=16, n_layer=8, n_head=4, n_embd=96))
    for name in ("gate_proj", "up_proj", "down_proj"):
        spread = fresh.model.layers[3].get_submodule(f"mlp.{name}").weight.std()
        found[f"initial spread of {name}"] = round(spread.item(), 3)
    return found


WHOLE = Exercise(
    number="3",
    title="The whole stage",
    minutes=20,
    functions=(),
    question="The MLP gets a third matrix. What does the config need to know, and what else mentions the "
    "MLP's width?",
    shapes="gate_proj and up_proj (intermediate_size, n_embd), down_proj (n_embd, intermediate_size), "
    "without biases. By default intermediate_size is 8/3 of n_embd, rounded up to a multiple of 8.",
    steps="1. Add intermediate_size to the config, with its default and its check.\n"
    "2. Define the three projections.\n"
    "3. Write forward. The initialization finds down_proj by its name.",
    probes=(whole_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "width as before",
            (("math.ceil(self.n_embd / 3) * 8", "4 * self.n_embd"),),
            "By default the MLP is 4 n_embd wide, as before.",
            "with three matrices that is half as many parameters again: a lower loss would prove nothing.",
            "the default of intermediate_size.",
        ),
        Mistake(
            "rounded down",
            (("math.ceil(self.n_embd / 3) * 8", "self.n_embd // 3 * 8"),),
            "The default width is rounded down.",
            "published models round up, so their matrices would not fit.",
            "the default of intermediate_size.",
        ),
        Mistake(
            "given width ignored",
            (("if self.intermediate_size is None:\n            self", "if True:\n            self"),),
            "A width that is given is replaced by the default.",
            "then no published model can be built whose width is another.",
            "the condition of the default.",
        ),
        Mistake(
            "zero accepted",
            (('"n_embd", "intermediate_size")', '"n_embd")'),),
            "An MLP of width 0 is accepted.",
            "it would compute nothing, without any message.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "down not scaled",
            (('endswith(("o_proj.weight", "down_proj.weight"))', 'endswith("o_proj.weight")'),),
            "down_proj starts with the same spread as the other matrices.",
            "2 · n_layer layers add to the residual stream. Scaled by the root of that number, their sum has "
            "the same size in deep models as in flat ones.",
            "GPT.init_weights.",
        ),
    ),
    rewrites=(),
)

# ---- predictions


def silu_of_minus_one() -> float:
    import torch

    return torch.nn.functional.silu(torch.tensor(-1.0)).item()


def default_width() -> int:
    from lab import stages

    return stages.load("stage3_swiglu").GPTConfig(n_embd=768).intermediate_size


QUESTIONS = (
    Question(
        "How wide is the MLP by default, if n_embd is 768?",
        default_width,
        "8/3 · 768 = {answer}, a multiple of 8 already.",
    ),
    Question(
        "silu(−1) = −1 · sigmoid(−1). How large is it? (Within 5 %)",
        silu_of_minus_one,
        "sigmoid(−1) = 0.2689, so silu(−1) = {answer}. Unlike ReLU, it lets a little pass.",
        tolerance=0.05,
    ),
    Question(
        "Stage 3 against stage 2, with as many parameters: which way does the validation loss go?",
        lambda: loss_change("stage3_swiglu"),
        "Measured over three seeds: {answer}. docs/benchmarks.md has the numbers.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="3",
    name="stage3",
    title="SwiGLU",
    source="stage3_swiglu/model.py",
    before="stage2_rope/model.py",
    beyond="exercises/beyond/stage3.py",
    exercises=(SWIGLU, WIDTH),
    questions=QUESTIONS,
    whole=WHOLE,
)
