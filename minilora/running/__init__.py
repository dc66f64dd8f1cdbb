"""What the scripts need around a run: its settings from file and flags, and its tokenised data from a cache."""
