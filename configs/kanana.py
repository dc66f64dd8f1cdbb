"""Korean instruction tuning of kanana-1.5-8b (Kakao) in NF4, as "### 질문: ... ### 답변: ...".

    python train.py configs/kanana.py --data.train_file T.jsonl --output_dir OUT

A row is {"question": "...", "answer": "..."}. The prompt is two lines with a blank line between
them. No chat template is used, and infer.py writes its prompts in the same form.

The source is a QLoRA run over this model; its code is not public as far as we found. Known
deviations: model.double_quant, train.lr_scheduler (cosine), train.warmup_ratio and train.optimizer
(paged 8-bit AdamW). They save memory and shorten the first steps; docs/recipes.md has the reasons.
"""

from minilora.config import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, TrainConfig

config = Config(
    output_dir="out/kanana",
    model=ModelConfig(name="kakaocorp/kanana-1.5-8b-base", bits=4, double_quant=True),
    lora=LoraConfig(rank=64, alpha=128, dropout=0.05),
    data=DataConfig(
        train_file="examples/kanana/train.jsonl",
        eval_file="examples/kanana/eval.jsonl",
        format="prompt",
        # The space is part of the answer's first token, so it is in the response template. At the
        # end of the prompt, that token would count as prompt and not be supervised.
        prompt_template="### 질문: {question}\n\n### 답변:",
        response_template=" {answer}",
        chat=False,
        max_seq_length=1024,
    ),
    train=TrainConfig(
        epochs=1,
        batch_size=4,
        grad_acc_steps=8,
        learning_rate=2e-4,
        lr_scheduler="cosine",
        warmup_steps=0,
        warmup_ratio=0.03,
        optimizer="paged_adamw8bit",
        logging_steps=10,
        save_steps="epoch",
    ),
    eval=EvalConfig(
        eval_steps="epoch",
        num_generate_samples=5,
        temperature=0.0,
        max_new_tokens=256,
    ),
)
