"""The stage `train` runs `harmonica.training` on Ray Train."""
