"""Where the numbers of a run are written, and where its checkpoints are uploaded."""
