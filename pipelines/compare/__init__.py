"""The stage `compare`: this method beside baselines, at equal cost."""
