"""The gateway as a Ray Serve application: replicas of it behind Ray Serve's proxies, on one store (extra `ray`)."""
