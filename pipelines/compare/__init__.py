"""The stage `compare` measures this method beside baselines, at equal cost."""
