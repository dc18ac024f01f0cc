"""Serve images over HTTP with Ray Serve.

A request reaches `images_api`, is checked and split into one `EngineRequest` for each image (`generation`),
and goes to a replica that holds the model (`deployments`). There it waits in the queue of the `engine`
(`batching`) and is sampled together with others (`image_sampler`). `registry_watcher` keeps the replica's
routers up to date, `multiplexed_engines` loads and unloads several models, and `lifecycle` starts and stops
the endpoint.
"""

from harmonica.validation.extras import need

need("fastapi", extra="serve")
