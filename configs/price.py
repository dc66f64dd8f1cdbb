r"""Predict a product's price from its description: Llama-3.1-8B in NF4.

    python train.py configs/price.py --data.train_file T.jsonl --data.eval_file E.jsonl \
        --hub.repo_id NAME/price --output_dir OUT

A row is {"text": "How much does this cost to the nearest dollar?\n\n<description>\n\nPrice is
$249.00"}. Only what follows the last "Price is $" is supervised, with the end token.

Each checkpoint is uploaded to a private repository on the hub, with the token in the environment
(HF_TOKEN); --hub.push False turns this off. infer.py --metrics numeric computes how far the
predicted prices are from the true ones.

The source is week 7 of Ed Donner's course "LLM engineering", in its form of 2024. The settings of
training are its settings. Deviations: eval.eval_steps (there is no evaluation there),
train.save_total_limit, eval.max_new_tokens, data.too_long, and a supervised end token.
docs/recipes.md has the figures of both forms of the course beside these, with the reasons.
"""

from minilora.config import (
    Config,
    DataConfig,
    EvalConfig,
    HubConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)

config = Config(
    output_dir="out/price",
    model=ModelConfig(name="meta-llama/Llama-3.1-8B", bits=4, double_quant=True),
    lora=LoraConfig(
        rank=32,
        alpha=64,
        dropout=0.1,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    data=DataConfig(
        train_file="examples/price/train.jsonl",
        eval_file="examples/price/eval.jsonl",
        format="text",
        response_marker="Price is $",
        max_seq_length=182,
        too_long="truncate",  # a long description loses its end; the price stays
    ),
    train=TrainConfig(
        epochs=1,
        batch_size=4,
        grad_acc_steps=1,
        learning_rate=1e-4,
        lr_scheduler="cosine",
        warmup_steps=0,
        warmup_ratio=0.03,
        weight_decay=0.001,
        max_grad_norm=0.3,
        optimizer="paged_adamw",
        save_steps=2000,
        save_total_limit=3,
    ),
    eval=EvalConfig(
        eval_steps=2000,
        num_generate_samples=32,
        temperature=0.0,
        max_new_tokens=8,
        metrics=("numeric",),
    ),
    hub=HubConfig(push=True, repo_id="your-name/price", private=True),
)
