"""Plans and forecasts found without gradients.

They come from the start search, the selection and the fit.
"""
