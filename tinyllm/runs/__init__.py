"""The folder that a training leaves behind, and what reads it."""
