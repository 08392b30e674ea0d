"""What a run stores on disk: its folder, its checkpoints, its lock, and the hash of its code."""
