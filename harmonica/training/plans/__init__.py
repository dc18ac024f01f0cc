"""Plans and forecasts found without gradients: the start search, the selection, and the fit."""
