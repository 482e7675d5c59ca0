"""A bridge's weights under the names of its checkpoint: state dicts and folders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from loop_lens.models.published.weights import WeightsError

if TYPE_CHECKING:
    from loop_lens.bridge.model import HookedLoopedTransformer


def published_state(model: HookedLoopedTransformer, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """A model's weights under the names of its checkpoint."""
    return model.body.to_checkpoint(model.native_state(keep_vars=keep_vars))


def load_state(
    model: HookedLoopedTransformer, state: Mapping[str, Tensor], *, strict: bool, assign: bool
) -> Any:
    """Load weights, under published or native names, into a model at any number of iterations.

    Raises:
        WeightsError: If ``strict`` and the names or shapes do not fit; nothing is loaded then.
    """
    native = model.native_state(keep_vars=True)
    given = model.body.from_checkpoint(state, native, strict=strict)
    missing = sorted(set(native) - set(given))
    unexpected = sorted(set(given) - set(native))
    if strict and (missing or unexpected):
        raise WeightsError(
            f"the state dict does not fit: missing {missing[:4]}, unknown {unexpected[:4]}; "
            "model.state_dict() has the names"
        )
    for name, tensor in given.items():
        if name in native and tensor.shape != native[name].shape:
            raise WeightsError(
                f"{name} has shape {tuple(tensor.shape)}, the model wants {tuple(native[name].shape)}"
            )
    raw = model.original_model.state_dict()
    actual = {key.replace("._original_component", ""): key for key in raw}
    fitting = {actual[name]: tensor for name, tensor in given.items() if name in native}
    model.original_model.load_state_dict(fitting, strict=False, assign=assign)
    if assign and getattr(model.original_model.config, "tie_word_embeddings", False):
        _retie(model.original_model)
    return _IncompatibleKeys(missing, unexpected)


def _retie(model: nn.Module) -> None:
    modules = {name.replace("._original_component", ""): m for name, m in model.named_modules()}
    for target, source in getattr(model, "_tied_weights_keys", {}).items():
        to, frm = modules[target.rpartition(".")[0]], modules[source.rpartition(".")[0]]
        to._parameters[target.rpartition(".")[2]] = frm._parameters[source.rpartition(".")[2]]


def save(model: HookedLoopedTransformer, folder: Path) -> None:
    """Write a folder that ``loop_lens.boot`` opens again."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = copy.deepcopy(model.original_model.config)
    config.architectures = [type(model.original_model).__name__]
    config.update(model.body.config_fields)
    state = model.native_state()
    unique: dict[int, str] = {}
    for name, tensor in state.items():
        unique.setdefault(tensor.data_ptr(), name)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    kept = {n: t for n, t in state.items() if not tied or unique[t.data_ptr()] == n}
    config.save_pretrained(folder)
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in kept.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
