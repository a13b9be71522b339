"""A run: its command line, configuration, folder, checkpoints and processes."""
