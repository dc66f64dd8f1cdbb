"""Fine-tune Mistral-, Llama- and Qwen-family models with LoRA, in plain PyTorch.

model, tokenizer = minilora.load("checkpoint-final")
logits = model(tokens, lengths)
texts = minilora.generate(model, tokenizer, ["..."], max_new_tokens=64)
"""

from minilora.build import load
from minilora.generation.engine import generate

__all__ = ["generate", "load"]
__version__ = "0.1.0"
