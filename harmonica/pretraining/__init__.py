"""How the built-in models were made; the method needs none of it."""
