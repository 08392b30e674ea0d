"""What compare.py and runs.py are made of: which runs they need, speeds, statistics, tables and pictures."""
