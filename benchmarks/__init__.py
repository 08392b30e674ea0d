"""Benchmarks: python -m benchmarks.NAME. Most of them write a section of results/results.json."""
