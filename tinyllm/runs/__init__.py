"""What a training leaves behind: the folder of a run, and what reads it."""
