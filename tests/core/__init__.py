"""What a plan, a cache and the passes compute, held to definitions and recorded numbers."""
