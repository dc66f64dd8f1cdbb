"""Multi-turn instruction tuning of Llama-3.1-8B (or Qwen), with everything that keeps a long run honest.

torchrun --nproc_per_node=8 train.py configs/instruct.py --data.train_file T.jsonl --data.eval_file E.jsonl --output_dir OUT

A row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}: every assistant turn
is learnt, unless it says "train": false. The rate falls by a cosine to 1 % of its peak; every 500 steps the average of the
weights (EMA) is evaluated on the first 512 rows and answers 32 of them, and the run ends when five evaluations in a row were no
better than the best, whose checkpoint is kept. Llama-3.1's base model has never learnt the tokens that end a turn (a
warning says so): this recipe starts from the instruct model; from a base, set --lora.train_embeddings True.

Too little memory for a copy on each GPU: --parallel.strategy fsdp, and --parallel.cpu_offload True on top of it. Qwen:
--model.name Qwen/Qwen2.5-7B-Instruct. Conversations longer than 4,096 tokens are dropped and counted.
"""

from minilora.config import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, ParallelConfig, TrainConfig

config = Config(
    output_dir="out/instruct",
    model=ModelConfig(name="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
    lora=LoraConfig(rank=32, alpha=64),
    data=DataConfig(
        train_file="examples/instruct/train.jsonl",
        eval_file="examples/instruct/eval.jsonl",
        eval_size=512,
        eval_first=True,
        format="messages",
        max_seq_length=4096,
    ),
    train=TrainConfig(
        epochs=3, batch_size=4, grad_acc_steps=1, learning_rate=1e-4, lr_scheduler="cosine", min_lr_ratio=0.01, warmup_steps=2000,
        ema_decay=0.999, save_total_limit=2, early_stopping_patience=5,
    ),
    eval=EvalConfig(
        eval_steps=500, batch_size=8, num_generate_samples=32, temperature=0.0, max_new_tokens=512,
        metrics=("ppl", "bleu", "edit_distance", "rouge", "meteor"), eval_on_start=True,
    ),
    parallel=ParallelConfig(strategy="ddp"),
)  # fmt: skip
