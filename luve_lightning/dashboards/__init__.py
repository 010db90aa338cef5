"""Dashboards defined once: as Weights & Biases workspaces, and as parts of a report on local runs."""
