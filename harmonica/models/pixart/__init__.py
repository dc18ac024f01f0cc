"""PixArt-alpha and -Sigma as a list of branches."""
