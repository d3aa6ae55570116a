"""What is sampled from: entries, their loaders, downloads and foreign checkpoints."""
