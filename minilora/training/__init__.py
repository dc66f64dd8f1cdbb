"""What the training loop in train.py calls."""
