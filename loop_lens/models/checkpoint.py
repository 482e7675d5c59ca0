"""A folder with a model: its config, read once, and its weights, opened once when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

_INDEX, _SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


class UnsafeCheckpointError(ValueError):
    """A checkpoint that holds pickled weights only.

    Example:
        >>> _ = open("config.json", "w").write('{"model_type": "ouro"}')
        >>> torch.save({}, "pytorch_model.bin")
        >>> loop_lens.boot(".")
        Traceback (most recent call last):
        loop_lens.models.checkpoint.UnsafeCheckpointError: . holds pickled weights only (pytorch_model.bin), ...
    """


class WeightsError(ValueError):
    """Weights that are not those of the model that a config names.

    Example:
        >>> model.load_state_dict({"lm_head.bias": torch.zeros(2)})
        Traceback (most recent call last):
        loop_lens.models.checkpoint.WeightsError: the state dict does not fit: missing ['lm_head.weight', ...
    """


class Checkpoint:
    """A checkpoint folder.

    Args:
        folder: Where it lies.
        name: What to call it in errors; the folder by default.
        trusted: Whether code that the folder brings along may run.

    Attributes:
        config: The content of its config.json.
        weights: Its tensors by name, each read when it is asked for.

    Raises:
        FileNotFoundError: If there is no config.json; on ``weights``, if there are none.
        UnsafeCheckpointError: On ``weights``, if they are pickled, which would execute code.
    """

    def __init__(self, folder: Path, name: str | None = None, *, trusted: bool = False) -> None:
        path = folder / _CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {_CONFIG}: it is not a checkpoint folder")
        self.folder, self.name, self.trusted = folder, name or str(folder), trusted
        self.config: dict[str, Any] = json.loads(path.read_text())

    @property
    def model_type(self) -> str | None:
        """The family that config.json names."""
        return self.config.get("model_type")

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """The checkpoint's tensors by name."""
        return _Tensors(_weight_files(self.folder))

    def open_with(self, auto: Any, *, dtype: Any, attn_implementation: Any, **kwargs: Any) -> Any:
        """The model that a class of transformers makes of the folder, without pickles or the network.

        Raises:
            WeightsError: If weights are missing, unknown or misshapen.
        """
        _weight_files(self.folder)
        options = {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}
        try:
            model, info = auto.from_pretrained(
                self.folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                local_files_only=True,
                **{name: value for name, value in options.items() if value is not None},
            )
        except RuntimeError as error:
            raise WeightsError(f"{self.name}: its weights do not fit its config.json: {error}") from error
        require_fitting(
            self.name,
            missing=info.get("missing_keys", ()),
            unknown=info.get("unexpected_keys", ()),
            misshapen=info.get("mismatched_keys", ()),
        )
        return model.eval()


def require_fitting(source: str, **problems: Collection[Any]) -> None:
    """Raise if weights have problems, given as names by what is wrong with them.

    Raises:
        WeightsError: If any name is given.
    """
    described: list[str] = []
    for problem, names in problems.items():
        if names:
            first = ", ".join(sorted(str(name) for name in names)[:4])
            described.append(f"{len(names)} {problem} ({first}{', ...' if len(names) > 4 else ''})")
    if described:
        raise WeightsError(
            f"{source} does not hold this family's weights: {'; '.join(described)}. Its config.json and its "
            "weights must be of the same model."
        )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickled = [p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix)]
    if pickled:
        raise UnsafeCheckpointError(
            f"{folder} holds pickled weights only ({pickled[0]}), and opening a pickle executes code: convert "
            "them to safetensors where you trust them, e.g. "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        )
    raise FileNotFoundError(f"{folder} holds no {_SINGLE}")


class _Tensors(Mapping[str, Tensor]):
    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in files:
            handle = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
