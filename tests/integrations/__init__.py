"""diffusers pipelines: applying a plan to them and training in them."""
