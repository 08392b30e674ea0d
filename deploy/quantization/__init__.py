"""Quantization of a trained model's weights to 2, 3, 4 or 8 bits."""
