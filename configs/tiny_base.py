"""The tiny model in examples/tiny-mistral: all weights are trained, starting from random ones.

examples/make_tiny_mistral.py runs this config, after it has made the tokenizer and the corpus. It
takes about four minutes on two cores.
"""

from minilora.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/tiny-base",
    method="full",
    model=ModelConfig(name="out/tiny-base-source", init="random", dtype="float32"),
    data=DataConfig(
        train_file="out/tiny-base-source/corpus.jsonl",
        format="text",
        max_seq_length=512,
    ),
    train=TrainConfig(
        epochs=40,
        batch_size=16,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        warmup_steps=50,
        min_lr_ratio=0.05,
        weight_decay=0.05,
        gradient_checkpointing=False,
        logging_steps=50,
    ),
    eval=EvalConfig(eval_steps=1000, num_generate_samples=2, max_new_tokens=64),
)
