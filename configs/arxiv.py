r"""OLLM's arXiv run (Lo et al., NeurIPS 2024, arXiv 2410.23584): a second taxonomy.

    python merge.py out/wiki/checkpoint-final    # the merged model is the base of this run
    torchrun --nproc_per_node=2 train.py configs/arxiv.py \
        --data.train_file T.jsonl --data.eval_file E.jsonl --output_dir OUT

The merged model of configs/wiki.py is trained further. A small adapter, a low learning rate and
2,048 articles are enough for it to learn another taxonomy without forgetting how paths are written.
Rows are as in examples/wiki, with the title and the abstract of a paper. The result is the best
checkpoint, which the run's last line names; OLLM's was that of about step 288 of 384.

The source is OLLM's script for arXiv, for two GPUs (on one, set train.batch_size to 16).
Deviations: train.logging_steps. docs/recipes.md has the reason, and what differs in arithmetic.
"""

from minilora.config import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/arxiv",
    model=ModelConfig(name="out/wiki/checkpoint-final/merged"),
    lora=LoraConfig(rank=8, alpha=8),
    data=DataConfig(
        train_file="examples/wiki/train.jsonl",
        eval_file="examples/wiki/eval.jsonl",
        train_size=2048,
        eval_size=256,
        chat_template="mistral",  # as in configs/wiki.py
        max_seq_length=2048,
    ),
    train=TrainConfig(
        epochs=3,
        batch_size=8,
        learning_rate=3e-6,
        lr_scheduler="constant_with_warmup",
        warmup_steps=10,
        group_by_length=False,
        logging_steps=8,
        metric_for_best_model="loss",  # of the evaluation file
    ),
    eval=EvalConfig(eval_steps=32),
)
