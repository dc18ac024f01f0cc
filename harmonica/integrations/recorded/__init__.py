"""Find the branches of any diffusers transformer by recording its forward."""
