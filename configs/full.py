"""Full fine-tuning: all weights of an 8B model, sharded over two or more GPUs.

    torchrun --nproc_per_node=8 train.py configs/full.py --data.train_file T.jsonl --output_dir OUT

The GPUs may be in one machine or in several. The fp32 weights, their gradients and the states of
AdamW take 16 bytes for each parameter, which is 128 GB for an 8B model, divided by the number of
processes. With --train.optimizer adamw8bit it is 10 bytes for each parameter. Blocks are gathered
in bfloat16, one at a time.

The settings have no source: they are common figures for full fine-tuning.

OUT/checkpoint-final is a Hugging Face model. What resuming needs is in the same directory, in
shards; a run can be continued with any number of processes.
"""

from minilora.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)

config = Config(
    output_dir="out/full",
    method="full",
    model=ModelConfig(name="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
    data=DataConfig(
        train_file="examples/wiki/train.jsonl",
        eval_file="examples/wiki/eval.jsonl",
        max_seq_length=2048,
    ),
    train=TrainConfig(
        epochs=2,
        batch_size=4,
        grad_acc_steps=1,
        learning_rate=1e-5,  # about a tenth of that for LoRA
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        warmup_steps=0,
        min_lr_ratio=0.1,
        weight_decay=0.01,
        save_steps=500,
        save_total_limit=2,
    ),
    eval=EvalConfig(eval_steps=500),
    parallel=ParallelConfig(strategy="fsdp"),
)
