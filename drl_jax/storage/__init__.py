"""Files: checkpoints, work directories, exported models."""
