"""The method when images are sampled: plan, router, branch cache, passes, sampling, artifact."""
