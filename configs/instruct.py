r"""Instruction tuning of Llama-3.1-8B-Instruct (or Qwen) on conversations, for long runs.

    torchrun --nproc_per_node=8 train.py configs/instruct.py \
        --data.train_file T.jsonl --data.eval_file E.jsonl --output_dir OUT

A row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."},
...]}. Every assistant turn is supervised, unless it has "train": false. Conversations of more than
4,096 tokens are dropped and counted.

The learning rate falls along a cosine to 1 % of its peak. Every 500 steps the moving average of the
weights (EMA) is evaluated on the first 512 rows, and answers 32 of them. The run ends when five
evaluations in a row were no better than the best one, whose checkpoint is kept.

The recipe starts from the instruct model, because Llama-3.1's base model has never learnt the
tokens that end a turn (a run over it prints a warning). To start from a base model, set
--lora.train_embeddings True. For Qwen set --model.name Qwen/Qwen2.5-7B-Instruct.

The source is the example configs of universal-llm-trainer. From there are the model in bfloat16,
the cosine to 1 % and the metrics. Deviations: lora.rank, lora.alpha, lora.dropout,
lora.target_modules, train.learning_rate, train.epochs, train.batch_size, train.grad_acc_steps,
train.warmup_steps (micro-batches there), train.ema_decay, train.early_stopping_patience,
data.max_seq_length, eval.eval_steps, eval.max_new_tokens, train.max_grad_norm. docs/recipes.md has
both figures of each, with the reason.

If a copy of the model does not fit on each GPU, set --parallel.strategy fsdp, and if that is not
enough, --parallel.cpu_offload True as well.
"""

from minilora.config import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)

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
        epochs=3,
        batch_size=4,
        grad_acc_steps=1,
        learning_rate=1e-4,
        lr_scheduler="cosine",
        min_lr_ratio=0.01,
        warmup_steps=2000,
        ema_decay=0.999,
        save_total_limit=2,
        early_stopping_patience=5,
    ),
    eval=EvalConfig(
        eval_steps=500,
        eval_on_start=True,
        batch_size=8,
        num_generate_samples=32,
        temperature=0.0,
        max_new_tokens=512,
        metrics=("ppl", "bleu", "edit_distance", "rouge", "meteor"),
    ),
    parallel=ParallelConfig(strategy="ddp"),
)
