"""Clips on disk, their index, stores and scores, and the mini world."""
