"""Encoders, tokenizers and teachers that are read from files."""
