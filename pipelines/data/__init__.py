"""Ray Data makes batches of labels and noise, and reads and embeds prompts."""
