"""Artifacts: bytes by digest, names, residency."""
