"""The stage `train`: Ray Train around `harmonica.training`."""
