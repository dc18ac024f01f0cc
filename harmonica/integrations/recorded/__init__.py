"""Any diffusers transformer seen as branches: calls of sub-modules inside its unmodified forward."""
