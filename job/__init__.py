"""What runs in the container: from a mounted spec to a verified, published adapter."""
