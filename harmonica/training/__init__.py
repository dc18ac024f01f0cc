"""Training of a router.

`trainer` runs four phases: start (`start_phase`), router (`router_phase`: SDT with the image error proxy),
choice (`choice_phase`) and forecast (`forecast_phase`).
"""
