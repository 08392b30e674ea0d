"""Which experts the last tokens chose, for the chat page; only while it asks."""

import time
from collections import deque

import torch

LAST_TOKENS = 32
SECONDS = 2  # after which nobody asks any more


class Experts:
    """Watches a model's routers with forward hooks. All methods are for the engine's thread."""

    def __init__(self, routers: dict[int, torch.nn.Module]):
        self.routers = routers  # by layer
        self.chosen = {layer: deque(maxlen=LAST_TOKENS) for layer in routers}
        self.handles: list = []
        self.asked = 0.0

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Experts | None":
        """None if the model has no experts."""
        found = {}
        for name, module in model.named_modules():
            parts = name.split(".")
            if type(module).__name__ == "Router":
                layer = int(parts[parts.index("layers") + 1])
                if layer < model.config.n_layer:  # behind them are MTP blocks
                    found[layer] = module
        return cls(found) if found else None

    def counts(self) -> dict:
        """How many of the last tokens of all requests chose each expert, by layer. Watches from now on."""
        self.asked = time.monotonic()
        if not self.handles:
            for chosen in self.chosen.values():
                chosen.clear()
            for layer, router in self.routers.items():
                self.handles.append(router.register_forward_hook(self.hook(layer)))
        layers = []
        n_tokens = 0
        for layer, steps in self.chosen.items():
            indices = torch.cat(list(steps))[-LAST_TOKENS:] if steps else torch.empty(0, 1, dtype=torch.int64)
            n_experts = self.routers[layer].config.n_routed_experts
            counts = torch.bincount(indices.flatten(), minlength=n_experts).tolist()
            layers.append({"layer": layer, "counts": counts})
            n_tokens = len(indices)
        return {"tokens": n_tokens, "layers": layers}

    def hook(self, layer: int):
        def note(router, inputs, output):
            if time.monotonic() - self.asked > SECONDS:
                self.stop()
                return
            _, indices = output  # of a Router: weights and indices (tokens, experts per token)
            self.chosen[layer].append(indices.detach().cpu())

        return note

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
