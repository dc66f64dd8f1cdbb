"""minilora: fine-tune Mistral- and Llama-family models with LoRA, in code that can be read in an afternoon.

model, tokenizer = minilora.load("checkpoint-final")
logits = model(tokens, lengths)
texts = minilora.generate(model, tokenizer, ["..."], max_new_tokens=64)
"""

from minilora.build import load
from minilora.generate import generate

__all__ = ["generate", "load"]
__version__ = "0.1.0"
