r"""OLLM's Wikipedia run (Lo et al., NeurIPS 2024, arXiv 2410.23584), with Mistral-7B-Instruct.

    torchrun --nproc_per_node=2 train.py configs/wiki.py \
        --data.train_file T.jsonl --data.eval_file E.jsonl --output_dir OUT

The model learns to write the category paths of an article. Without --data.train_file it trains on
the 160 articles in examples/wiki. The weights alone take 14.5 GB in bfloat16.

The source is OLLM's script for Wikipedia, for two GPUs, with all its settings. docs/recipes.md says
where the arithmetic deviates from OLLM's: the mean of the loss, and draws of dropped labels that
are new in each epoch (--data.edge_draw once for a single one, as in OLLM's code).
"""

from minilora.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/wiki",
    model=ModelConfig(name="mistralai/Mistral-7B-Instruct-v0.2"),
    lora=LoraConfig(rank=32, alpha=16),
    data=DataConfig(
        train_file="examples/wiki/train.jsonl",
        eval_file="examples/wiki/eval.jsonl",
        # OLLM's form. The model's template on the hub now writes a space after [/INST].
        chat_template="mistral",
        max_seq_length=2048,
    ),
    train=TrainConfig(
        epochs=2,
        batch_size=8,
        learning_rate=1e-5,
        lr_scheduler="constant_with_warmup",
        warmup_steps=100,
    ),
)
