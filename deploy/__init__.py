"""Exports runs to the formats of other programs, and imports runs from them."""
