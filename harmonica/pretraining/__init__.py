"""How the built-in models were made: data, captions and training. Caching and routers need none of it."""
