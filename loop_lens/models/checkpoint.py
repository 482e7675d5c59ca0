"""A folder with a model: its config, read once, and its weights, opened once when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from loop_lens.models.files import UnreadableError, read_json, reading

INDEX = "model.safetensors.index.json"
_SINGLE, _CONFIG, _GENERATION = "model.safetensors", "config.json", "generation_config.json"


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""What safetensors calls dtypes."""


class UnsafeCheckpointError(UnreadableError):
    """A checkpoint that holds pickled weights only.

    Example:
        >>> _ = open("config.json", "w").write('{"model_type": "ouro"}')
        >>> torch.save({}, "pytorch_model.bin")
        >>> loop_lens.boot(".")
        Traceback (most recent call last):
        loop_lens.models.checkpoint.UnsafeCheckpointError: . holds pickled weights only (pytorch_model.bin), ...
    """


class WeightsError(UnreadableError):
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
        UnreadableError: If a file is damaged; names it, and what is wrong with it.
        UnsafeCheckpointError: On ``weights``, if they are pickled, which would execute code.
    """

    def __init__(self, folder: Path, name: str | None = None, *, trusted: bool = False) -> None:
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no {_CONFIG}: it is not a checkpoint folder")
        self.folder, self.name, self.trusted = folder, name or str(folder), bool(trusted)
        self.config = read_json(self.config_path)

    @property
    def config_path(self) -> Path:
        """Where its config lies."""
        return self.folder / _CONFIG

    @property
    def model_type(self) -> str | None:
        """The family that config.json names."""
        return self.config.get("model_type")

    @cached_property
    def weights(self) -> Tensors:
        """The checkpoint's tensors by name."""
        return Tensors(_weight_files(self.folder))

    def open_with(self, auto: Any, *, dtype: Any, attn_implementation: Any) -> Any:
        """The model that a class of transformers makes of the folder, without pickles or the network.

        Raises:
            WeightsError: If weights are missing, unknown or misshapen.
            UnreadableError: If a file is damaged.
        """
        layout = self.weights.layout
        for key, value in self.config.items():
            # A config lists what each layer is, whether or not there are weights: HRM-Text's of every cycle.
            if "layer" in key and isinstance(value, int) and value > 1000 * len(layout):
                raise WeightsError(
                    f"{self.name}: {key} in its config.json is {value}, for {len(layout)} tensors"
                )
        about = {"trust_remote_code": self.trusted, "local_files_only": True}
        with reading(self.config_path):
            config = AutoConfig.from_pretrained(self.folder, **about)
            require_blocks(self.name, config, layout)
            with torch.device("meta"):
                bare = _empty(auto, config, self.trusted)
        require_shapes(self.name, layout, bare.state_dict())
        if (self.folder / _GENERATION).is_file():
            with reading(self.folder / _GENERATION):
                GenerationConfig.from_pretrained(self.folder)
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        with reading(self.folder):
            model, info = auto.from_pretrained(
                self.folder,
                use_safetensors=True,
                output_loading_info=True,
                **about,
                **{name: value for name, value in options.items() if value is not None},
            )
        require_fitting(
            self.name, missing=info.get("missing_keys", ()), unknown=info.get("unexpected_keys", ())
        )
        return model.eval()


def _empty(auto: Any, config: Any, trusted: bool) -> Any:
    """A model without weights of a class of transformers, or of one of its Auto classes."""
    if hasattr(auto, "from_config"):
        return auto.from_config(config, trust_remote_code=trusted)
    return auto(config)


def require_blocks(source: str, config: Any, layout: Mapping[str, Tensor]) -> None:
    """Raise if a config asks for more blocks than weights have tensors: blocks cost memory even without weights.

    Raises:
        WeightsError: If it does.
    """
    n = getattr(config, "num_layers_per_stack", None) or getattr(config, "num_hidden_layers", 0)
    if n > len(layout):
        raise WeightsError(
            f"{source}: its config.json asks for {n} blocks, and it holds {len(layout)} tensors"
        )


def require_shapes(source: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise unless tensors of the same names have the same shape, and numbers that a model computes with.

    Raises:
        WeightsError: If some do not; names the first.
    """
    for name in given.keys() & wanted.keys():
        shape, expected = tuple(given[name].shape), tuple(wanted[name].shape)
        if shape != expected:
            raise WeightsError(f"{source}: {name} has shape {shape}, but its config asks for {expected}")
        if wanted[name].is_floating_point() != given[name].is_floating_point():
            raise WeightsError(f"{source}: {name} holds {given[name].dtype}, which are no weights")


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
    if (folder / INDEX).is_file():
        return _shards(folder)
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


def _shards(folder: Path) -> list[Path]:
    """The files that an index names, which must lie in its own folder (or the hub's store behind it)."""
    index = folder / INDEX
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        home = folder.resolve()
        store = home.parent.parent / "blobs"  # a snapshot of the hub consists of links into it
        for name in names:
            shard = folder / name
            if Path(name).name != name or shard.resolve().parent not in (home, store):
                raise ValueError(f"weight_map names {name!r}, which is no file of its own folder")
            if not shard.is_file():
                raise ValueError(f"weight_map names {name!r}, which is not there")
    return [folder / name for name in names]


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each read when it is asked for.

    Args:
        files: The files.

    Attributes:
        layout: Shapes and dtypes by name, as tensors on the meta device.
    """

    def __init__(self, files: Collection[Path]) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        self.layout: dict[str, Tensor] = {}
        for path in files:
            with reading(path):
                handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    about = handle.get_slice(name)
                    dtype = _DTYPES[about.get_dtype()]
                    self.layout[name] = torch.empty(about.get_shape(), dtype=dtype, device="meta")
                    self._files[name] = path, handle

    def __getitem__(self, name: str) -> Tensor:
        path, handle = self._files[name]
        with reading(path):
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
