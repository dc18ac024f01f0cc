"""Training of the built-in models, their data and captions; caching and routers do not use it."""
