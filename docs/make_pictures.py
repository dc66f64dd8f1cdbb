"""Draw the README's two pictures: `make pictures`, with Chromium installed.

docs/pictures/report.png is the upper part of the report of a run of configs/tiny.py.
docs/pictures/loss.png shows the training loss of minilora and of transformers + peft, step by step,
from the same adapter on the same rows. The third, docs/pictures/ontology.png, is drawn by
bench/ontology.py.
"""

import json
import math
import tempfile
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

import train
from docs.screenshot import find_browser, screenshot
from minilora.cli import load_config
from minilora.config import Config
from minilora.data.cache import load_documents
from minilora.data.dataset import Documents, LabelDraw, step_order
from minilora.data.tokenizer import Tokenizer

PICTURES = Path(__file__).resolve().parent / "pictures"
STEPS = 120


def main() -> None:
    browser = find_browser()
    PICTURES.mkdir(exist_ok=True)

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run = load_config(["configs/tiny.py", "--output_dir", str(directory / "tiny")])
        assert train.main(run) == 0
        screenshot(browser, directory / "tiny" / "report.html", PICTURES / "report.png", 1200, 920)

        ours, reference = losses_of_both(directory)
        page = directory / "loss.html"
        page.write_text(loss_page(ours, reference), encoding="utf-8")
        screenshot(browser, page, PICTURES / "loss.png", 900, 360)


def losses_of_both(directory: Path) -> tuple[list[float], list[float]]:
    """Train the same adapter on the same rows with minilora and with transformers + peft."""
    adapter = save_fresh_adapter(directory / "adapter")
    flags = ["--output_dir", str(directory / "run"), "--lora.init_from", str(adapter)]
    flags += ["--train.max_steps", str(STEPS), "--train.logging_steps", "1"]
    flags += ["--eval.num_generate_samples", "0"]
    config = load_config(["configs/tiny.py", *flags])
    assert train.main(config) == 0

    lines = (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ours = [row["loss"] for row in rows if "loss" in row]
    return ours, reference_losses(config, adapter)


def save_fresh_adapter(directory: Path) -> Path:
    """Save an untrained adapter made by peft, with the rank and targets of configs/tiny.py."""
    config = load_config(["configs/tiny.py"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.name, dtype=torch.float32
    )
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=int(config.lora.alpha),
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(model, lora).save_pretrained(str(directory))
    return directory


def reference_losses(config: Config, adapter: Path) -> list[float]:
    """Train with transformers + peft on padded batches; return the loss of each step."""
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = config.train
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    scheduler = transformers.get_scheduler(
        settings.lr_scheduler, optimizer, settings.warmup_steps, STEPS
    )

    tokenizer = Tokenizer(config.model.name)
    documents = load_documents(config.data.train_file, config.data, tokenizer, "train_file")
    size = settings.batch_size
    steps_per_epoch = math.ceil(len(documents) / size)
    losses = []
    for step in range(STEPS):
        epoch, position = divmod(step, steps_per_epoch)
        order = step_order(documents.lengths, size, config.seed, epoch, True, True)
        indices = order[position * size : (position + 1) * size].tolist()
        loss = padded_loss(model, documents, indices, LabelDraw(config.seed, epoch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def padded_loss(
    model: torch.nn.Module, documents: Documents, indices: list[int], draw: LabelDraw
) -> torch.Tensor:
    """Return the mean loss of the supervised tokens of a right-padded batch."""
    ids = [torch.from_numpy(documents.ids(i)).long() for i in indices]
    labels = [torch.from_numpy(documents.labels(i, draw)) for i in indices]
    batch = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    targets = pad_sequence(labels, batch_first=True, padding_value=-100)
    logits = model(input_ids=batch, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())


def loss_page(ours: list[float], reference: list[float]) -> str:
    """Return an HTML page with both loss curves, minilora as a line and peft as circles."""
    assert len(ours) == len(reference) == STEPS
    gap = max(abs(a - b) for a, b in zip(ours, reference, strict=True))
    top = math.ceil(max(ours))

    def x(step: int) -> float:
        return 60 + 810 * step / STEPS

    def y(loss: float) -> float:
        return 310 - 250 * loss / top

    line = " ".join(f"{x(i):.1f},{y(loss):.1f}" for i, loss in enumerate(ours, start=1))
    circles = "".join(
        f'<circle cx="{x(i):.1f}" cy="{y(loss):.1f}" r="4" fill="none" stroke="#d1730c"/>'
        for i, loss in enumerate(reference, start=1)
        if i % 3 == 1
    )
    grid = "".join(
        f'<line x1="60" x2="870" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e3e3e0"/>'
        f'<text x="50" y="{y(v) + 5:.1f}" text-anchor="end">{v}</text>'
        for v in range(0, top + 1, max(1, top // 5))
    )
    steps = "".join(
        f'<text x="{x(v):.1f}" y="332" text-anchor="middle">{v}</text>'
        for v in range(0, STEPS + 1, 20)
    )
    return f"""<!doctype html><meta charset="utf-8"><body style="margin:0;background:#fdfdfb">
<svg width="900" height="360" font-family="DejaVu Sans, sans-serif" font-size="14" fill="#333">
<text x="60" y="28" font-size="17" font-weight="bold">Training loss, {STEPS} steps</text>
<line x1="330" x2="360" y1="22" y2="22" stroke="#0a6ea8" stroke-width="2"/>
<text x="368" y="27">minilora</text>
<circle cx="470" cy="22" r="4" fill="none" stroke="#d1730c"/>
<text x="482" y="27">transformers + peft (every third step); largest gap {gap:.1e}</text>
{grid}{steps}<polyline points="{line}" fill="none" stroke="#0a6ea8" stroke-width="2"/>
{circles}<text x="465" y="352" text-anchor="middle">optimizer step</text></svg>"""


if __name__ == "__main__":
    main()
