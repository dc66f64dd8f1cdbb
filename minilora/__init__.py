"""Fine-tune Mistral-, Llama- and Qwen-family models with LoRA, in plain PyTorch.

model, tokenizer = minilora.load("checkpoint-final")
logits = model(tokens, lengths)
prompt = minilora.format_prompt(tokenizer, "...")  # in the form of training
texts = minilora.generate(model, tokenizer, [prompt], max_new_tokens=64)
"""

from minilora.generation.engine import generate
from minilora.generation.prompting import format_prompt
from minilora.loading import load

__all__ = ["format_prompt", "generate", "load"]
__version__ = "0.1.0"
