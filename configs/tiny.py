"""The embedded default: everything it needs lies in examples/, on a CPU, in about a minute.

LoRA on the tiny Mistral-architecture base, which learns to write the category paths of an article. The settings are those
of configs/wiki.py but for what a tiny model needs: a larger learning rate, more epochs, no checkpointing.
"""

from minilora.config import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/tiny",
    model=ModelConfig(name="examples/tiny-mistral", dtype="float32"),
    lora=LoraConfig(rank=32, alpha=32),
    data=DataConfig(train_file="examples/wiki/train.jsonl", eval_file="examples/wiki/eval.jsonl", max_seq_length=512),
    train=TrainConfig(
        epochs=24,
        batch_size=4,
        learning_rate=5e-3,
        lr_scheduler="cosine",
        warmup_steps=20,
        gradient_checkpointing=False,
        logging_steps=20,
    ),
    eval=EvalConfig(eval_steps=240, num_generate_samples=2, max_new_tokens=160),
)
