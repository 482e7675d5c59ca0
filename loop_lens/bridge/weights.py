"""The weights of a model under the names of its checkpoint: state dicts and folders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from loop_lens.models.checkpoint import INDEX, WeightsError
from loop_lens.models.files import replacing
from loop_lens.unrolling.body import LoopBody


class Weights:
    """Reads, loads and saves the weights of a torch model that a bridge was built into.

    Made before the bridge is: a bridge adds modules, and with them names that are no weights.

    Args:
        model: The torch model.
        body: What knows the names of its checkpoint.
    """

    def __init__(self, model: nn.Module, body: LoopBody) -> None:
        self.model, self.body = model, body
        self.names = list(model.state_dict())
        self.homeless: list[str] = []

    def own(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """The weights under the model's own names.

        Raises:
            WeightsError: If other weights run since they were processed.
        """
        if self.homeless:
            some = ", ".join(self.homeless[:3]) + (", ..." if len(self.homeless) > 3 else "")
            raise WeightsError(
                f"after enable_compatibility_mode() this {type(self.model).__name__} runs on {some}, for which its "
                "checkpoint has no place: save and load before it, or open the model again"
            )
        clean = self._all(keep_vars=keep_vars)
        return {name: clean[name] for name in self.names}

    def _all(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        raw = self.model.state_dict(keep_vars=keep_vars)
        return {_own_name(name): tensor for name, tensor in raw.items()}

    def follow_processing(self, blocks: nn.Module) -> None:
        """Note which weights run since processing that have no name in the checkpoint, ties included."""
        every = self._all(keep_vars=True)
        made = {name: tensor for name, tensor in every.items() if name not in self.names}
        known = {id(tensor) for tensor in every.values()}
        made |= {f"a block's {name}": p for name, p in blocks.named_parameters() if id(p) not in known}
        ties = self._ties.items() if self._ties_embeddings else ()
        untied = [a for a, b in ties if a in every and not torch.equal(every[a], every[b])]
        self.homeless = [name for name, tensor in made.items() if tensor.any()] + untied

    def published(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """The weights under the names of the checkpoint."""
        return self.body.to_checkpoint(self.own(keep_vars=keep_vars))

    def load(self, state: Mapping[str, Tensor], *, strict: bool, assign: bool) -> Any:
        """Load weights given under the checkpoint's names or the model's own.

        Raises:
            WeightsError: If ``strict`` and the names or shapes do not fit; nothing is loaded then.
        """
        own = self.own(keep_vars=True)
        given = self.body.from_checkpoint(state, own, strict=strict)
        missing = sorted(set(own) - set(given))
        unexpected = sorted(set(given) - set(own))
        if strict and (missing or unexpected):
            raise WeightsError(
                f"the state dict does not fit: missing {missing[:4]}, unknown {unexpected[:4]}; "
                "model.state_dict() has the names"
            )
        for name, tensor in given.items():
            if name in own and tensor.shape != own[name].shape:
                raise WeightsError(
                    f"{name} has shape {tuple(tensor.shape)}, the model wants {tuple(own[name].shape)}"
                )
        actual = {_own_name(name): name for name in self.model.state_dict()}
        fitting = {actual[name]: tensor for name, tensor in given.items() if name in own}
        self.model.load_state_dict(fitting, strict=False, assign=assign)
        if assign and self._ties_embeddings:
            self._retie()
        return _IncompatibleKeys(missing, unexpected)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write a folder that ``loop_lens.boot`` opens again: config, safetensors, tokenizer; all or nothing.

        Raises:
            WeightsError: If weight processing made weights that the checkpoint has no place for.
        """
        state = self.own()
        config: Any = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        config.update(self.body.config_fields)
        first: dict[int, str] = {}
        for name, tensor in state.items():
            first.setdefault(tensor.data_ptr(), name)
        if self._ties_embeddings:
            state = {name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}
        with replacing(folder, folder=True) as partial:
            config.save_pretrained(partial)
            save_file(
                {name: tensor.detach().contiguous().clone() for name, tensor in state.items()},
                partial / "model.safetensors",
                metadata={"format": "pt"},
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        (folder / INDEX).unlink(missing_ok=True)  # of other weights: it would be read in place of these

    @property
    def _ties_embeddings(self) -> bool:
        return bool(getattr(self.model.config, "tie_word_embeddings", False))

    @property
    def _ties(self) -> Mapping[str, str]:
        return getattr(self.model, "_tied_weights_keys", None) or {}

    def _retie(self) -> None:
        modules = {_own_name(name): module for name, module in self.model.named_modules()}
        for target, source in self._ties.items():
            (to, _, name), (origin, _, held) = target.rpartition("."), source.rpartition(".")
            modules[to]._parameters[name] = modules[origin]._parameters[held]


def _own_name(name: str) -> str:
    return name.replace("._original_component", "")
