"""QLoRA (Dettmers et al., arXiv 2305.14314): Mistral-7B over an NF4 base, on one GPU of 24 GB.

    python train.py configs/qlora.py --data.train_file T.jsonl --output_dir OUT

It needs about 11 GB, so a GPU of 16 GB is enough too:

    3.6 GB    the linear layers in 4 bits with double quantization (4.0 without)
    0.5 GB    embedding and head in bfloat16
    1.3 GB    the adapters: 84 M parameters at rank 32, 16 bytes each: weight, gradient, two states
    2.1 GB    the kept inputs of 32 blocks, for 4 x 2,048 tokens
    3   GB    about, for the activations of one block and their gradients
    0.3 GB    one dequantized weight, and one chunk of the loss

These numbers are computed. This one was measured, on a CPU: a random model of this shape takes
4.3 GiB at most while it is read and quantized, and 4.2 GiB afterwards, with adapters.

The source is QLoRA's paper and its script for a 7B. Deviations: model.name, lora.rank,
lora.dropout, train.learning_rate, train.lr_scheduler, train.max_grad_norm, train.optimizer,
train.epochs, data.max_seq_length. docs/recipes.md has both figures of each, with the reason.

Merge with `python merge.py OUT/checkpoint-final --verify` into the original 16-bit weights, or with
--from_quantized into the dequantized weights of training.
"""

from minilora.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/qlora",
    model=ModelConfig(name="mistralai/Mistral-7B-v0.3", bits=4, double_quant=True),
    lora=LoraConfig(rank=32, alpha=16),
    data=DataConfig(
        train_file="examples/wiki/train.jsonl",
        eval_file="examples/wiki/eval.jsonl",
        chat_template="mistral",
        max_seq_length=2048,
    ),
    train=TrainConfig(
        epochs=2,
        batch_size=4,
        grad_acc_steps=4,
        learning_rate=1e-4,  # about ten times that for full fine-tuning
        lr_scheduler="constant_with_warmup",
        warmup_steps=100,
        optimizer="adamw",  # paged_adamw8bit saves 0.7 GB here, but waits for every parameter
    ),
)
