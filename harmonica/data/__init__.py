"""The inputs of a model: batches of noise, class names, prompts and their embeddings."""
