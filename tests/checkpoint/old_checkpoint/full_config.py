"""The run whose checkpoint-2 is in full/: every weight of base/, in bfloat16 over float32."""

from minilora.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="full",
    method="full",
    model=ModelConfig(name="base", dtype="bfloat16"),
    data=DataConfig(
        train_file="train.jsonl", eval_file="eval.jsonl", format="paths", max_seq_length=512
    ),
    train=TrainConfig(
        max_steps=5,
        batch_size=2,
        learning_rate=2e-3,
        lr_scheduler="linear",
        warmup_steps=1,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=2,
    ),
    eval=EvalConfig(eval_steps=2, num_generate_samples=1, max_new_tokens=4),
)
