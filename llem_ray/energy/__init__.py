"""Samples and windows to energy with its uncertainty. Pure arithmetic on arrays."""
