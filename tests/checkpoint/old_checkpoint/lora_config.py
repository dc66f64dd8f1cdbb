"""The run whose checkpoint-4 is in lora/: an adapter over base/, in float32."""

from minilora.config import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="lora",
    seed=1,
    model=ModelConfig(name="base", dtype="float32"),
    lora=LoraConfig(rank=4, alpha=8, dropout=0.1),
    data=DataConfig(
        train_file="train.jsonl",
        eval_file="eval.jsonl",
        format="paths",
        edge_dropping=True,
        max_seq_length=512,
    ),
    train=TrainConfig(
        epochs=1.5,
        batch_size=2,
        learning_rate=1e-2,
        lr_scheduler="cosine",
        warmup_steps=2,
        logging_steps=1,
        save_steps=4,
    ),
    eval=EvalConfig(eval_steps=3, num_generate_samples=1, max_new_tokens=4),
)
