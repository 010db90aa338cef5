"""Clips on disk, their index, stores and scores, prompt files, and the mini world."""
