"""Flags, modes and weights of a looped model, which reach every block that was made."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from loop_lens.bridge.iterations import LoopedBridge
from loop_lens.bridge.weights import Weights


class SharedBlocks(LoopedBridge):
    """A bridge whose blocks share weights: what transformer-lens does to a block is done to all its firings.

    Attributes:
        weights: The model's weights under the names of its checkpoint.
        saved_tokenizer: The tokenizer as it was given, which `save_pretrained` writes.
    """

    weights: Weights
    saved_tokenizer: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # transformer-lens would ask the wrapped model for it.
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """transformer-lens' weight processing, once per physical block: iterations keep sharing.

        Where the processed weights have no names in the checkpoint, saving and loading are refused from then on.

        Raises:
            ValueError: If folding is not sound for this model; says why. Hook names alone are had
                with ``no_processing=True``.

        Example:
            >>> model.enable_compatibility_mode(no_processing=True)
        """
        if not kwargs.get("no_processing", args[1] if len(args) > 1 else False):
            self._require_processable()
        with self._processing():
            super().enable_compatibility_mode(*args, **kwargs)

    def process_weights(self, *args: Any, **kwargs: Any) -> None:
        """transformer-lens' weight processing alone, once per physical block.

        Raises:
            ValueError: If folding is not sound for this model; says why.
        """
        if self.firings.physical:
            super().process_weights(*args, **kwargs)
            return
        self._require_processable()
        with self._processing():
            super().process_weights(*args, **kwargs)

    def _require_processable(self) -> None:
        reason = self.body.fold_unsound_because
        if reason:
            raise ValueError(
                f"weight processing is not sound for this model: {reason}. "
                "enable_compatibility_mode(no_processing=True) gives the legacy names without it."
            )

    @contextmanager
    def _processing(self) -> Generator[None, None, None]:
        """Show the physical blocks to what processes weights; a failure leaves weights and marks as they were."""
        with self.firings.physical_view():
            modules = dict.fromkeys([*self.modules(), *self.original_model.modules()])
            tables: list[dict[str, Any]] = [
                table for m in modules for table in (vars(m), m._parameters, m._buffers)
            ]
            before = [(table, dict(table)) for table in tables]
            try:
                yield
            except BaseException:
                for table, entries in before:
                    table.clear()
                    table.update(entries)
                self.clear_hook_registry()
                self._initialize_hook_registry()
                raise
        if self._weights_processed:
            self.weights.follow_processing(self.firings.prototypes)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether to expose each head's contribution, as in transformer-lens."""
        with self.firings.every_block():
            super().set_use_attn_result(use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether queries, keys and values have inputs of their own, as in transformer-lens."""
        with self.firings.every_block():
            super().set_use_split_qkv_input(use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether each head has an input of its own, as in transformer-lens."""
        with self.firings.every_block():
            super().set_use_attn_in(use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether the MLP's input is exposed, as in transformer-lens."""
        with self.firings.every_block():
            super().set_use_hook_mlp_in(use_hook_mlp_in)

    def train(self, mode: bool = True) -> Self:
        """Set training mode everywhere."""
        super().train(mode)
        self.firings.train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast. Iterations keep sharing weights; silent unless ``print_details=True``."""
        kwargs.setdefault("print_details", False)
        super().to(*args, **kwargs)
        kwargs.pop("print_details", None)
        return self

    @property
    def n_params(self) -> int:
        """Number of parameters, the checkpoint's at any number of iterations."""
        return self.n_params_total

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Weights under the names of the checkpoint, at any number of iterations.

        Example:
            >>> keys = list(model.state_dict())
            >>> model.set_recurrences(64)
            >>> list(model.state_dict()) == keys
            True
        """
        if self.firings.physical or destination is not None or prefix:
            return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.weights.published(keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights under the checkpoint's names or the wrapped model's own."""
        return self.weights.load(state_dict, strict=strict, assign=assign)

    def native_state(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Weights under the wrapped model's own names."""
        return self.weights.own(keep_vars=keep_vars)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `loop_lens.boot` opens again: config, safetensors, tokenizer.

        Example:
            >>> model.save_pretrained("hops")
            >>> torch.equal(loop_lens.boot("hops")(prompt), model(prompt))
            True
        """
        self.weights.save(Path(folder), self.saved_tokenizer)
