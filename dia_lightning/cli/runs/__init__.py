"""What a run leaves on the disk: its checkpoints, its config, its lock, and how a training goes on from them."""
