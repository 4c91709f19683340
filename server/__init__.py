"""The gateway: HTTP edge, request path, artifact store and the engine behind it."""
