"""From files of rows to packed batches of token ids with labels."""
