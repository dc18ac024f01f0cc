"""What conditions a model: classes by name, prompts and their embeddings."""
