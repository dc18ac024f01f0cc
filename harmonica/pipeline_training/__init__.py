"""Train a router inside a diffusers pipeline's loop: `harmonica.train_pipeline`."""
