"""Scorers of clips. Imports neither our models nor Lightning: HPS v3 runs in an environment of its own."""
