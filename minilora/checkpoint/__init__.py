"""Models, adapters and training state in files: reading, writing, resuming."""
