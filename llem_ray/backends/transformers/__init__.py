"""Hugging Face transformers, with a decode loop of our own."""
