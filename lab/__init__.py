"""What the drivers (train.py, sample.py, compare.py) share, one concern a file."""
