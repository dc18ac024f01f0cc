"""Ray Data: batches of labels and noise, and prompts that are read and embedded."""
