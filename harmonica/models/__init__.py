"""Model architectures, each a `base.BranchedTransformer`, and their loading."""
