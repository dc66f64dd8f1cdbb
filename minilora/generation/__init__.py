"""Decoding: sampling, the key/value cache, continuous batching, resumable jobs."""
