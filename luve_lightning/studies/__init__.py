"""Studies with human raters: which method's video is best, seen side by side and blind."""
