"""Logits to tokens, and tokens out of a model."""
