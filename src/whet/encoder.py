"""A fine-tuned sentence encoder with a linear head: the strongest baseline without a language model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from whet.embed import model_folder

BATCH = 32
EPOCHS = 4.0
LEARNING_RATE = 1e-4  # small encoders want more than the 2e-5 of BERT-base (Devlin et al. 2019)
LEAST_STEPS = 20  # fewer leave the head nearly as it was drawn
LONGEST = 128  # word pieces of a text that are read


@dataclass(frozen=True)
class Encoder:
    """MiniLM under a fresh linear head, all weights trained; at most `tokens` word pieces are trained on."""

    tokens: int
    seed: int = 0

    def __call__(self, texts: Sequence[str], truth: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
        """Train on texts and their labels; returns a label for each wanted text, none where steps would be too few."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from whet.model import own_device, quiet

        labels = sorted(set(truth))
        tokenizer = quiet(AutoTokenizer.from_pretrained, model_folder())
        ids = tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]
        size = sum(map(len, ids)) / len(ids)
        steps = round(min(max(EPOCHS * len(ids), LEAST_STEPS * BATCH), self.tokens / size) / BATCH)
        if steps < LEAST_STEPS:
            return ()
        device = own_device()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
            torch.manual_seed(self.seed)
            model = quiet(AutoModelForSequenceClassification.from_pretrained, model_folder(), num_labels=len(labels),
                          dtype=torch.float32).to(device)  # fmt: skip
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda n: min(1.0, (n + 1) / max(1, steps // 10), (steps - n) / max(1, 0.9 * steps))
            )
            model.train()
            for part in _steps(len(ids), steps, self.seed):
                batch = tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt").to(device)
                target = torch.tensor([labels.index(truth[i]) for i in part], device=device)
                model(**batch, labels=target).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
        model.eval()
        answers = [""] * len(wanted)
        order = sorted(range(len(wanted)), key=lambda i: len(wanted[i]))
        with torch.inference_mode():
            for at in range(0, len(order), 2 * BATCH):
                part = order[at : at + 2 * BATCH]
                batch = tokenizer([wanted[i] for i in part], truncation=True, max_length=LONGEST, padding=True,
                                  return_tensors="pt")  # fmt: skip
                for i, best in zip(part, model(**batch.to(device)).logits.argmax(-1).tolist(), strict=True):
                    answers[i] = labels[best]
        return tuple(answers)


def _steps(rows: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of each step: every row once per epoch, in an order that depends on the seed only."""
    draw, order = random.Random(seed), list[int]()
    while len(order) < steps * BATCH:
        epoch = list(range(rows))
        draw.shuffle(epoch)
        order += epoch
    return [order[n * BATCH : (n + 1) * BATCH] for n in range(steps)]
