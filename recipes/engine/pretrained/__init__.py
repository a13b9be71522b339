"""Pre-trained encoders, tokenizers and teachers, loaded from files."""
