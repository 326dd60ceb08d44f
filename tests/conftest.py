"""Fixtures shared by the tests: a home of their own, one thread, a tiny tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: tiny tensors gain nothing from more, and results do not depend on the machine.

    So do processes that tests start: several tests run at once.
    """
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever draws at random draws the same in every run and in every order of the tests."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A WHET_HOME of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WHET_HOME", str(folder))
    return folder


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded in fp32 whatever the machine multiplies best."""
    import torch

    monkeypatch.setattr("whet.model.compute_dtype", lambda: torch.float32)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny ChatML tokenizer."""
    from models import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama saved with its tokenizer."""
    from models import save_model

    return save_model(tmp_path_factory.mktemp("tiny") / "llama")
