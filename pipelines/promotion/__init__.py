"""The gate, the decision about the champion, and the stages `register` and `serve`."""
