"""DiT as a list of branches, in the public and in diffusers' layout of weights."""
