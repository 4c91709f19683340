"""Kernels that apply deltas to activations."""
