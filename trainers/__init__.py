"""Offline trainers: they produce the checkpoints and data that the gateway serves."""
