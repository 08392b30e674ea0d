"""The exercises of stage 1: RMSNorm, and a model without biases."""

import torch

from exercises import properties
from exercises.measured import CHANGES, loss_change, parameters_saved
from exercises.probe import random, randomize, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 1.1 RMSNorm


def norm_of(m, width: int, eps: float):
    norm = m.RMSNorm(width, eps)
    norm.weight.data = random(width, seed=2, mean=1.0)
    return norm


def norms(m):
    """An eps that matters, a mean that is not 0, 16 bits whose squares overflow, and the gradients."""
    norm, x = norm_of(m, 24, 0.1), random(4, 5, 24, seed=1, scale=0.5, mean=0.3)
    given = x.clone()
    found = {"norm [batch, position, dimension]": norm(given), "the input afterwards": given}
    x.requires_grad_()
    y = (norm(x) * random(4, 5, 24, seed=4)).sum()
    found["gradient of the input"], found["gradient of the weight"] = torch.autograd.grad(y, (x, norm.weight))
    half = norm_of(m, 64, 1e-6).half()
    found["norm of large numbers in float16"] = half(random(40, 64, seed=3, scale=300.0).half())
    return found


def scale_does_not_matter(m):
    """Without eps, the norm of 10 x is that of x."""
    norm, x = norm_of(m, 24, 0.0), random(4, 5, 24, seed=1)
    return properties.close(norm(10 * x), norm(x))


def one_for_constants(m):
    """Without eps, the norm of a constant vector is the weight."""
    norm = norm_of(m, 24, 0.0)
    return properties.close(norm(torch.full((2, 24), 3.0)), norm.weight.expand(2, 24))


def tokens_are_apart(m):
    """The norm of a token does not depend on other tokens."""
    norm, x = norm_of(m, 24, 0.1), random(4, 5, 24, seed=1)
    return properties.close(norm(x)[1, 2], norm(x[1, 2]))


NORMED = "x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)"

RMSNORM = Exercise(
    number="1.1",
    title="RMSNorm",
    minutes=15,
    functions=("RMSNorm.forward",),
    question="LayerNorm subtracts the mean, divides by the standard deviation, multiplies by a weight and "
    "adds a bias. Which two of these four does RMSNorm leave out, and what takes the standard deviation's "
    "place?",
    shapes="x (…, n_embd), weight (n_embd,). y = x / √(mean(x²) + eps) · weight; the mean runs over the last "
    "dimension, and eps is under the root. Computed in float32; y has x's dtype.",
    steps="1. Convert x to float32.\n"
    "2. Take the mean of the squares over the last dimension, and keep that dimension.\n"
    "3. Add eps, and divide x by the root.\n"
    "4. Convert back to the dtype of x, and multiply by the weight.",
    afterwards="The mean stays in, and nothing is missed: what a norm is for is to make the scale vanish. "
    "Most models since Llama use this one.",
    probes=(norms,),
    properties={
        "multiplying the input by 10 changes nothing (without eps)": scale_does_not_matter,
        "a constant vector becomes the weight (without eps)": one_for_constants,
        "each token is normed by itself": tokens_are_apart,
    },
    mistakes=(
        Mistake(
            "eps outside the root",
            ((NORMED, "x32 / (x32.square().mean(-1, keepdim=True).sqrt() + self.eps)"),),
            "eps is added after the root has been taken.",
            "with 1e-5 that is hardly seen, until a vector is small: then a Llama's weights give other "
            "numbers than those it was trained with.",
            "the order of the root and eps.",
        ),
        Mistake(
            "no eps",
            ((" + self.eps)", ")"),),
            "eps has no effect.",
            "a vector of zeros, such as padding, would be divided by zero and become NaN.",
            "what is under the root.",
        ),
        Mistake(
            "mean subtracted",
            (("x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)"),),
            "The mean is subtracted before the division, as in LayerNorm.",
            "RMSNorm leaves the mean in. On inputs with mean 0 both agree; on others they do not.",
            "what happens to x before it is squared.",
        ),
        Mistake(
            "variance",
            ((NORMED, "x32 * torch.rsqrt(x32.var(-1, keepdim=True, correction=0) + self.eps)"),),
            "The division is by the standard deviation: the mean was subtracted before squaring, though not "
            "from x.",
            "RMSNorm knows no mean. This agrees with it only where the mean is 0.",
            "how the number under the root is computed.",
        ),
        Mistake(
            "sum",
            (("square().mean(", "square().sum("),),
            "The squares are added up, not averaged.",
            "the output is then smaller by the root of n_embd, and wider models get smaller numbers.",
            "what is done with the squares.",
        ),
        Mistake(
            "no root",
            (("torch.rsqrt(", "torch.reciprocal("),),
            "The division is by the mean of the squares, not by its root.",
            "doubling the input would halve the output. A norm should make the scale vanish.",
            "what is done with the mean of the squares.",
        ),
        Mistake(
            "multiplied",
            (("torch.rsqrt(", "torch.sqrt("),),
            "The input is multiplied by its root mean square, not divided.",
            "large vectors become larger still, from layer to layer.",
            "the function that takes the root, and what its result is used for.",
        ),
        Mistake(
            "over all tokens",
            (("mean(-1, keepdim=True)", "mean()"),),
            "There is one mean for all tokens.",
            "a token's norm then depends on the others, also on later ones: the text leaks, and generating "
            "one token at a time gives other numbers.",
            "the dimension over which the mean is taken.",
        ),
        Mistake(
            "over positions",
            (("mean(-1, keepdim=True)", "mean(1 if x.dim() > 2 else 0, keepdim=True)"),),
            "The mean runs over the positions of each dimension, not over the dimensions of each token.",
            "a token's norm then depends on the others, also on later ones.",
            "the dimension over which the mean is taken.",
        ),
        Mistake(
            "weight forgotten",
            (("self.weight * normed", "normed"),),
            "The weight has no effect.",
            "it lets each dimension have a scale of its own. At the start it is 1, so nothing shows until it "
            "is trained.",
            "the last line.",
        ),
        Mistake(
            "one plus weight",
            (("self.weight * normed", "(1 + self.weight) * normed"),),
            "The numbers are those of a factor of 1 + weight.",
            "that is Gemma's norm, whose weights start at 0. Here they start at 1.",
            "the last line.",
        ),
        Mistake(
            "in place",
            (
                (
                    NORMED,
                    "x32.mul_(torch.rsqrt(x32.detach().square().mean(-1, keepdim=True) + self.eps).detach())",
                ),
            ),
            "The input itself is changed.",
            "the residual stream is read again after the norm: x + f(norm(x)) needs x as it was. In float32, "
            "converting to float32 does not make a copy.",
            "operations that end in an underscore, or that assign to a part of x.",
        ),
        Mistake(
            "no gradient through the scale",
            (
                (
                    "torch.rsqrt(",
                    "torch.rsqrt(self.eps + x32.detach().square().mean(-1, keepdim=True)) if 1 else (",
                ),
            ),
            "The numbers are right, and the gradient is not: it does not flow through the root mean square.",
            "the norm would look like a multiplication by a constant, and training would follow another "
            "slope.",
            "detach, no_grad, data or item in what the input is divided by.",
        ),
        Mistake(
            "squares in 16 bits",
            (("x32 = x.float()", "x32 = x"),),
            "In float32 all is right. In float16, the squares of numbers above 255 become infinite.",
            "float16 ends at 65,504. In bfloat16 nothing overflows, but digits are lost in the sum.",
            "the dtype in which the squares are computed.",
        ),
        Mistake(
            "weight before the conversion",
            (("self.weight * normed.type_as(x)", "(self.weight.float() * normed).type_as(x)"),),
            "In float32 all is right. In 16 bits the last digit differs: the weight is applied before the "
            "result is rounded.",
            "this is more precise, and not what Llama does. To reproduce its numbers, round as it does.",
            "the order of the last two operations.",
        ),
    ),
    rewrites=(
        Rewrite(
            "divided by sqrt",
            ((NORMED, "x32 / torch.sqrt((x32**2).sum(-1, keepdim=True) / x32.size(-1) + self.eps)"),),
        ),
        Rewrite("torch's rms_norm", ((NORMED, "F.rms_norm(x32, (x.size(-1),), None, self.eps)"),)),
        Rewrite(
            "the vector's norm and a power",
            ((NORMED, "x32 * (x32.norm(dim=-1, keepdim=True) ** 2 / x.size(-1) + self.eps) ** -0.5"),),
        ),
        Rewrite(
            "einsum",
            (
                (
                    NORMED,
                    "x32 * (torch.einsum('...i,...i->...', x32, x32)[..., None] / x.size(-1) + "
                    "self.eps).rsqrt()",
                ),
            ),
        ),
        Rewrite(
            "with torch.float32 and to()",
            """
class RMSNorm:
    def forward(self, x):
        dtype, x = x.dtype, x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(dtype)
""",
        ),
        Rewrite(
            "norm of torch.linalg, eps last",
            """
class RMSNorm:
    def forward(self, x):
        y = x.to(torch.float32)
        root = torch.linalg.vector_norm(y, dim=-1, keepdim=True) / y.shape[-1] ** 0.5
        return (y / (root + self.eps)).to(x.dtype) * self.weight
""",
            mistake="eps outside the root",
        ),
        Rewrite(
            "layer_norm without parameters",
            """
class RMSNorm:
    def forward(self, x):
        y = F.layer_norm(x.to(torch.float32), x.shape[-1:], None, None, self.eps)
        return self.weight * y.to(x.dtype)
""",
            mistake="mean subtracted",
        ),
    ),
)

# ---- 1.2 no biases


def without_biases(m):
    """The names and shapes of a layer's parameters, and what it computes with biases that are not 0."""
    block = m.Block(m.GPTConfig(vocab_size=29, block_size=12, n_layer=1, n_head=6, n_embd=48), 0).eval()
    randomize(block)
    found = {f"parameter {name}": tuple(weight.shape) for name, weight in block.named_parameters()}
    mask = m.causal_mask(7, 7, "cpu")
    found["block [batch, position, dimension]"] = block(random(2, 7, 48, seed=1), mask, None)
    return found


BIASES = Exercise(
    number="1.2",
    title="No biases",
    minutes=10,
    functions=("RMSNorm.__init__", "Attention.__init__", "MLP.__init__"),
    question="Each layer computes W x + b, and the norm before it no longer adds a vector of its own. Which "
    "parameters of a block remain when all vectors b are gone?",
    shapes="A block has q_proj, k_proj, v_proj, o_proj (n_embd, n_embd), up_proj (4 · n_embd, n_embd), "
    "down_proj (n_embd, 4 · n_embd), and two norms with a weight (n_embd,) each. Nothing else.",
    steps="1. In Attention, define the four projections of stage 0 without a bias.\n"
    "2. In MLP, likewise the two layers.\n"
    "3. In RMSNorm, keep eps and define a weight of ones; there is no bias.",
    afterwards="Stage 1's loss is that of stage 0, within chance. Files get simpler: they hold only matrices "
    "and the norms' weights.",
    probes=(without_biases,),
    mistakes=(
        Mistake(
            "query's bias left",
            (
                (
                    "self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)",
                    "self.q_proj = nn.Linear(config.n_embd, config.n_embd)",
                ),
            ),
            "q_proj still has a bias.",
            "a model whose file has no such vector cannot be loaded; and a linear layer has a bias unless "
            "told otherwise.",
            "the four projections in Attention.",
        ),
        Mistake(
            "output's bias left",
            (
                (
                    "self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)",
                    "self.o_proj = nn.Linear(config.n_embd, config.n_embd)",
                ),
            ),
            "o_proj still has a bias.",
            "a linear layer has a bias unless told otherwise, and one that is left adds a constant to the "
            "residual stream.",
            "the four projections in Attention.",
        ),
        Mistake(
            "up's bias left",
            (("4 * config.n_embd, bias=False", "4 * config.n_embd"),),
            "up_proj still has a bias.",
            "a linear layer has a bias unless told otherwise.",
            "the two layers of the MLP.",
        ),
        Mistake(
            "down's bias left",
            (
                (
                    "nn.Linear(4 * config.n_embd, config.n_embd, bias=False",
                    "nn.Linear(4 * config.n_embd, config.n_embd",
                ),
            ),
            "down_proj still has a bias.",
            "a linear layer has a bias unless told otherwise, and one that is left adds a constant to the "
            "residual stream.",
            "the two layers of the MLP.",
        ),
        Mistake(
            "norm's bias left",
            (("self.eps = eps", "self.eps = eps\n        self.bias = nn.Parameter(torch.zeros(n_embd))"),),
            "The norm still has a bias.",
            "RMSNorm multiplies and does not shift. A parameter that nothing uses gets no gradient, and "
            "training on several devices stops at it.",
            "the parameters that RMSNorm defines.",
        ),
    ),
    rewrites=(
        Rewrite(
            "a list of layers",
            """
class Attention:
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.dropout = layer_idx, config.dropout
        self.head_dim = config.n_embd // config.n_head
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.n_embd, config.n_embd, bias=False))
""",
        ),
        Rewrite(
            "a norm of torch.ones with requires_grad",
            (
                (
                    "nn.Parameter(torch.ones(n_embd))",
                    "nn.Parameter(torch.full((n_embd,), 1.0), requires_grad=True)",
                ),
            ),
        ),
        Rewrite(
            "biases registered as None",
            (("self.eps = eps", "self.eps = eps\n        self.register_parameter('bias', None)"),),
        ),
    ),
)


# ---- the whole file


def whole_model(m):
    """The names of all parameters, logits, the loss, and the initial weights' spread."""
    model, idx = small_model(m), tokens(2, 11)
    found = {f"parameter {name}": tuple(weight.shape) for name, weight in model.named_parameters()}
    found["logits [batch, position, token]"], losses = model(idx, tokens(2, 11, seed=4))
    found["loss"] = losses["next_token"]
    fresh = m.GPT(m.GPTConfig(vocab_size=400, block_size=16, n_layer=8, n_head=4, n_embd=96))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        spread = fresh.model.layers[3].get_submodule(name).weight.std()
        found[f"initial spread of {name}"] = round(spread.item(), 3)
    return found


WHOLE = Exercise(
    number="1",
    title="The whole stage",
    minutes=20,
    functions=(),
    question="Which lines of stage 0 mention a norm or a bias? Begin with the class that is new, and follow "
    "its uses through the file.",
    shapes="All parameters but the norms' weights are matrices. The model has stage 0's layers, and its head "
    "has no bias, as before.",
    steps="1. Write RMSNorm.\n"
    "2. Use it for the two norms of a block and for the last one.\n"
    "3. Remove the biases of attention and the MLP, and the config's field for them.\n"
    "4. Remove what initializes biases.",
    probes=(whole_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "head's bias",
            (("config.vocab_size, bias=False", "config.vocab_size"),),
            "The head has got a bias.",
            "stage 0's head had none. A bias would give each token a constant advantage.",
            "lm_head.",
        ),
        Mistake(
            "LayerNorm left",
            (
                (
                    "self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)",
                    "self.input_layernorm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=False)",
                ),
            ),
            "The norm before attention is still a LayerNorm, which subtracts the mean.",
            "all norms of the stage change: two in each block and the last one.",
            "the norms that Block defines.",
        ),
        Mistake(
            "final LayerNorm left",
            (
                (
                    '"norm": RMSNorm(config.n_embd, config.norm_eps)',
                    '"norm": nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=False)',
                ),
            ),
            "The last norm, before the head, is still a LayerNorm, which subtracts the mean.",
            "all norms of the stage change: two in each block and the last one.",
            "the norm that GPT defines.",
        ),
        Mistake(
            "init still touches biases",
            (
                (
                    "nn.init.normal_(module.weight, std=0.02)\n",
                    "nn.init.normal_(module.weight, std=0.02)\n"
                    "            if isinstance(module, nn.Linear):\n                "
                    "nn.init.zeros_(module.bias)\n",
                ),
            ),
            "init_weights still sets biases to zero, and there are none.",
            "a layer without a bias has None in its place.",
            "GPT.init_weights.",
        ),
    ),
    rewrites=(),
)


# ---- predictions


def norm_of_three_four() -> float:
    x = torch.tensor([3.0, 4.0])
    return (x / x.square().mean().sqrt())[1].item()


QUESTIONS = (
    Question(
        "RMSNorm of the vector (3, 4), with eps 0 and weights 1: what is its second number?",
        norm_of_three_four,
        "√((9 + 16) / 2) = 3.536, and 4 / 3.536 = {answer}.",
        tolerance=0.01,
    ),
    Question(
        "GPT-2's size (12 layers of width 768): how many parameters go with the biases? The four projections "
        "and the second layer of the MLP have 768 biases each, the first layer has 3,072, and each of the 25 "
        "norms has 768.",
        lambda: parameters_saved("stage0_gpt", "stage1_rmsnorm"),
        "12 · (5 · 768 + 3,072) + 25 · 768 = {answer}, less than a thousandth of all.",
    ),
    Question(
        "Does RMSNorm without biases change the validation loss on TinyShakespeare?",
        lambda: loss_change("stage1_rmsnorm"),
        "Measured over three seeds: {answer}. docs/benchmarks.md has the numbers.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="1",
    name="stage1",
    title="RMSNorm, no biases",
    source="stage1_rmsnorm/model.py",
    before="stage0_gpt/model.py",
    exercises=(RMSNORM, BIASES),
    questions=QUESTIONS,
    whole=WHOLE,
)
