"""Plans and forecasts learned from gradients of the final image.

Here are the step search, the choice between plans, and the fit.
"""
