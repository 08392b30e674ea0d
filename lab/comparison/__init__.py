"""The parts of compare.py and runs.py: the runs they need, speeds, statistics, tables and pictures."""
