"""Quality over steps, speeds and training seeds: learned steps and forecasts, beside published methods."""
