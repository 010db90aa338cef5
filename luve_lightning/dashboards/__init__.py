"""Dashboards defined once: as Weights & Biases workspaces, and as local pages drawn from the runs' CSV logs."""
