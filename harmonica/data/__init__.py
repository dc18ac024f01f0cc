"""What a model is given: batches of noise, class names, prompts and their embeddings."""
