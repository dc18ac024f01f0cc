"""Make a model's inputs: batches of noise, class names and embedded prompts."""
