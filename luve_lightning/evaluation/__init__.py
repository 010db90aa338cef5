"""Folders of videos to scores, and scores to tables with intervals."""
