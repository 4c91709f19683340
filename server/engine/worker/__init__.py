"""Code that runs inside the processes of vLLM."""
