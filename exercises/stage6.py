"""The exercises of stage 6: two routers, their balance, and the experts as a loop and sorted."""

import types
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from exercises import properties
from exercises.measured import CHANGES, loss_change
from exercises.probe import random, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 6.1 the softmax router


def router_of(m, kind: str, k: int):
    """A router of 8 experts, of which a token uses k, with a factor of 1.5 and biases that matter."""
    sizes = {"vocab_size": 29, "n_layer": 1, "n_head": 6, "n_embd": 12, "n_routed_experts": 8}
    config = m.GPTConfig(**sizes, num_experts_per_tok=k, router=kind, routed_scaling_factor=1.5)
    router = m.Router(config)
    router.weight.data = random(8, 12, seed=2, scale=0.4)
    if kind == "sigmoid":
        router.e_score_correction_bias.copy_(random(8, seed=6, scale=0.3))
    return router


def by_expert(weights, indices):
    """The weights of all experts, 0 for those that were not chosen, so that the order does not matter."""
    return weights.new_zeros(len(weights), 8).scatter(1, indices, weights)


def routing(m, kind):
    """Three experts per token, and a single one; and what a router keeps, in training only."""
    found, x = {}, random(13, 12, seed=1)
    for k in (3, 1):
        weights, indices = router_of(m, kind, k).eval()(x)
        found[f"shape of the weights for {k} of 8 experts"] = tuple(weights.shape)
        found[f"weights of all experts, {k} per token [token, expert]"] = by_expert(weights, indices)
    router = router_of(m, kind, 3).eval()
    router(x)
    found["tokens counted in evaluation"] = router.tokens_per_expert.clone()
    router.train()(x)
    found["tokens counted in training"] = router.tokens_per_expert
    found["sum of the entropies in training"] = router.entropy
    if kind == "softmax":
        found["balance loss in training"] = getattr(router, "balance_loss", None)
    return found


def routing_in_16_bits(m, kind):
    """An input in bfloat16, and autocast to it."""
    router, x = router_of(m, kind, 3).eval(), random(13, 12, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = {"weights under autocast to bfloat16": by_expert(*router(x))}
    return found | {"weights for an input in bfloat16": by_expert(*router(x.bfloat16()))}


def softmax_routing(m):
    return routing(m, "softmax")


def softmax_routing_in_16_bits(m):
    return routing_in_16_bits(m, "softmax")


def on_meta(m):
    """The course counts parameters on the meta device, which has shapes and no numbers."""
    weights, _ = router_of(m, "softmax", 3).eval().to("meta")(torch.empty(13, 12, device="meta"))
    return {"shape of the weights on the meta device": tuple(weights.shape)}


def sum_is_the_factor(kind):
    def holds(m):
        weights, _ = router_of(m, kind, 3).eval()(random(13, 12, seed=1))
        return properties.close(weights.sum(-1), torch.full((13,), 1.5))

    return holds


def each_token_alone(kind):
    def holds(m):
        router, x = router_of(m, kind, 3).eval(), random(13, 12, seed=1)
        return properties.close(by_expert(*router(x))[4:5], by_expert(*router(x[4:5])))

    return holds


def best_are_chosen(m):
    router, x = router_of(m, "softmax", 3).eval(), random(13, 12, seed=1)
    best = (x @ router.weight.T).topk(3).indices.sort().values
    return torch.equal(router(x)[1].sort().values, best)


NORMALIZED = "weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)"
TOPK = "weights, indices = probs.topk(k, dim=-1)"
LOGITS = "logits = F.linear(x.float(), self.weight.float())"

ROUTER = Exercise(
    number="6.1",
    title="The softmax router",
    minutes=25,
    functions=("Router.forward",),
    question="A token's vector is compared with one row of a matrix per expert. How do 8 scores become a few "
    "chosen experts, whose weights depend only on how the chosen ones compare with each other? And what "
    "would a single chosen expert's weight be, if it were scaled in the same way?",
    shapes="x (N, n_embd), weight (n_routed_experts, n_embd). logits = x weightᵀ; probs = softmax(logits) "
    "over the experts; weights and indices (N, k) are the k largest. For k > 1, weights / (their sum + "
    "1e-20); a lone weight stays as it is. Both times routed_scaling_factor.",
    steps="1. Compute the logits in float32, with autocast switched off: rounding could change the choice. "
    "(torch.autocast wants a device type that it knows. On the meta device, where the course counts "
    "parameters, give it cpu.)\n"
    "2. Take the softmax over the experts, and the k largest with their indices.\n"
    "3. If k is more than 1, divide the weights by their sum.\n"
    "4. In training, pass all probabilities and the indices to self.count. It returns the tokens of each "
    "expert, from which balance_loss makes the loss that GPT.forward looks for in self.balance_loss.\n"
    "5. Return the weights times the factor, and the indices. (The sigmoid router is exercise 6.3.)",
    probes=(softmax_routing, softmax_routing_in_16_bits, on_meta),
    properties={
        "the weights of a token add up to the factor": sum_is_the_factor("softmax"),
        "the experts with the largest logits are chosen": best_are_chosen,
        "a token's experts do not depend on other tokens": each_token_alone("softmax"),
    },
    mistakes=(
        Mistake(
            "not normalized",
            ((NORMALIZED, "pass"),),
            "The weights are the experts' probabilities: those of a token do not add up to 1 (before the "
            "factor).",
            "the output would shrink where the router is undecided, since much of the probability belongs to "
            "experts that were not chosen. (DeepSeek-V2 does this; Mixtral scales them.)",
            "what happens to the chosen probabilities before they are returned.",
        ),
        Mistake(
            "softmaxed twice",
            ((NORMALIZED, "weights = weights.softmax(-1)"),),
            "A softmax is taken of the chosen probabilities, which a softmax has made already.",
            "the weights do add up to 1, and are nearly equal: probabilities lie between 0 and 1, so their "
            "exponentials differ by less than a factor of 3.",
            "how the chosen weights are scaled.",
        ),
        Mistake(
            "lowest k",
            (("probs.topk(k, dim=-1)", "probs.topk(k, dim=-1, largest=False)"),),
            "The experts with the lowest scores are chosen.",
            "a low score would mean a choice, and also a low weight: the better an expert becomes for a "
            "token, the less likely it is to be chosen. No error reveals it.",
            "the call that chooses.",
        ),
        Mistake(
            "softmax over tokens",
            (("F.softmax(logits, dim=-1)", "F.softmax(logits, dim=0)"),),
            "The softmax runs over the tokens of an expert, not over the experts of a token.",
            "a token's weights then depend on the other tokens, also on later ones and on other sequences: "
            "the text leaks.",
            "the dimension of the softmax, in logits (N, n_routed_experts).",
        ),
        Mistake(
            "equal weights",
            ((NORMALIZED, "weights = torch.full_like(weights, 1 / k)"),),
            "All chosen experts have the same weight.",
            "the router is trained through its weights only, since a choice has no gradient. With constant "
            "weights it would learn nothing.",
            "how the chosen weights are scaled.",
        ),
        Mistake(
            "factor forgotten",
            (("weights * self.config.routed_scaling_factor", "weights"),),
            "routed_scaling_factor has no effect.",
            "it balances the routed experts with the shared one. It is 1 here by default and 2.5 in "
            "DeepSeek-V3, whose weights would give a different model without it.",
            "the values that are returned.",
        ),
        Mistake(
            "factor before scaling",
            (
                (TOPK, f"{TOPK}\n            weights = self.config.routed_scaling_factor * weights"),
                ("weights * self.config.routed_scaling_factor", "weights"),
            ),
            "The factor has an effect on a lone weight only, not on those of several experts.",
            "it cancels out if it is applied before the weights are divided by their sum.",
            "the order of scaling the weights and multiplying by routed_scaling_factor.",
        ),
        Mistake(
            "lone weight scaled to 1",
            (("if k > 1:", "if True:"),),
            "With one expert per token, its weight is always 1.",
            "a constant has no gradient, so the router would never learn. The probability itself must "
            "multiply the output, as in Switch.",
            "the case of a single expert.",
        ),
        Mistake(
            "counted in evaluation",
            (("if self.training:", "if True:"),),
            "Tokens are counted in evaluation too.",
            "the balance would follow text that the model is only tested on, and evaluating a model would "
            "change how it is trained.",
            "when the statistics are kept.",
        ),
        Mistake(
            "nothing in training",
            (("if self.training:", "if False:"),),
            "In training, the router neither counts its tokens nor keeps a balance loss.",
            "without them nothing shows how busy the experts are, and a few get nearly all tokens.",
            "what the router does in training.",
        ),
        Mistake(
            "no balance loss",
            (("self.balance_loss = balance_loss(probs, counts)", "pass"),),
            "In training, the router keeps no balance loss.",
            "GPT.forward collects it from there. Without this loss a few experts get nearly all tokens.",
            "what the router does in training.",
        ),
        Mistake(
            "balance of the chosen",
            (
                ("balance_loss(probs, counts)", "balance_loss(by_expert(probs, indices), counts)"),
                (
                    "k = self.config.num_experts_per_tok",
                    "k = self.config.num_experts_per_tok\n"
                    "        by_expert = lambda p, i: torch.zeros_like(p).scatter(1, i, p.gather(1, i))",
                ),
            ),
            "The balance loss sees the probabilities of the chosen experts only.",
            "it should lower the probability of a busy expert for all tokens, also for those that did not "
            "choose it this time.",
            "the probabilities that are passed to balance_loss.",
        ),
        Mistake(
            "rounded under autocast",
            (("with torch.autocast(device_type, enabled=False):", "if True:"),),
            "In float32 all is right. Under autocast, the logits are computed in 16 bits.",
            "two experts with nearly equal scores would change places by rounding, and then another expert "
            "answers: a small error becomes a large one.",
            "the line that computes the logits, and the context in which it runs.",
        ),
        Mistake(
            "logits in 16 bits",
            ((LOGITS, "logits = F.linear(x, self.weight.to(x.dtype))"),),
            "For float32 all is right. For an input in bfloat16, the logits are computed in 16 bits.",
            "two experts with nearly equal scores would change places by rounding, and then another expert "
            "answers: a small error becomes a large one.",
            "the dtypes in the line that computes the logits.",
        ),
        Mistake(
            "autocast on the meta device",
            (('"cpu" if x.is_meta else x.device.type', "x.device.type"),),
            "On the meta device, autocast raises an exception: it does not know that device.",
            "the course builds models without numbers to count their parameters and their arithmetic.",
            "the device type that autocast is given.",
        ),
    ),
    rewrites=(
        Rewrite(
            "top k of the logits, then a softmax of these",
            (
                (
                    TOPK,
                    "chosen, indices = logits.topk(k, dim=-1)\n"
                    "            weights = chosen.softmax(-1) if k > 1 else probs.gather(1, indices)",
                ),
            ),
        ),
        Rewrite(
            "sorted, smallest first",
            ((TOPK, "weights, indices = (t[:, -k:] for t in probs.sort(-1))"),),
        ),
        Rewrite(
            "exponentials written out, one return for each kind of router",
            """
class Router:
    def forward(self, x):
        n = self.config.num_experts_per_tok
        with torch.autocast(x.device.type.replace("meta", "cpu"), enabled=False):
            scores = x.to(torch.float32) @ self.weight.to(torch.float32).T
        if self.config.router != "softmax":
            raise NotImplementedError
        e = (scores - scores.amax(1, keepdim=True)).exp()
        p = e / e.sum(1, keepdim=True)
        order = p.argsort(dim=1, descending=True)[:, :n]
        w = torch.take_along_dim(p, order, 1)
        if self.training:
            self.balance_loss = balance_loss(p, self.count(p, order))
        if n > 1:
            w = w / w.sum(1, keepdim=True)
        return self.config.routed_scaling_factor * w, order
""",
        ),
        Rewrite(
            "a mask in place of a choice",
            (
                (
                    NORMALIZED,
                    "weights = logits.gather(1, indices).softmax(1)",
                ),
            ),
        ),
        Rewrite(
            "the softmax of all experts, gathered",
            """
class Router:
    def forward(self, x):
        k = self.config.num_experts_per_tok
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            scores = torch.einsum("nd,ed->ne", x.float(), self.weight.float())
        p = scores.softmax(1)
        indices = scores.topk(k).indices
        if self.training:
            self.balance_loss = balance_loss(p, self.count(p, indices))
        return p.gather(1, indices) * self.config.routed_scaling_factor, indices
""",
            mistake="not normalized",
        ),
        Rewrite(
            "scaled whatever k is",
            """
class Router:
    def forward(self, x):
        k = self.config.num_experts_per_tok
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            scores = torch.einsum("nd,ed->ne", x.float(), self.weight.float())
        weights, indices = scores.topk(k)
        if self.training:
            self.balance_loss = balance_loss(scores.softmax(1), self.count(scores.softmax(1), indices))
        return weights.softmax(1) * self.config.routed_scaling_factor, indices
""",
            mistake="lone weight scaled to 1",
        ),
    ),
    afterwards="A choice has no gradient. The router learns through the weights: if an expert's output "
    "lowers the loss, its weight grows, and with it the chance that similar tokens choose it.",
)

# ---- 6.2 balance


def balance(m):
    """Unequal and equal experts, two choices per token; and the gradient."""
    probs = random(13, 8, seed=1).softmax(-1).requires_grad_()
    counts = torch.tensor([9.0, 0, 4, 3, 1, 2, 5, 2])
    loss = m.balance_loss(probs, counts)
    found = {"balance loss of unequal experts": loss, "it has a gradient": loss.requires_grad}
    if loss.requires_grad:
        found["its gradient [token, expert]"] = torch.autograd.grad(loss, probs)[0]
    equal = m.balance_loss(torch.full((12, 8), 1 / 8), torch.full((8,), 3.0))
    found["balance loss of equal experts"] = equal
    return found


@contextmanager
def two_processes(m):
    """As if a second process had the same tokens."""
    alone, m.sum_over_processes = m.sum_over_processes, lambda x: x.mul_(2)
    try:
        yield
    finally:
        m.sum_over_processes = alone


def counting(m):
    """Two calls, of which the second has a probability of 0, in two processes."""
    router, found = router_of(m, "softmax", 2), {}
    probs = random(13, 8, seed=1).softmax(-1)
    certain = torch.eye(8)[:3]
    with two_processes(m):
        for call, p in (("first", probs), ("second", certain)):
            found[f"what the {call} call returns [expert]"] = router.count(p, p.topk(2).indices)
            found[f"tokens_per_expert after the {call} call [expert]"] = router.tokens_per_expert.clone()
            found[f"entropy after the {call} call"] = router.entropy.clone()
    return found


def one_if_equal(m):
    return properties.close(m.balance_loss(torch.full((12, 8), 1 / 8), torch.full((8,), 3.0)), torch.ones(()))


def n_if_all_in_one(m):
    """If one expert gets all tokens with probability 1, the loss is the number of experts."""
    all_in_one = torch.eye(8)[0]
    return properties.close(m.balance_loss(all_in_one.expand(12, 8), 24 * all_in_one), torch.tensor(8.0))


LOSS = "len(counts) * (counts / counts.sum() * probs.mean(0)).sum()"
ENTROPY = "self.entropy -= (probs * probs.clamp_min(1e-20).log()).sum()"

BALANCE = Exercise(
    number="6.2",
    title="Counting and balancing",
    minutes=20,
    functions=("balance_loss", "Router.count"),
    question="How many tokens an expert gets is a count, and a count has no gradient. By which "
    "differentiable quantity can it be multiplied, so that the sum is smallest when the experts are equally "
    "busy, and its gradient lowers the scores of the busy ones?",
    shapes="balance_loss: probs (N, E), counts (E,) -> a number, E · Σ_e (share of the choices)_e · (mean "
    "probability)_e. count: probs (N, E), indices (N, k) -> how many tokens chose each expert, (E,) in "
    "float32, of all processes. It adds these to self.tokens_per_expert, and the sum of the tokens' "
    "entropies −Σ p log p to self.entropy, of this process only.",
    steps="1. In count, count how often each expert occurs among all N · k indices.\n"
    "2. Add the counts up over the processes, with sum_over_processes.\n"
    "3. Add them to tokens_per_expert, and the entropies to entropy. (A probability of 0 must not become "
    "NaN.)\n"
    "4. In balance_loss, divide the counts by their sum, and average the probabilities over the tokens.\n"
    "5. Multiply both, expert by expert, add up, and multiply by the number of experts.",
    probes=(balance, counting),
    properties={
        "the loss of equally busy experts is 1": one_if_equal,
        "the loss is the number of experts if one gets everything": n_if_all_in_one,
    },
    mistakes=(
        Mistake(
            "no n",
            ((LOSS, "(counts / counts.sum() * probs.mean(0)).sum()"),),
            "The loss is not multiplied by the number of experts.",
            "balance would count for less the more experts there are: equally busy ones should give 1 "
            "whatever their number.",
            "the factors of balance_loss.",
        ),
        Mistake(
            "load squared",
            ((LOSS, "len(counts) * (counts / counts.sum()).square().sum()"),),
            "The shares of the tokens are squared, and the probabilities do not occur.",
            "counts have no gradient. The number would measure the balance, and would teach the router "
            "nothing.",
            "what the shares are multiplied by.",
        ),
        Mistake(
            "mean score squared",
            ((LOSS, "len(counts) * probs.mean(0).square().sum()"),),
            "The mean probabilities are squared, and the counts do not occur.",
            "the loss would balance the probabilities, and not the choices: an expert that is always a close "
            "second gets no tokens, and looks busy.",
            "what the mean probabilities are multiplied by.",
        ),
        Mistake(
            "counts, not shares",
            ((LOSS, "len(counts) * (counts * probs.mean(0)).sum()"),),
            "The counts themselves are used, not their shares.",
            "the loss would grow with the batch.",
            "what the counts are divided by.",
        ),
        Mistake(
            "share of the tokens",
            ((LOSS, "len(counts) * (counts / len(probs) * probs.mean(0)).sum()"),),
            "The counts are divided by the number of tokens, and not by that of the choices.",
            "each token chooses several experts, so these shares add up to k. Equally busy experts would "
            "give k, not 1.",
            "what the counts are divided by.",
        ),
        Mistake(
            "sum over tokens",
            (("probs.mean(0)", "probs.sum(0)"),),
            "The probabilities are added up over the tokens, not averaged.",
            "the loss would grow with the batch.",
            "what is done with the probabilities of an expert.",
        ),
        Mistake(
            "first choices only",
            (("chosen = indices.flatten()", "chosen = indices[:, 0].contiguous()"),),
            "Only the first choice of each token is counted.",
            "an expert that is everybody's second choice is as busy as one that is everybody's first.",
            "which indices are counted.",
        ),
        Mistake(
            "replaced, not added",
            (("self.tokens_per_expert += counts", "self.tokens_per_expert.copy_(counts)"),),
            "tokens_per_expert holds the tokens of the last call only.",
            "an optimizer step can consist of several batches, whose gradients are accumulated. Their tokens "
            "must be added up too.",
            "what happens to tokens_per_expert.",
        ),
        Mistake(
            "total returned",
            (("return counts", "return self.tokens_per_expert.clone()"),),
            "The returned counts contain the tokens of earlier calls.",
            "the balance loss belongs to this batch: it multiplies this batch's probabilities.",
            "what count returns.",
        ),
        Mistake(
            "one process alone",
            (("counts = sum_over_processes(counts)", "pass"),),
            "The tokens of the other processes are not counted.",
            "each process would move its biases by its own tokens, and the copies of the model would drift "
            "apart.",
            "what comes between counting and adding to the statistics.",
        ),
        Mistake(
            "entropy of all processes",
            (
                (
                    ENTROPY,
                    "self.entropy -= sum_over_processes((probs * probs.clamp_min(1e-20).log()).sum())",
                ),
            ),
            "The entropies are added up over the processes.",
            "after_step does that once for each step. Here they would be counted twice, and every forward "
            "pass would wait for one more message.",
            "what is added to the entropy.",
        ),
        Mistake(
            "entropy's sign",
            ((ENTROPY, ENTROPY.replace("-=", "+=")),),
            "The entropy has the wrong sign.",
            "the logarithm of a probability is negative, and an entropy is not: it is 0 for a router that is "
            "certain, and log E for one that knows nothing.",
            "the line that adds to the entropy.",
        ),
        Mistake(
            "mean entropy",
            ((ENTROPY, ENTROPY.replace(".sum()", ".sum(-1).mean()")),),
            "The entropy is averaged over the tokens, not added up.",
            "after_step divides by the number of tokens since the last step. With batches of different "
            "sizes, a sum of means is not the mean.",
            "the line that adds to the entropy.",
        ),
        Mistake(
            "logarithm of 0",
            (("probs.clamp_min(1e-20).log()", "probs.log()"),),
            "Where a probability is 0, the entropy becomes NaN.",
            "in 0 · log 0 the logarithm is infinite. The limit is 0, but the product of 0 and infinity is "
            "not a number.",
            "the argument of the logarithm.",
        ),
    ),
    rewrites=(
        Rewrite("dot product", ((LOSS, "len(counts) / counts.sum() * torch.dot(counts, probs.mean(0))"),)),
        Rewrite(
            "counts relative to their mean",
            ((LOSS, "(counts / counts.mean() * probs.mean(0)).sum()"),),
        ),
        Rewrite(
            "one_hot and xlogy",
            """
def balance_loss(probs, counts):
    share = counts / counts.sum()
    return probs.shape[1] * torch.einsum("e,ne->", share, probs) / probs.shape[0]

class Router:
    @torch.no_grad()
    def count(self, probs, indices):
        counts = F.one_hot(indices, probs.shape[1]).sum((0, 1)).float()
        sum_over_processes(counts)
        self.tokens_per_expert.add_(counts)
        self.entropy.add_(-torch.xlogy(probs, probs).sum())
        return counts
""",
        ),
        Rewrite(
            "a comparison with each expert",
            """
class Router:
    @torch.no_grad()
    def count(self, probs, indices):
        experts = torch.arange(probs.size(-1), device=indices.device)
        counts = sum_over_processes((indices[..., None] == experts).float().sum(dim=(0, 1)))
        self.tokens_per_expert = self.tokens_per_expert + counts
        self.entropy = self.entropy + torch.special.entr(probs).sum()
        return counts
""",
        ),
        Rewrite(
            "mean where a sum belongs",
            """
def balance_loss(probs, counts):
    share = counts / counts.sum()
    importance = probs.mean(dim=0)
    return len(share) * (share * importance).mean()
""",
            mistake="no n",
        ),
    ),
    afterwards="The counts say which experts are busy, and the probabilities carry the gradient. 6.3 "
    "balances the experts without any loss.",
)

# ---- 6.3 the sigmoid router


def sigmoid_routing(m):
    return routing(m, "sigmoid")


def sigmoid_routing_in_16_bits(m):
    return routing_in_16_bits(m, "sigmoid")


def without_bias(m):
    """Without biases, the experts with the largest scores are chosen."""
    router, x = router_of(m, "sigmoid", 3).eval(), random(13, 12, seed=1)
    router.e_score_correction_bias.zero_()
    best = (x @ router.weight.T).topk(3).indices.sort().values
    return torch.equal(router(x)[1].sort().values, best)


def large_bias_decides(m):
    """An expert with a large bias is chosen by all tokens."""
    router, x = router_of(m, "sigmoid", 3).eval(), random(13, 12, seed=1)
    router.e_score_correction_bias[5] = 10.0
    return bool((router(x)[1] == 5).any(1).all())


CHOICE = "indices = (scores + self.e_score_correction_bias).topk(k, dim=-1).indices"
WEIGHTS = "weights = scores.gather(1, indices)"

SIGMOID = Exercise(
    number="6.3",
    title="The sigmoid router and its bias",
    minutes=15,
    functions=("Router.forward",),
    question="A bias should send more tokens to an idle expert. What would happen to the output of an expert "
    "if its bias also took part in its weight?",
    shapes="scores = sigmoid(logits), (N, n_routed_experts). The k experts with the largest score + "
    "e_score_correction_bias are chosen; their weights are their scores without the bias, scaled as in 6.1. "
    "For the statistics, probs are all scores, divided by their sum.",
    steps="1. Keep the softmax router of exercise 6.1, and add the second kind beside it.\n"
    "2. Take the sigmoid of the logits.\n"
    "3. Add the bias, and take the indices of the k largest. The sums themselves are not needed.\n"
    "4. Gather the scores at these indices.\n"
    "5. Scale them as before, also by the factor, and count in training. There is no balance loss.",
    probes=(sigmoid_routing, sigmoid_routing_in_16_bits),
    properties={
        "the weights of a token add up to the factor": sum_is_the_factor("sigmoid"),
        "without a bias, the experts with the largest logits are chosen": without_bias,
        "an expert with a large bias is always chosen": large_bias_decides,
        "a token's experts do not depend on other tokens": each_token_alone("sigmoid"),
    },
    mistakes=(
        Mistake(
            "bias weighs",
            ((WEIGHTS, "weights = (scores + self.e_score_correction_bias).gather(1, indices)"),),
            "The right experts are chosen, and the bias is part of their weights.",
            "the bias would turn an idle expert's output up as well, by an amount that no gradient has "
            "learned. It should only take part in the choice.",
            "the numbers that the weights are made from.",
        ),
        Mistake(
            "bias unused",
            ((CHOICE, "indices = scores.topk(k, dim=-1).indices"),),
            "The bias has no effect.",
            "nothing else balances the sigmoid router: after_step moves the bias, and the choice would not "
            "change.",
            "the numbers that are compared in the choice.",
        ),
        Mistake(
            "bias subtracted",
            ((CHOICE, CHOICE.replace("scores +", "scores -")),),
            "The bias is subtracted.",
            "after_step raises the bias of an idle expert. Subtracted, it would make idle experts idler, "
            "until one or two get everything.",
            "the sign of the bias in the choice.",
        ),
        Mistake(
            "bias added to the logits",
            (
                ("scores = logits.sigmoid()", "scores = (logits + self.e_score_correction_bias).sigmoid()"),
                (CHOICE, "indices = scores.topk(k, dim=-1).indices"),
            ),
            "The bias is added to the logits, before the sigmoid.",
            "it then changes the scores, and with them the weights. It also means something else: a step of "
            "0.001 is less where the sigmoid is flat.",
            "the place where the bias is added.",
        ),
        Mistake(
            "softmax scores",
            (("scores = logits.sigmoid()", "scores = logits.softmax(-1)"),),
            "The scores are a softmax over the experts, and not sigmoids.",
            "with a sigmoid, the experts do not compete: one expert's score does not fall because another's "
            "rises. The same bias also means more among small probabilities.",
            "the function that makes scores of logits.",
        ),
        Mistake(
            "not normalized",
            ((NORMALIZED, "pass"),),
            "The weights are the scores themselves: those of a token do not add up to 1 (before the factor).",
            "sigmoids have no fixed sum, so a token with many high scores would get a larger output.",
            "what happens to the chosen scores before they are returned.",
        ),
        Mistake(
            "divided by all",
            ((WEIGHTS, "weights = probs.gather(1, indices)"), (NORMALIZED, "pass")),
            "The chosen scores are divided by the sum of all scores, not by that of the chosen.",
            "the sum of a token's weights would be well below 1, and would depend on experts that do not "
            "contribute.",
            "which scores the sum consists of.",
        ),
        Mistake(
            "lone weight divided by all",
            ((WEIGHTS, "weights = probs.gather(1, indices)"),),
            "For several experts all is right. With one per token, its weight is its share of all scores, "
            "not its score.",
            "the sum over all experts serves the statistics only. The weight would fall where other experts "
            "are good too.",
            "the numbers that the weights are made from.",
        ),
        Mistake(
            "lone weight scaled to 1",
            (("if k > 1:", "if True:"),),
            "With one expert per token, its weight is always 1.",
            "a constant has no gradient, so the router would never learn.",
            "the case of a single expert.",
        ),
        Mistake(
            "factor forgotten",
            (("weights * self.config.routed_scaling_factor", "weights"),),
            "routed_scaling_factor has no effect.",
            "it balances the routed experts with the shared one; in DeepSeek-V3 it is 2.5.",
            "the values that are returned.",
        ),
        Mistake(
            "lowest k",
            ((CHOICE, CHOICE.replace("dim=-1)", "dim=-1, largest=False)")),),
            "The experts with the lowest scores are chosen.",
            "the better an expert becomes for a token, the less likely it would be chosen. No error reveals "
            "it.",
            "the call that chooses.",
        ),
        Mistake(
            "not counted",
            (("if self.training:", "if False:"),),
            "In training, the router does not count its tokens.",
            "after_step moves the biases by these counts, so the experts would never be balanced.",
            "what the router does in training.",
        ),
        Mistake(
            "raw scores counted",
            (("probs = scores / scores.sum(-1, keepdim=True)", "probs = scores"),),
            "The weights are right. The entropy is computed from scores that do not add up to 1.",
            "an entropy belongs to a distribution. With raw scores it would rise and fall with their sum, "
            "and the log would show nonsense.",
            "the probabilities that are passed to count.",
        ),
    ),
    rewrites=(
        Rewrite(
            "argsort and take_along_dim",
            (
                (
                    CHOICE,
                    "biased = self.e_score_correction_bias + scores\n"
                    "            indices = biased.argsort(1, descending=True)[:, :k]",
                ),
                (WEIGHTS, "weights = scores.take_along_dim(indices, 1)"),
            ),
        ),
        Rewrite(
            "the bias taken off again",
            (
                (CHOICE, "biased, indices = (scores + self.e_score_correction_bias).topk(k, dim=-1)"),
                (WEIGHTS, "weights = biased - self.e_score_correction_bias[indices]"),
            ),
        ),
        Rewrite(
            "the sigmoid written out, no other router",
            """
class Router:
    def forward(self, x):
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):
            s = 1 / (1 + torch.exp(-(x.float() @ self.weight.float().T)))
        _, best = torch.topk(s + self.e_score_correction_bias[None], self.config.num_experts_per_tok)
        w = torch.gather(s, -1, best)
        if self.training:
            self.count(F.normalize(s, p=1, dim=-1), best)
        if best.shape[1] > 1:
            w = F.normalize(w, p=1, dim=-1)
        return w * self.config.routed_scaling_factor, best
""",
        ),
        Rewrite(
            "weights and choice in one call",
            """
class Router:
    def forward(self, x):
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            s = torch.sigmoid(F.linear(x.float(), self.weight.float()))
        w, best = torch.topk(s + self.e_score_correction_bias, self.config.num_experts_per_tok)
        if self.training:
            self.count(s / s.sum(-1, keepdim=True), best)
        if best.shape[1] > 1:
            w = w / w.sum(-1, keepdim=True)
        return w * self.config.routed_scaling_factor, best
""",
            mistake="bias weighs",
        ),
    ),
    afterwards="The bias decides which experts are asked, and the score how much their answer counts. So "
    "balancing does not change what the model is trained for. 6.6 moves the bias.",
)

# ---- 6.4 the experts in a loop


def inputs(k: int):
    """13 tokens choose k of 8 experts unequally, with different weights; none chooses the last one."""
    scores = random(13, 7, seed=4) + torch.tensor([1.0, 0, 0, -9, 0, 0.5, -0.5])
    weights = random(13, k, seed=5).abs() + 0.1
    gate_up, down = random(8, 48, 16, seed=1, scale=0.3).mT, random(8, 16, 24, seed=2, scale=0.3).mT
    return random(13, 16, seed=3), weights, scores.topk(k).indices, gate_up, down


def experts(function):
    """What a function computes for the experts, and the gradients."""
    found = {}
    for k in (2, 1):
        found[f"output with {k} of 8 experts per token [token, dimension]"] = function(*inputs(k))
    x, weights, *rest = inputs(2)
    y = function(x.requires_grad_(), weights.requires_grad_(), *rest)
    wanted = {"tokens": x, "weights": weights}
    gradients = torch.autograd.grad(
        (y * random(13, 16, seed=6)).sum(), list(wanted.values()), allow_unused=True
    )
    for name, gradient in zip(wanted, gradients, strict=True):
        found[f"gradient of the {name}"] = torch.zeros_like(wanted[name]) if gradient is None else gradient
    return found


def dtype_in_16_bits(function):
    """The dtype for tokens and matrices in bfloat16, whose sums may be rounded in any order."""
    x, weights, indices, gate_up, down = inputs(2)
    y = function(x.bfloat16(), weights, indices, gate_up.bfloat16(), down.bfloat16())
    return {"dtype of the output for tokens in bfloat16": str(y.dtype)}


def looped(m):
    return experts(m.looped_experts)


def looped_in_16_bits(m):
    return dtype_in_16_bits(m.looped_experts)


def order_of_tokens(name):
    """Tokens in another order give the same outputs in that order."""

    def holds(m):
        function = getattr(with_grouped_mm(m), name)
        x, weights, indices, *matrices = inputs(2)
        order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
        y = function(x, weights, indices, *matrices)
        return properties.close(function(x[order], weights[order], indices[order], *matrices), y[order])

    return holds


def order_of_choices(name):
    """It does not matter which expert is a token's first choice."""

    def holds(m):
        function = getattr(with_grouped_mm(m), name)
        x, weights, indices, *matrices = inputs(2)
        y = function(x, weights, indices, *matrices)
        return properties.close(function(x, weights.flip(1), indices.flip(1), *matrices), y)

    return holds


def linear_in_the_weights(name):
    def holds(m):
        function = getattr(with_grouped_mm(m), name)
        x, weights, *rest = inputs(2)
        return properties.close(function(x, 2 * weights, *rest), 2 * function(x, weights, *rest))

    return holds


LOOP = Exercise(
    number="6.4",
    title="The experts in a loop",
    minutes=20,
    functions=("looped_experts",),
    question="Expert e has to process all tokens that chose it, as their first choice or their second. How "
    "can these tokens be found, and what must happen to its output, since another expert adds to the same "
    "token?",
    shapes="For expert e with n tokens: x of these (n, n_embd) @ gate_up[e] (n_embd, 2 width) -> gate and up "
    "(n, width); (silu(gate) · up) @ down[e] -> (n, n_embd). Each row times weights[token, choice], added to "
    "the token's row of y.",
    steps="1. Begin with zeros, (N, n_embd).\n"
    "2. For each expert, find where it occurs in indices: the row is the token, the column the choice.\n"
    "3. Compute the gated MLP of these tokens with the expert's matrices.\n"
    "4. Multiply each row by the weight at that row and column, and add it to the token's output.",
    probes=(looped, looped_in_16_bits),
    properties={
        "tokens in another order give the same outputs in that order": order_of_tokens("looped_experts"),
        "the order of a token's choices does not matter": order_of_choices("looped_experts"),
        "doubling the weights doubles the output": linear_in_the_weights("looped_experts"),
    },
    mistakes=(
        Mistake(
            "assigned, not added",
            (
                (
                    "y.index_add_(0, token, output * weights[token, choice, None])",
                    "y[token] = output * weights[token, choice, None]",
                ),
            ),
            "Each token has the output of one expert only, the last one computed.",
            "a later expert replaces what an earlier one has written. The outputs should add up.",
            "the line that stores an expert's output.",
        ),
        Mistake(
            "weights forgotten",
            (("weights[token, choice, None]", "torch.ones_like(weights)[token, choice, None]"),),
            "The outputs of the experts are added up without their weights.",
            "the weights are the only way in which the loss reaches the router, so it would learn nothing.",
            "what an expert's output is multiplied by.",
        ),
        Mistake(
            "first weight for all",
            (("weights[token, choice, None]", "weights[token, 0, None]"),),
            "Every output is multiplied by the weight of the token's first choice.",
            "each expert has a weight of its own, beside its index.",
            "the column that the weight is taken from.",
        ),
        Mistake(
            "first choice only",
            (("(indices == e)", "(indices[:, :1] == e)"),),
            "Only the first choice of each token is computed.",
            "the other experts would be chosen and counted, and would never answer.",
            "which columns of indices are searched.",
        ),
        Mistake(
            "gate and up exchanged",
            (("gate, up = ", "up, gate = "),),
            "The two halves of gate_up are exchanged: silu is applied to what should be up.",
            "the model would train as well, but weights trained elsewhere would give other numbers.",
            "the order of the two halves.",
        ),
        Mistake(
            "no silu",
            (("F.silu(gate)", "gate"),),
            "The gate has no activation function.",
            "the expert would be a product of two linear functions of the token, with no gate that closes.",
            "what is multiplied in the middle of the expert.",
        ),
        Mistake(
            "first expert skipped",
            (("range(len(down))", "range(1, len(down))"),),
            "Expert 0 is never computed.",
            "the tokens that chose it miss a part of their output.",
            "the range of the loop.",
        ),
        Mistake(
            "mean of the experts",
            (("return y.type_as(x)", "return (y / indices.size(1)).type_as(x)"),),
            "The outputs are averaged, not added up.",
            "the weights add up to 1 already, so the output would be too small by the number of choices.",
            "what happens after the loop.",
        ),
        Mistake(
            "not converted back",
            (("return y.type_as(x)", "return y"),),
            "The output is in float32, whatever the dtype of the tokens.",
            "the weights are in float32, and so is their product with an output. The residual stream should "
            "keep its dtype.",
            "the dtype of what is returned.",
        ),
        Mistake(
            "weights of the wrong tokens",
            (("weights[token, choice, None]", "weights[: len(token)].gather(1, choice[:, None])"),),
            "The weights are taken from the first tokens, not from those that chose the expert.",
            "the rows of an expert's output belong to the tokens that were found, in their order.",
            "the rows that the weights are taken from.",
        ),
    ),
    rewrites=(
        Rewrite(
            "a loop over tokens",
            """
def looped_experts(x, weights, indices, gate_up, down):
    out = []
    for row, w, chosen in zip(x, weights, indices):
        total = 0
        for weight, e in zip(w, chosen):
            gate, up = (row @ gate_up[e]).chunk(2)
            total = total + weight * ((F.silu(gate) * up) @ down[e])
        out.append(total)
    return torch.stack(out).to(x.dtype)
""",
        ),
        Rewrite(
            "a mask for each expert, rows added in place",
            """
def looped_experts(x, weights, indices, gate_up, down):
    y = torch.zeros_like(x, dtype=torch.float32)
    for e, (a, b) in enumerate(zip(gate_up, down)):
        w = (weights * (indices == e)).sum(1)
        rows = (indices == e).any(1)
        if rows.any():
            h = x[rows] @ a
            width = h.shape[-1] // 2
            h = F.silu(h[:, :width]) * h[:, width:]
            y[rows] += w[rows, None] * (h @ b)
    return y.to(x.dtype)
""",
        ),
        Rewrite(
            "every expert for every token",
            """
def looped_experts(x, weights, indices, gate_up, down):
    return dense_experts(x, weights, indices, gate_up, down)
""",
        ),
        Rewrite(
            "a mask, rows assigned",
            """
def looped_experts(x, weights, indices, gate_up, down):
    y = torch.zeros_like(x, dtype=torch.float32)
    for e in range(gate_up.shape[0]):
        w = (weights * (indices == e)).sum(1)
        rows = (indices == e).any(1)
        a, b = torch.split(x[rows] @ gate_up[e], gate_up.shape[2] // 2, dim=1)
        y[rows] = w[rows, None] * (a * torch.sigmoid(a) * b @ down[e])
    return y.to(x.dtype)
""",
            mistake="assigned, not added",
        ),
    ),
    afterwards="This is right, and slow on a GPU: many small products, and the CPU waits at each expert "
    "until the GPU reports how many tokens there are. 6.5 needs neither.",
)

# ---- 6.5 the experts, sorted


def with_grouped_mm(m):
    """The module; with PyTorch 2.9, which has no grouped_mm, it gets one."""
    if not hasattr(m.F, "grouped_mm"):
        m.F = types.SimpleNamespace(**(vars(F) | {"grouped_mm": grouped_mm}))
    return m


def grouped_mm(x, weight, *, offs):
    """What F.grouped_mm does: the rows of x from offs[e - 1] to offs[e] times weight[e]."""
    if offs.dtype != torch.int32:
        raise RuntimeError("Offsets have to be int32")
    y, start = x.new_zeros(len(x), weight.size(2)), 0
    for matrix, end in zip(weight, offs.tolist(), strict=True):
        y[start:end] = x[start:end] @ matrix
        start = end
    return y


def grouped(m):
    return experts(with_grouped_mm(m).grouped_experts)


def grouped_in_16_bits(m):
    return dtype_in_16_bits(with_grouped_mm(m).grouped_experts)


BACK = "y.index_select(0, order.argsort())"
OUT = "(y * weights.unsqueeze(-1)).sum(1)"

SORTED = Exercise(
    number="6.5",
    title="The experts, sorted",
    minutes=30,
    functions=("grouped_experts",),
    question="Each of N tokens makes k choices. If the N · k choices are sorted by expert, the rows of an "
    "expert are neighbours. Which row of x belongs to the i-th choice, and how does each output get back to "
    "its token?",
    shapes="indices flattened and sorted: experts and order, (N · k,). x repeated k times, each token's "
    "copies together, then taken in that order: (N · k, n_embd). F.grouped_mm(rows, matrices, offs=ends) "
    "multiplies the rows up to ends[e], from where the group before ended, by matrix e; ends (E,) are "
    "int32. Back in order: (N, k, n_embd), times weights (N, k, 1), added up over k.",
    steps="1. Flatten the indices and sort them; keep the order.\n"
    "2. Repeat each token k times, and bring the rows into this order.\n"
    "3. For each expert, find where its rows end.\n"
    "4. Multiply by gate_up, split into gate and up, and multiply silu(gate) · up by down.\n"
    "5. Bring the rows back with the inverse of the order, and view them as (N, k, n_embd).\n"
    "6. Multiply by the weights, add up over the choices, and convert to x's dtype.",
    probes=(grouped, grouped_in_16_bits),
    properties={
        "tokens in another order give the same outputs in that order": order_of_tokens("grouped_experts"),
        "the order of a token's choices does not matter": order_of_choices("grouped_experts"),
        "doubling the weights doubles the output": linear_in_the_weights("grouped_experts"),
    },
    mistakes=(
        Mistake(
            "not put back",
            ((BACK, "y"),),
            "The outputs stay in the order of the experts: a token gets the outputs of other tokens.",
            "the shapes agree, and tokens of the batch are mixed, also with later ones: the text leaks.",
            "what happens between the second product and the sum.",
        ),
        Mistake(
            "put back by the order itself",
            ((BACK, "y.index_select(0, order)"),),
            "The outputs are brought into the order once more, not back: a token gets the outputs of others.",
            "the order says which choice went to a place. To go back, it takes the place to which a choice "
            "went, and that is the inverse permutation.",
            "the index with which the rows are brought back.",
        ),
        Mistake(
            "tiled",
            (("x.repeat_interleave(k, dim=0)", "x.repeat(k, 1)"),),
            "The copies are in the order x0, x1, …, x0, x1, …, and the choices are in the order of the "
            "tokens: x0, x0, x1, x1.",
            "the shapes agree, and experts process tokens that did not choose them.",
            "the call that repeats the rows of x.",
        ),
        Mistake(
            "weights forgotten",
            ((OUT, "y.sum(1)"),),
            "The outputs of the experts are added up without their weights.",
            "the weights are the only way in which the loss reaches the router, so it would learn nothing.",
            "the last line.",
        ),
        Mistake(
            "weights in the order of the experts",
            ((OUT, "(y * weights.flatten()[order].view(N, k, 1)).sum(1)"),),
            "The outputs are back in the order of the tokens, and the weights are in that of the experts.",
            "each output is multiplied by another token's weight.",
            "the order of the weights in the last line.",
        ),
        Mistake(
            "gate and up exchanged",
            (("gate, up = ", "up, gate = "),),
            "The two halves of gate_up are exchanged: silu is applied to what should be up.",
            "the model would train as well, but weights trained elsewhere would give other numbers.",
            "the order of the two halves.",
        ),
        Mistake(
            "starts for ends",
            (("right=True", "right=False"),),
            "The groups are shifted by one: expert e + 1 processes the tokens of expert e.",
            "offs holds the ends of the groups. These numbers are where the groups begin.",
            "the search for the ends, and on which side of equal numbers it stops.",
        ),
        Mistake(
            "first choice only",
            ((OUT, "(y * weights.unsqueeze(-1))[:, 0]"),),
            "Only the first choice of each token contributes.",
            "the other experts are computed in vain.",
            "the last line, and the dimension of the choices.",
        ),
        Mistake(
            "mean of the experts",
            ((OUT, "(y * weights.unsqueeze(-1)).mean(1)"),),
            "The outputs are averaged, not added up.",
            "the weights add up to 1 already, so the output would be too small by the number of choices.",
            "the last line.",
        ),
        Mistake(
            "not sorted",
            (
                ("x.repeat_interleave(k, dim=0).index_select(0, order)", "x.repeat_interleave(k, dim=0)"),
                (BACK, "y"),
            ),
            "The rows are in the order of the tokens, while the ends are those of sorted rows.",
            "the product takes its groups from neighbouring rows, so most tokens are multiplied by matrices "
            "of experts that they did not choose.",
            "the order of the rows before the first product.",
        ),
        Mistake(
            "rows not sorted",
            (("x.repeat_interleave(k, dim=0).index_select(0, order)", "x.repeat_interleave(k, dim=0)"),),
            "The outputs are brought back from an order into which the tokens were never brought.",
            "the product takes its groups from neighbouring rows, so most tokens are multiplied by matrices "
            "of experts that they did not choose.",
            "the order of the rows before the first product.",
        ),
        Mistake(
            "not converted back",
            ((f"{OUT}.type_as(x)", OUT),),
            "The output is in float32, whatever the dtype of the tokens.",
            "the weights are in float32, and so is their product with an output. The residual stream should "
            "keep its dtype.",
            "the dtype of what is returned.",
        ),
        Mistake(
            "ends in 64 bits",
            ((", out_int32=True", ""),),
            "The ends of the groups are not int32, and the product refuses them.",
            "grouped_mm hands them to a GPU kernel as they are.",
            "the dtype of what is passed as offs.",
        ),
    ),
    rewrites=(
        Rewrite(
            "bincount and cumsum, scattered back",
            """
def grouped_experts(x, weights, indices, gate_up, down):
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=down.shape[0]).cumsum(0).to(torch.int32)
    rows = x[order // indices.shape[1]]
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=1)
    y = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
    back = torch.empty_like(y).index_copy(0, order, y)
    y = torch.einsum("nk,nkd->nd", weights, back.view(*indices.shape, -1).to(weights.dtype))
    return y.to(x.dtype)
""",
        ),
        Rewrite(
            "added to the tokens, without going back",
            """
def grouped_experts(x, weights, indices, gate_up, down):
    order = indices.flatten().argsort()
    sizes = indices.flatten().bincount(minlength=len(down))
    token = order // indices.size(1)
    rows = []
    for part, a, b in zip(x[token].split(sizes.tolist()), gate_up, down):
        gate, up = (part @ a).chunk(2, -1)
        rows.append((F.silu(gate) * up) @ b)
    rows = torch.cat(rows) * weights.flatten()[order, None]
    return torch.zeros(x.shape).index_add(0, token, rows).to(x.dtype)
""",
        ),
        Rewrite(
            "matrices gathered by choice, nothing sorted",
            """
def grouped_experts(x, weights, indices, gate_up, down):
    gate, up = torch.einsum("nd,nkdw->nkw", x, gate_up[indices]).chunk(2, -1)
    y = torch.einsum("nkw,nkwd->nkd", F.silu(gate) * up, down[indices])
    return (y * weights[..., None]).sum(1).to(x.dtype)
""",
        ),
        Rewrite(
            "bincount and cumsum, the order applied twice",
            """
def grouped_experts(x, weights, indices, gate_up, down):
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=down.shape[0]).cumsum(0).to(torch.int32)
    rows = x[order // indices.shape[1]]
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=1)
    y = F.grouped_mm(F.silu(gate) * up, down, offs=ends)[order]
    return (y.view(*indices.shape, -1) * weights[:, :, None]).sum(dim=1).to(x.dtype)
""",
            mistake="put back by the order itself",
        ),
    ),
    afterwards="Two products in place of a loop, and no shape depends on the choices, so the CPU never "
    "waits for the GPU.",
)

# ---- 6.6 after a step


LOAD = torch.tensor([0.0, 1, 3, 5, 9, 13, 20, 21])  # of 24 tokens with 3 choices; one is exactly the mean


def after_steps(m):
    """Two steps of a model with sigmoid routers, and one with softmax routers, in two processes."""
    found = {}
    for kind in ("sigmoid", "softmax"):
        sizes = {"vocab_size": 29, "block_size": 12, "n_layer": 2, "n_head": 6, "n_embd": 12}
        model = m.GPT(m.GPTConfig(**sizes, router=kind, num_experts_per_tok=3))
        routers = model.routers()
        for step in (1, 2):
            for i, router in enumerate(routers):
                order = torch.randperm(8, generator=torch.Generator().manual_seed(10 * step + i))
                router.tokens_per_expert.copy_(LOAD[order])
                router.entropy.fill_(20.0 + 10 * step + i)
                if kind == "sigmoid" and step == 1:
                    router.e_score_correction_bias.copy_(random(8, seed=i, scale=0.005))
            with two_processes(m):
                report = model.after_step()
            of = f"after step {step}, {kind} router"
            found[f"tokens reported {of} [router, expert]"] = report["expert_tokens"]
            found[f"mean entropy reported {of} [router]"] = report["router_entropy"]
            found[f"tokens left {of}"] = torch.stack([r.tokens_per_expert for r in routers])
            found[f"entropy left {of}"] = torch.stack([r.entropy for r in routers])
            if kind == "sigmoid":
                found[f"biases {of} [router, expert]"] = torch.stack(
                    [r.e_score_correction_bias for r in routers]
                )
    return found


def idle_goes_up(m):
    """The bias of an expert without tokens rises, and that of the busiest falls."""
    model = m.GPT(m.GPTConfig(vocab_size=29, n_layer=1, n_head=6, n_embd=12, block_size=12))
    (router,) = model.routers()
    router.tokens_per_expert.copy_(torch.tensor([0.0, 90, 1, 1, 1, 1, 1, 1]))
    model.after_step()
    bias = router.e_score_correction_bias
    return bool(bias[0] > 0 > bias[1])


def nothing_if_equal(m):
    """Equally busy experts keep their biases."""
    model = m.GPT(m.GPTConfig(vocab_size=29, n_layer=1, n_head=6, n_embd=12, block_size=12))
    (router,) = model.routers()
    router.tokens_per_expert.fill_(5.0)
    model.after_step()
    return not router.e_score_correction_bias.any()


MOVE = "self.config.bias_update_speed * (n.mean() - n).sign()"

AFTER_STEP = Exercise(
    number="6.6",
    title="After a step: the bias moves",
    minutes=10,
    functions=("GPT.after_step",),
    question="An expert had more tokens than the average expert. In which direction should its bias go, and "
    "should it matter how many more?",
    shapes="For each router with tokens n (E,): bias += bias_update_speed · sign(mean(n) − n). Returned: "
    "expert_tokens (routers, E), and router_entropy (routers,): the sum of entropies, divided by the number "
    "of tokens. Each token is in n num_experts_per_tok times.",
    steps="1. Stack the routers' tokens (self.routers()), which are those of all processes already.\n"
    "2. Stack the routers' entropies, and add them up over the processes.\n"
    "3. If the routers are sigmoid routers, move each bias by bias_update_speed: up for experts with fewer "
    "tokens than the mean, down for those with more.\n"
    "4. Set tokens_per_expert and entropy of each router to zero.\n"
    "5. Return the tokens, and the entropies per token.",
    probes=(after_steps,),
    properties={
        "an idle expert's bias rises, a busy one's falls": idle_goes_up,
        "equally busy experts keep their biases": nothing_if_equal,
    },
    mistakes=(
        Mistake(
            "sign",
            ((MOVE, MOVE.replace("n.mean() - n", "n - n.mean()")),),
            "The biases move the other way: those of busy experts rise.",
            "busy experts would become busier, until a few get all tokens.",
            "the order of the difference.",
        ),
        Mistake(
            "proportional",
            ((MOVE, "self.config.bias_update_speed * (n.mean() - n)"),),
            "The biases move in proportion to the difference in tokens.",
            "the step would grow with the batch: 0.001 times thousands of tokens is more than any score. "
            "Only the direction counts.",
            "what is multiplied by bias_update_speed.",
        ),
        Mistake(
            "compared with 0",
            ((MOVE, MOVE.replace("n.mean() - n", "-n")),),
            "Every expert that has any tokens is lowered.",
            "lowering all biases alike changes no choice. An expert is too busy if it has more tokens than "
            "the mean.",
            "what the tokens are compared with.",
        ),
        Mistake(
            "compared with the median",
            ((MOVE, MOVE.replace("n.mean()", "n.median()")),),
            "The tokens are compared with their median.",
            "half of the experts would always be lowered, also where one busy expert has taken the tokens of "
            "all others. In balance, each has the mean.",
            "what the tokens are compared with.",
        ),
        Mistake(
            "speed forgotten",
            ((MOVE, "(n.mean() - n).sign()"),),
            "The biases move by 1 at each step.",
            "a score lies between 0 and 1, so a bias of 1 alone would decide the choice.",
            "how far a bias moves.",
        ),
        Mistake(
            "bias replaced",
            (("router.e_score_correction_bias += ", "router.e_score_correction_bias = "),),
            "The biases of the last step are forgotten.",
            "a bias grows over many steps, until its expert is as busy as the others.",
            "what happens to the old bias.",
        ),
        Mistake(
            "tokens not reset",
            (("router.tokens_per_expert.zero_()", "pass"),),
            "The tokens are not set back to zero.",
            "the biases would follow the tokens since the start of training, and react ever more slowly.",
            "what happens to the statistics after they were used.",
        ),
        Mistake(
            "entropy not reset",
            (("router.entropy.zero_()", "pass"),),
            "The entropy is not set back to zero.",
            "it would be a sum over all steps, divided by the tokens of one.",
            "what happens to the statistics after they were used.",
        ),
        Mistake(
            "tokens added up twice",
            (
                (
                    "torch.stack([router.tokens_per_expert for router in self.routers()])",
                    "sum_over_processes(torch.stack([r.tokens_per_expert for r in self.routers()]))",
                ),
            ),
            "The tokens are added up over the processes, and they were already.",
            "Router.count has done it, since the balance loss needs it too.",
            "the sums over the processes.",
        ),
        Mistake(
            "entropy of one process",
            (
                (
                    "sum_over_processes(torch.stack([router.entropy for router in self.routers()]))",
                    "torch.stack([router.entropy for router in self.routers()])",
                ),
            ),
            "The entropies of the other processes are missing.",
            "each process has added up its own, and the tokens are those of all.",
            "the sums over the processes.",
        ),
        Mistake(
            "entropy per choice",
            (("tokens.sum(1) / self.config.num_experts_per_tok", "tokens.sum(1)"),),
            "The entropy is divided by the number of choices, not by that of tokens.",
            "each token is counted once for every expert that it chose.",
            "what the entropies are divided by.",
        ),
    ),
    rewrites=(
        Rewrite(
            "two masks",
            (
                (
                    f"router.e_score_correction_bias += {MOVE}",
                    "speed, mean = self.config.bias_update_speed, n.mean()\n"
                    "                router.e_score_correction_bias[n > mean] -= speed\n"
                    "                router.e_score_correction_bias[n < mean] += speed",
                ),
            ),
        ),
        Rewrite(
            "new tensors in place of zeroed ones",
            """
class GPT:
    def after_step(self):
        tokens, entropies = [], []
        for router in self.routers():
            n, router.tokens_per_expert = router.tokens_per_expert, torch.zeros_like(router.tokens_per_expert)
            h, router.entropy = sum_over_processes(router.entropy), torch.zeros_like(router.entropy)
            if hasattr(router, "e_score_correction_bias"):
                fewer = torch.sign(n.sum() / len(n) - n)
                with torch.no_grad():
                    router.e_score_correction_bias.add_(fewer, alpha=self.config.bias_update_speed)
            tokens.append(n)
            entropies.append(self.config.num_experts_per_tok * h / n.sum())
        return {"expert_tokens": torch.stack(tokens), "router_entropy": torch.stack(entropies)}
""",
        ),
        Rewrite(
            "where, with the comparison the wrong way round",
            """
class GPT:
    @torch.no_grad()
    def after_step(self):
        routers = self.routers()
        tokens = torch.stack([r.tokens_per_expert for r in routers])
        entropy = sum_over_processes(torch.stack([r.entropy for r in routers]))
        if self.config.router == "sigmoid":
            speed = self.config.bias_update_speed
            for r in routers:
                n = r.tokens_per_expert
                step = torch.where(n > n.mean(), speed, -speed) * (n != n.mean())
                r.e_score_correction_bias.add_(step)
        for r in routers:
            r.tokens_per_expert.fill_(0)
            r.entropy.fill_(0)
        return {
            "expert_tokens": tokens,
            "router_entropy": entropy * self.config.num_experts_per_tok / tokens.sum(1),
        }
""",
            mistake="sign",
        ),
    ),
    afterwards="This is a controller, not learning: it has no gradient, and adds nothing to the loss. The "
    "report tells whether it works: python train.py logs the tokens of each expert.",
)

# ---- the whole file


def whole_model(m):
    """Logits with and without shared experts and dense layers, losses of both routers, and the init."""
    found, idx, targets = {}, tokens(2, 11), tokens(2, 11, seed=4)
    for name, sizes in {
        "by default": {},
        "with 2 shared experts": {"n_shared_experts": 2},
        "without shared experts": {"n_shared_experts": 0},
        "with a dense layer": {"first_k_dense_replace": 1},
        "with a softmax router": {"router": "softmax"},
    }.items():
        model = small_model(m, **sizes)
        logits, losses = model(idx, targets)
        found[f"logits {name} [batch, position, token]"] = logits
        found[f"losses in evaluation {name}"] = ", ".join(losses)
        for label, loss in model.train()(idx, targets)[1].items():
            found[f"{label} loss in training {name}"] = loss
        found[f"width of an expert {name}"] = model.config.moe_intermediate_size
        found[f"routers {name}"] = len(model.routers())
    fresh = m.GPT(m.GPTConfig(vocab_size=400, block_size=16, n_layer=8, n_head=4, n_embd=48))
    mixture = fresh.model.layers[3].mlp
    found["initial spread of the router"] = round(mixture.gate.weight.std().item(), 3)
    for name, weight in mixture.experts.named_parameters():
        found[f"initial spread of {name}"] = round(weight.std().item(), 3)
    for name, value in {"num_experts_per_tok": 9, "first_k_dense_replace": 2, "router": "relu"}.items():
        try:
            m.GPTConfig(n_layer=2, n_head=6, n_embd=48, **{name: value})
            found[f"{name} {value}"] = "accepted"
        except ValueError:
            found[f"{name} {value}"] = "refused"
    return found


WHOLE = Exercise(
    number="6",
    title="The whole stage",
    minutes=60,
    functions=(),
    question="What takes the place of the MLP in a block, and which three things outside the block must know "
    "that there are routers: the initialization, the loss, and what else?",
    shapes="Experts: gate_up_proj (E, 2 · width, n_embd), down_proj (E, n_embd, width). The shared experts "
    "are one MLP of n_shared_experts · width. Losses: next_token, and in training with the softmax router "
    "balance, router_aux_loss_coef times the mean over the layers. Default width: intermediate_size, "
    "divided by the number of experts that a token uses, shared ones included, rounded to a multiple of 8.",
    steps="1. Add the sizes to the config, with their defaults and checks.\n"
    "2. Write Router, Experts and MoE.\n"
    "3. In Block, use MoE from layer first_k_dense_replace on.\n"
    "4. Initialize the router's and the experts' matrices like the others.\n"
    "5. Collect the balance loss in GPT.forward, and write after_step.",
    probes=(whole_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "shared experts unused",
            (("y if self.shared_experts is None else y + self.shared_experts(x)", "y"),),
            "The shared experts do not contribute.",
            "their parameters would get no gradient, and each routed expert would have to learn what all "
            "tokens need.",
            "what MoE returns.",
        ),
        Mistake(
            "one shared expert",
            (("config.n_shared_experts * config.moe_intermediate_size", "config.moe_intermediate_size"),),
            "The shared experts together are as wide as a single one.",
            "n_shared_experts experts that every token uses are the same as one MLP of their joint width.",
            "the width of the shared experts.",
        ),
        Mistake(
            "one dense layer too many",
            (("layer_idx < config.first_k_dense_replace", "layer_idx <= config.first_k_dense_replace"),),
            "One layer more than first_k_dense_replace has a dense MLP.",
            "layers count from 0, so with 0 dense layers the first one has experts.",
            "the comparison in Block.",
        ),
        Mistake(
            "dense layers last",
            (
                (
                    "layer_idx < config.first_k_dense_replace",
                    "layer_idx >= config.n_layer - config.first_k_dense_replace",
                ),
            ),
            "The last layers are dense, not the first.",
            "DeepSeekMoE keeps the first layer dense, because the load of its experts balances especially "
            "slowly (arXiv 2401.06066).",
            "the comparison in Block.",
        ),
        Mistake(
            "balance added up over layers",
            (("balance = balance.mean()", "balance = balance.sum()"),),
            "The balance losses of the layers are added up, not averaged.",
            "that is what Switch does. Here the coefficient means the same for any number of layers.",
            "how the layers' balance losses become one.",
        ),
        Mistake(
            "coefficient forgotten",
            (("self.config.router_aux_loss_coef * balance", "balance"),),
            "The balance loss is not multiplied by its coefficient.",
            "at full weight it competes with the model's own loss.",
            "what GPT.forward does with the balance loss.",
        ),
        Mistake(
            "balance loss in evaluation",
            (
                (
                    'if self.training and self.config.router == "softmax":\n                balance = torch',
                    'if self.config.router == "softmax" and self.routers()[0].balance_loss is None:\n'
                    '                losses["balance"] = torch.zeros(())\n'
                    '            elif self.config.router == "softmax":\n                balance = torch',
                ),
            ),
            "In evaluation there is a balance loss too.",
            "the validation loss should measure the text alone, and be comparable with other stages.",
            "when GPT.forward collects the balance loss.",
        ),
        Mistake(
            "experts' outputs not narrowed",
            (
                ('"down_proj.weight", "experts.down_proj"', '"down_proj.weight"'),
                (
                    "nn.init.normal_(module.gate_up_proj, std=0.02)",
                    "nn.init.normal_(module.gate_up_proj, std=0.02)\n"
                    "                nn.init.normal_(module.down_proj, std=0.02)",
                ),
            ),
            "The experts' down_proj has the same initial spread as other matrices.",
            "it writes into the residual stream, to which 2 · n_layer projections add: each of them begins "
            "smaller by the root of that number.",
            "the names in GPT.init_weights.",
        ),
        Mistake(
            "width without the shared experts",
            (
                (
                    "max(1, self.num_experts_per_tok + self.n_shared_experts)",
                    "max(1, self.num_experts_per_tok)",
                ),
            ),
            "The default width of an expert leaves the shared experts out.",
            "then a token uses more parameters than in stage 5, and the two stages cannot be compared.",
            "the default of moe_intermediate_size.",
        ),
        Mistake(
            "too many choices accepted",
            (("if self.num_experts_per_tok > self.n_routed_experts:", "if False:"),),
            "More experts per token than there are experts are accepted.",
            "the error would appear later and elsewhere.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "unknown router accepted",
            (('if self.router not in ("softmax", "sigmoid"):', "if False:"),),
            "A router that does not exist is accepted.",
            "a typing error would silently choose the other router.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
    ),
    rewrites=(),
)


# ---- predictions


def stage6():
    from lab import stages

    return stages.load("stage6_moe")


def parameters_per_token() -> int:
    """The parameters of a layer's mixture that a token uses, in GPT-2's size, without the router."""
    m = stage6()
    config = m.GPTConfig()
    with torch.device("meta"):
        mixture = m.MoE(config)
    routed = sum(weight.numel() for weight in mixture.experts.parameters())
    shared = sum(weight.numel() for weight in mixture.shared_experts.parameters())
    return routed // config.n_routed_experts * config.num_experts_per_tok + shared


def two_experts() -> float:
    probs = torch.tensor([[0.9, 0.1]]).expand(5, 2)
    return round(stage6().balance_loss(probs, torch.tensor([5.0, 0.0])).item(), 4)


def lone_weight() -> str:
    """Whether the gradient of a lone weight that is scaled to 1 reaches the router."""
    scores = random(4, 8, seed=1).requires_grad_()
    weights = scores.softmax(-1).topk(1).values
    (weights / weights.sum(-1, keepdim=True) * random(4, 1, seed=2)).sum().backward()
    return "zero" if scores.grad.abs().max() < 1e-6 else "not zero"


QUESTIONS = (
    Question(
        "GPT-2's size: width 768, experts of width 680. Each expert has three matrices. A token uses 2 of 8 "
        "routed experts and 1 shared one. How many parameters of a layer's experts does it use?",
        parameters_per_token,
        "3 experts · 3 matrices · 768 · 680 = {answer}. The layer holds three times as many: 9 experts.",
    ),
    Question(
        "Two experts. All tokens choose the first, whose mean probability is 0.9. What is the balance loss?",
        two_experts,
        "2 · (1 · 0.9 + 0 · 0.1) = {answer}; in balance it would be 1.",
        tolerance=0.001,
    ),
    Question(
        "One expert per token, and its weight is divided by the sum of the chosen weights. What is the "
        "gradient that reaches the router through the weight?",
        lone_weight,
        "w / w is 1 whatever w is, so the gradient is {answer}: the router would learn nothing.",
        choices=("zero", "not zero"),
    ),
    Question(
        "A token uses as many parameters as in stage 5, out of several times as many. Both are small models, "
        "trained on a small text. Which way does the validation loss go, against stage 5?",
        lambda: loss_change("stage6_moe"),
        "Measured over three seeds: {answer}. docs/benchmarks.md has the numbers.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="6",
    name="stage6",
    title="mixture of experts",
    source="stage6_moe/model.py",
    before="stage5_flash/model.py",
    beyond="exercises/beyond/stage6.py",
    exercises=(ROUTER, BALANCE, SIGMOID, LOOP, SORTED, AFTER_STEP),
    questions=QUESTIONS,
    whole=WHOLE,
)
