"""The method at sampling time: plan, router, cache, passes, artifact."""
