"""Losses against TRL's on the same batch and weights: value and every gradient; and one short training trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from models import make_model, make_tokenizer, reference

from whet.engine.prefix import Row
from whet.train import losses
from whet.train.batches import packs
from whet.train.head import headed
from whet.train.loop import Schedule, Settings, _step, train

PAIRS = [
    {"prompt": "was the movie good?", "chosen": " it was great and funny", "rejected": " no"},
    {"prompt": "what is the film?", "chosen": " a story of the city", "rejected": " the question is not the answer"},
    {"prompt": "a review:", "chosen": " bad", "rejected": " it was not bad, it was great"},
    {"prompt": "people in the story?", "chosen": " positive or negative", "rejected": " the people of the city"},
]
BETA = 0.3


def settings(kind: Any, folder: Path, **more: Any) -> Any:
    """A TRL configuration that computes plainly: fp32, no dropout, no checkpointing, rows in their order."""
    return kind(
        output_dir=str(folder), per_device_train_batch_size=len(PAIRS), report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=None, train_sampling_strategy="sequential", **more,
    )  # fmt: skip


def batch_of(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


def split(batch: Any, prefix: str = "") -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, completion) token ids of each sequence of a TRL batch."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
    real = batch[f"{prefix}attention_mask"].bool()
    return [
        (tuple(i[r & ~m.bool()].tolist()), tuple(i[r & m.bool()].tolist()))
        for i, m, r in zip(ids, mask, real, strict=True)
    ]


def with_facts(pairs: list[Any], reference_model: Any) -> list[Row]:
    """Rows of (chosen, rejected) with the reference's log-probabilities."""
    half = len(pairs) // 2
    rows = []
    for (prompt, chosen), (_, rejected) in zip(pairs[:half], pairs[half:], strict=True):
        sums = [(sum(reference(reference_model, prompt, c)),) for c in (chosen, rejected)]
        rows.append(Row(prompt, (chosen, rejected), tuple(sums)))
    return rows


def same_gradients(ours: Any, theirs: Any) -> None:
    """Every weight has the same gradient, up to rounding."""
    found = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and name in found:
            assert torch.allclose(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(("kind", "normalise"), [("sigmoid", False), ("sigmoid_norm", True)])
def test_dpo_is_trls(kind: str, normalise: bool, tmp_path: Path) -> None:
    from datasets import Dataset

    theirs, ours, ref = make_model("llama"), make_model("llama"), make_model("llama", seed=1)
    trainer = trl.DPOTrainer(
        theirs, make_model("llama", seed=1), settings(trl.DPOConfig, tmp_path, beta=BETA, loss_type=[kind]),
        train_dataset=Dataset.from_list(PAIRS), processing_class=make_tokenizer(),
    )  # fmt: skip
    batch = batch_of(trainer)
    rows = with_facts(split(batch), ref)
    value, _ = _step(ours, ours, rows, losses.DPO(BETA, normalise))
    wanted = trainer.compute_loss(theirs, batch)
    wanted.backward()
    assert value == pytest.approx(float(wanted), rel=1e-4)
    same_gradients(ours, theirs)


@pytest.mark.parametrize(("seed", "other"), [(0, 1), (1, 0)])  # the KL estimate is above 0 in one of them, not in both
def test_kto_is_trls(seed: int, other: int, tmp_path: Path) -> None:
    from datasets import Dataset

    theirs, ours, ref = make_model("llama", seed), make_model("llama", seed), make_model("llama", other)
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 3 != 1} for n, p in enumerate(PAIRS)]
    trainer = trl.KTOTrainer(
        theirs, make_model("llama", other),
        settings(trl.KTOConfig, tmp_path, beta=BETA, desirable_weight=0.5, undesirable_weight=1.5),
        train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(),
    )  # fmt: skip
    batch = batch_of(trainer)
    gaps = [sum(reference(ours, p, c)) - sum(reference(ref, p, c)) for p, c in split(batch, "KL_")]
    kl = max(0.0, sum(gaps) / len(gaps))
    made = [
        Row(p, (c,), ((sum(reference(ref, p, c)), float(label), 0.5 if label else 1.5, kl),))
        for (p, c), label in zip(split(batch), batch["label"], strict=True)
    ]
    value, _ = _step(ours, ours, made, losses.KTO(BETA))
    wanted = trainer.compute_loss(theirs, batch)
    wanted.backward()
    assert value == pytest.approx(float(wanted), rel=1e-4)
    same_gradients(ours, theirs)


def test_reward_is_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification

    ours = make_model("llama")
    theirs = LlamaForSequenceClassification(ours.config)
    theirs.config.num_labels, theirs.num_labels = 1, 1
    theirs.score = torch.nn.Linear(ours.config.hidden_size, 1, bias=False)
    theirs.model.load_state_dict(ours.model.state_dict())
    trainer = trl.RewardTrainer(
        theirs, settings(trl.RewardConfig, tmp_path, disable_dropout=True), train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    batch = batch_of(trainer)
    whole = [tuple(i[m.bool()].tolist()) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    rows = []
    for chosen, rejected in zip(whole[: len(PAIRS)], whole[len(PAIRS) :], strict=True):
        cut = next(n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        rows.append(Row(chosen[:cut], tuple((*side[cut:], 0) for side in (chosen, rejected))))
    with headed(ours, 0):
        head = ours.get_output_embeddings()
        with torch.no_grad():
            head.weight.copy_(theirs.score.weight)
        value, _ = _step(ours, ours, rows, losses.Reward())
        wanted = trainer.compute_loss(theirs, batch)
        wanted.backward()
        assert value == pytest.approx(float(wanted), rel=1e-4)
        assert torch.allclose(head.weight.grad, theirs.score.weight.grad, rtol=1e-3, atol=1e-6)
        same_gradients(ours.model, theirs.model)
    assert ours.get_output_embeddings().weight.shape == (300, 32)


def test_next_token_and_a_whole_trajectory_are_trls(tmp_path: Path) -> None:
    """Six steps of full training over two epochs: the same losses step by step, and the same weights at the end."""
    from datasets import Dataset

    theirs, ours = make_model("llama"), make_model("llama")
    texts = [{"prompt": p["prompt"], "completion": p[side]} for p in PAIRS for side in ("chosen", "rejected")]
    texts += texts[2:6]  # three batches of four
    schedule = Schedule(3e-3, 6, warmup=1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: schedule.at(n) / schedule.learning_rate)
    trainer = trl.SFTTrainer(
        theirs, settings(trl.SFTConfig, tmp_path, max_steps=6, logging_steps=1, save_strategy="no", disable_tqdm=True),
        train_dataset=Dataset.from_list(texts), processing_class=make_tokenizer(), optimizers=(optimizer, rate),
    )  # fmt: skip
    made = []
    for batch in trainer.get_train_dataloader():
        labels = batch["labels"]
        real = batch["attention_mask"].bool()
        made.append([
            Row(tuple(i[r & (t == -100)].tolist()), (tuple(i[r & (t != -100)].tolist()),))
            for i, t, r in zip(batch["input_ids"], labels, real, strict=True)
        ])  # fmt: skip
    curves = train(ours, lambda n: made[n % 3], losses.NextToken(), Settings(schedule, clip=1.0))
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [value for _, value in curves.train] == pytest.approx(logged, rel=1e-3)
    assert curves.train[-1][1] < 0.8 * curves.train[0][1]
    other = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.allclose(weight, other[name], atol=2e-4), name


def test_preferences_by_hand() -> None:
    """Two tokens of vocabulary and even logits: every number can be worked out on paper."""
    import math

    rows = [Row((1,), ((0, 1), (1,)), ((-3.0, 2.0), (-1.0, 2.0)))]
    [pack] = packs(rows, torch.float32, torch.device("cpu"))
    logits = torch.zeros(3, 2)
    half = -math.log(2)
    margin = (2 * half + 3) - (half + 1)
    assert float(losses.DPO(0.5)(logits, pack)) == pytest.approx(2 * math.log(1 + math.exp(-0.5 * margin)), rel=1e-6)
    per_token = (2 * half + 3) / 2 - (half + 1)
    wanted = 2 * math.log(1 + math.exp(-0.5 * per_token))
    assert float(losses.DPO(0.5, normalise=True)(logits, pack)) == pytest.approx(wanted, rel=1e-6)
    with_sft = float(losses.DPO(0.5, sft=0.25)(logits, pack) - losses.DPO(0.5)(logits, pack))
    assert with_sft == pytest.approx(2 * 0.25 * math.log(2), rel=1e-5)
    found = losses.PolicyGradient(beta=0.1)(logits, pack)  # facts: advantage and reference
    by_hand = 0.5 * ((3 * 2 * half + 0.05 * (2 * half - 2) ** 2) + (1 * half + 0.05 * (half - 2) ** 2))
    assert float(found) == pytest.approx(by_hand, rel=1e-5)
    drawn = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    plain, warm = losses.PolicyGradient(0.1), losses.PolicyGradient(0.1, temperature=2.0)
    assert float(warm(drawn, pack)) == pytest.approx(float(plain(drawn / 2, pack)), rel=1e-6)
    heads = torch.tensor([[9.0], [2.0], [0.5]])  # the rewards stand at the last place of each side
    [pack] = packs([Row((1,), ((0, 1), (1,)), ((3.0,), (3.0,)))], torch.float32, torch.device("cpu"))
    assert losses.rewards(heads, pack).tolist() == [2.0, 0.5]
    assert float(losses.Reward()(heads, pack)) == pytest.approx(3 * math.log(1 + math.exp(-1.5)), rel=1e-6)
