"""What a run leaves on the disk: its folder, checkpoints, locks, and the hash of its code."""
