"""The parts of a training step: gradients, the learning rate, the optimizer."""

import math
from collections import defaultdict

import torch

from lab import parallel


def make(name: str, model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]):
    """The optimizer called name, adamw or muon, for all parameters of the model."""
    if name == "muon":
        return MuonAndAdamW(model, lr, weight_decay, betas)
    return adamw(model, lr, weight_decay, betas)


def adamw(
    model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Fused AdamW for all parameters of the model."""
    return adamw_of(list(model.parameters()), lr, weight_decay, betas)  # contains a tied matrix once


def adamw_of(
    parameters: list[torch.nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101); only parameters with two or more dimensions decay.

    Norm weights and biases have no reason to be close to zero, so decaying them does not help.
    """
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, but it orthogonalizes all matrices of one shape, and stacks of them, as one batch.

    A model has many small matrices of few shapes; one at a time, they would not keep the processor busy.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)  # parameters, by the shape of their matrices
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[-2:]].append(p)
            for shape, parameters in by_shape.items():
                updates = [self.nesterov(p, group["momentum"]).view(-1, *shape) for p in parameters]
                updates = orthogonalized(torch.cat(updates), group["ns_coefficients"], group["ns_steps"])
                # The updates' root mean square matches AdamW's, so the same learning rate suits both.
                size = 0.2 * math.sqrt(max(shape))
                sizes = [p.numel() // shape.numel() for p in parameters]
                for p, update in zip(parameters, updates.split(sizes), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * size)

    def nesterov(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Updates the running mean of p's gradient; returns a mix of both (Nesterov momentum)."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def orthogonalized(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Newton–Schulz iteration on each matrix of x (N, rows, columns): brings singular values close to 1."""
    if x.size(1) > x.size(2):  # the products are (rows, rows): fewer rows are cheaper
        return orthogonalized(x.mT, coefficients, steps).mT
    a, b, c = coefficients
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonAndAdamW:
    """Muon for the matrices of the blocks and AdamW for the rest, as one optimizer.

    Muon is Keller Jordan's (kellerjordan.github.io/posts/muon, 2024); its scale and weight decay are those of
    arXiv 2502.16982.
    """

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]):
        matrices = {id(p) for p in model.model.layers.parameters() if p.dim() >= 2}
        flat = [p for p in model.parameters() if id(p) in matrices and p.dim() == 2]
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": 0.95,
            "adjust_lr_fn": "match_rms_adamw",
        }
        self.muon = BatchedMuon(flat, **options)
        stacks = [p for p in model.parameters() if id(p) in matrices and p.dim() > 2]
        if stacks:
            self.muon.add_param_group({"params": stacks})
        rest = [p for p in model.parameters() if id(p) not in matrices]
        self.adamw = adamw_of(rest, lr, weight_decay, betas)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def cosine_lr(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of step 1 … steps: a linear warm-up to lr, then half a cosine down to min_lr."""
    if step <= warmup_steps:
        return lr * step / (warmup_steps + 1)
    progress = (step - 1 - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)


def accumulate_gradients(model, idx, targets, micro_batch: int, autocast) -> dict[str, torch.Tensor]:
    """Adds the batch's gradient to the parameters; returns each loss, averaged over the batch.

    With several processes, the gradient is the mean over all of them, but the losses are this process's own.
    """
    parts = list(zip(idx.split(micro_batch), targets.split(micro_batch), strict=True))
    totals = defaultdict(float)
    for number, (idx_part, targets_part) in enumerate(parts, 1):
        parallel.synchronize_gradients(model, number == len(parts))  # only with the last part
        with autocast:
            _, losses = model(idx_part, targets_part)
        (sum(losses.values()) / len(parts)).backward()
        for name, loss in losses.items():
            totals[name] += loss.detach() / len(parts)
    return dict(totals)


def update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float, grad_clip: float
) -> torch.Tensor:
    """Takes an optimizer step and clears the gradients; returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    grad_norm = parallel.whole(grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
