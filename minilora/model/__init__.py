"""The decoder and what is attached to it: adapters, quantization, the loss."""
