"""Generating tokens with a model: sampling, drafts, and a compiled decoding step."""
