"""Full fine-tuning of an 8B, every weight trained, sharded over two or more GPUs of one or several machines.

torchrun --nproc_per_node=8 train.py configs/full.py --data.train_file T.jsonl --output_dir OUT

fp32 masters, gradients and AdamW states take 16 bytes a parameter, 128 GB in all for an 8B, divided by the number of
processes; --train.optimizer adamw8bit makes it 10 bytes. Blocks are gathered in bfloat16 one at a time. OUT/checkpoint-final
is a Hugging Face model; what resuming needs lies beside it, in shards, and goes on on any number of processes.
"""

from minilora.config import Config, DataConfig, EvalConfig, ModelConfig, ParallelConfig, TrainConfig

config = Config(
    output_dir="out/full",
    method="full",
    model=ModelConfig(name="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
    data=DataConfig(train_file="examples/wiki/train.jsonl", eval_file="examples/wiki/eval.jsonl", max_seq_length=2048),
    train=TrainConfig(
        epochs=2,
        batch_size=4,
        grad_acc_steps=1,
        learning_rate=1e-5,  # about a tenth of what LoRA takes
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
