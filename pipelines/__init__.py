"""HarmoniCa on Ray: stream (Data), train (Train), evaluate, register (MLflow), serve (Serve).

The wheel installs this folder as `harmonica_ray`; in a clone it is `pipelines`.
"""

from harmonica.validation.extras import need

need("ray", extra="ray")
