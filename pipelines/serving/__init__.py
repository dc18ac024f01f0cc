"""What a replica is made of: HTTP, batching, image generation, and the watch on the registry."""

from harmonica.validation.extras import need

need("fastapi", extra="serve")
