"""HarmoniCa on Ray: stream (Data), train (Train), evaluate, register (MLflow), serve (Serve)."""
