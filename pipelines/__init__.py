"""Run HarmoniCa on Ray: train, evaluate, register and serve routers.

Ray Data streams the noise, Ray Train trains, MLflow keeps runs and routers, and Ray Serve answers requests.

The wheel installs this folder as `harmonica_ray`; in a clone it is `pipelines`.
"""

from harmonica.validation.extras import need

need("ray", extra="ray")
