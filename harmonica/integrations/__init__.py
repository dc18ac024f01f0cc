"""Use routers in unmodified diffusers pipelines: `harmonica.apply` and `remove`."""
