"""What a replica is made of: HTTP, batching, image generation, and the watch on the registry."""
