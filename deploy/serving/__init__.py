"""Serves a model to many at once: paged attention, a prefix cache, continuous batching. See its README.md."""

from deploy.serving.engine import Engine, Output
from deploy.serving.sampling import SamplingParams

__all__ = ["Engine", "Output", "SamplingParams"]
