"""Folders of videos to measures, and measures to tables with intervals."""
