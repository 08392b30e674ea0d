"""Serves a model to many at once: paged attention, a prefix cache and continuous batching. See README.md here."""

from deploy.serving.engine import Engine, Output
from deploy.serving.sampling import SamplingParams

__all__ = ["Engine", "Output", "SamplingParams"]
