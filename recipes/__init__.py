"""Full training scripts, one paper a file, built from mimkit."""
