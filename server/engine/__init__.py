"""The engine: its protocol and its vLLM implementation."""
