"""The smallest recipe: LoRA on the tiny model in examples/, on a CPU, in about a minute.

    python train.py configs/tiny.py

The tiny model has Mistral's architecture. It learns to write the category paths of an article, from
the rows in examples/wiki. The settings are those of configs/wiki.py, except for what a tiny model
needs: a larger learning rate, more epochs, no gradient checkpointing.
"""

from minilora.config import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/tiny",
    model=ModelConfig(name="examples/tiny-mistral", dtype="float32"),
    lora=LoraConfig(rank=32, alpha=32),
    data=DataConfig(
        train_file="examples/wiki/train.jsonl",
        eval_file="examples/wiki/eval.jsonl",
        max_seq_length=512,
    ),
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
