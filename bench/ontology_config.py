"""The settings of the training runs of bench/ontology.py that are the same for all of them.

Flags set the others: files, seed, rank, learning rate, and whether labels are dropped. A run stops
when two evaluations in a row were no better, as a user would let it; its best checkpoint is the
one that answers.
"""

from minilora.config import Config, DataConfig, EvalConfig, LogConfig, TrainConfig

config = Config(
    data=DataConfig(eval_size=100, max_seq_length=512),
    train=TrainConfig(
        epochs=4,
        batch_size=16,
        warmup_steps=20,
        logging_steps=16,
        gradient_checkpointing=False,
        early_stopping_patience=2,
        metric_for_best_model="out_of_domain/loss",
        save_total_limit=1,
    ),
    eval=EvalConfig(eval_steps=32, num_generate_samples=0),
    log=LogConfig(tensorboard=False),
)
