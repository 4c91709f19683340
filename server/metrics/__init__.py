"""What is counted, one noun a file; server/telemetry.py joins them. Label values are from closed sets."""
