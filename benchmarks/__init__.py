"""Scripts that measure: python -m benchmarks.NAME. Most of them fill a part of results/results.json."""
