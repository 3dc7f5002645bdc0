"""LTX checkpoints: what a file holds, found from its header alone.

Official files are safetensors with the transformer's parameters under `model.diffusion_model.` (next to a VAE, or
not), and a JSON `config` in their metadata, whose `transformer` part says how the parameters are to be used.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rayltx.diffusion_models.lightricks.safetensors_files import SAFETENSORS_DTYPES, damage_of, open_safetensors
from rayltx.errors import CheckpointError
from rayltx.whole_files import check_is_file

OFFICIAL_PREFIX = "model.diffusion_model."
# Under which a file may keep the transformer's names, or under none: the official one, and others that ComfyUI takes off.
PREFIXES = (OFFICIAL_PREFIX, "diffusion_model.", "model.model.", "model.", "net.")
LTX_MARKS = (
    "adaln_single.emb.timestep_embedder.linear_1.bias",
    "patchify_proj.weight",
)  # every LTX transformer has them
_AUDIO_MARK = "audio_adaln_single.linear.weight"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Of the parameter: the tensor's own, but for blocks of quantised ones."""
        return self.shape

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FileStamp:
    """What a file was when its header was read: the offsets in it are of no other."""

    machine: str
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileStamp:
        found = os.stat(path)
        return cls(_this_machine(), found.st_size, found.st_mtime_ns)

    def check(self, path: str) -> None:
        """Raises CheckpointError for another file in its place. A copy on another machine may have another time."""
        try:
            now = FileStamp.of(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read any more ({error.strerror})") from error
        if now.num_bytes != self.num_bytes or (now.machine == self.machine and now.modified_ns != self.modified_ns):
            raise CheckpointError(
                f"{path} has changed since it was loaded: it had {self.num_bytes} bytes and has {now.num_bytes}, or was written "
                "to; load it again"
            )


def _this_machine() -> str:
    """In which a file's time means something: names of machines can be alike. Where it is not known, each process is its own."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"process {os.getpid()}"


@dataclass(frozen=True)
class Checkpoint:
    """The transformer of a file. `tensors` is by official name without prefix, in the order of the file."""

    path: str
    prefix: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)  # the whole `config`; {} where the file has none
    stamp: FileStamp | None = None  # None: nothing is known of the file

    @property
    def transformer_config(self) -> Mapping[str, Any]:
        return self.config.get("transformer", {})

    @property
    def has_audio(self) -> bool:
        return _AUDIO_MARK in self.tensors

    @property
    def num_blocks(self) -> int:
        return 1 + max((int(m[1]) for m in map(_BLOCK.match, self.tensors) if m), default=-1)

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def version(self) -> str:
        """LTX-Video, LTX-2, LTX-2.3 or LTX-2.5, by what distinguishes their transformers."""
        if not self.has_audio:
            return "LTX-Video"
        if not self.transformer_config.get("cross_attention_adaln", False):
            return "LTX-2"
        newer = not self.transformer_config.get("ff_bias", True) or "keyframes_abs_pos_embedding" in self.tensors
        return "LTX-2.5" if newer else "LTX-2.3"

    @cached_property
    def portions(self) -> tuple[tuple[str, ...], ...]:
        """The tensors' names in portions to be moved at once: one a transformer block, and one for the rest."""
        by_block: dict[int, list[str]] = {}
        for name in self.tensors:
            match = _BLOCK.match(name)
            by_block.setdefault(int(match[1]) if match else -1, []).append(name)
        return tuple(tuple(by_block[block]) for block in sorted(by_block))

    def check_values(self) -> None:
        """Raises CheckpointError for damage that shows in the weights alone. Reads what it has to of the file."""

    def check_unchanged(self) -> None:
        if self.stamp is not None:
            self.stamp.check(self.path)

    @contextmanager
    def open(self) -> Iterator[CheckpointReader]:
        """Read tensors: `with checkpoint.open() as reader: reader.read(name)`.

        Raises CheckpointError where the file is gone, or has changed since its header was read.
        """
        self.check_unchanged()
        with open_safetensors(self.path) as file:
            yield CheckpointReader(self, file)


class CheckpointReader:
    """Reads a checkpoint's tensors from its open file, by their names without prefix."""

    def __init__(self, checkpoint: Checkpoint, file: Any) -> None:
        self._prefix, self._file = checkpoint.prefix, file

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on a private, copy-on-write mapping of the file: nothing is read before it is used.

        dtype: what to convert it to; None leaves it as it is stored.
        """
        tensor = self._file.read(self._prefix + name)
        return tensor if dtype is None else tensor.to(dtype)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Find out what a file holds, reading its header alone.

    Raises CheckpointError if it is missing, a pickle, damaged, or not an LTX transformer.
    """
    path = Path(path)
    check_is_file(path)
    if path.suffix.lower() in _PICKLE_SUFFIXES or _looks_like_pickle(path):
        raise CheckpointError(
            f"{path}: a pickle can run code when it is opened, so it is refused; use a .safetensors file of the model"
        )
    header = Header.of(path)
    prefix = transformer_prefix(path, header.tensors)
    return header.checkpoint(prefix, [name for name in header.tensors if name.startswith(prefix)])


@dataclass(frozen=True)
class Header:
    """Of a safetensors file, before anything is chosen of what it holds."""

    path: Path
    stamp: FileStamp
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # (dtype as safetensors spells it, shape) by name

    @classmethod
    def of(cls, path: Path) -> Header:
        """Raises CheckpointError for a file that is damaged."""
        stamp = FileStamp.of(path)
        try:
            with open_safetensors(path) as file:
                return cls(path, stamp, dict(file.metadata()), file.described())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {damage_of(error)}") from error

    def checkpoint(self, prefix: str, names: Iterable[str]) -> Checkpoint:
        """Of some of its tensors, whose names begin with `prefix`. Raises CheckpointError for what is not known of them."""
        tensors = {}
        for name in names:
            dtype, shape = self.tensors[name]
            if dtype not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{self.path}: tensor {name} has the dtype {dtype}, which is not known here")
            tensors[name.removeprefix(prefix)] = TensorInfo(SAFETENSORS_DTYPES[dtype], shape)
        config = read_config(self.path, self.metadata)
        return Checkpoint(str(self.path.resolve()), prefix, tensors, self.metadata, config, self.stamp)


def _looks_like_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or (len(start) == 4 and start[0] == 0x80 and start[1] in range(2, 6))


def transformer_prefix(path: Path, names: Collection[str]) -> str:
    """The prefix of an LTX transformer's names in a file. Raises CheckpointError if there is none among them."""
    prefix = find_prefix(names)
    missing = missing_marks(names, prefix)
    if missing:
        raise CheckpointError(
            f"{path}: not an LTX transformer: there is no {missing[0]} {among_tensors(names)}; choose an official file, or one "
            "that keeps the official names"
        )
    return prefix


def among_tensors(names: Collection[str]) -> str:
    """Among what something was looked for, for a message."""
    shown = ", ".join(sorted(names)[:3]) or "none"
    return f"among its {len(names)} tensors ({shown}, ...)"


def find_prefix(names: Collection[str], prefixes: Sequence[str] = PREFIXES) -> str:
    """The prefix under which an LTX transformer is found; else the one that most names carry; else none."""
    for prefix in (*prefixes, ""):
        if not missing_marks(names, prefix):
            return prefix
    for prefix in prefixes:
        if 2 * sum(name.startswith(prefix) for name in names) > len(names):
            return prefix
    return ""


def missing_marks(names: Collection[str], prefix: str) -> list[str]:
    """Which of an LTX transformer's marks are not there under a prefix."""
    return [mark for mark in LTX_MARKS if prefix + mark not in names]


def read_config(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The `config` of a file's metadata; {} where it has none. Raises CheckpointError for one that cannot be used."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError) as error:  # ValueError also of numbers that Python takes for too long
        raise CheckpointError(f"{path}: its `config` metadata is not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("transformer", {}), dict):
        raise CheckpointError(f"{path}: its `config` metadata has no `transformer` object")
    return config
