"""Training of a router inside a diffusers pipeline's own loop: `harmonica.train_pipeline`."""
