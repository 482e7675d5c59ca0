"""What a published family of looped models consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.weights import Entry, to_native

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A published family as a mapping onto the native model.

    Attributes:
        name: Short name.
        model_type: The ``model_type`` in its config.json.
        hub_ids: Published checkpoints.
        matches: Whether a config and the names of its weights are of this family.
        config: Its config.json as a native configuration.
        entries: Its weights as native parameters.
        derived: Tensors that its checkpoints hold and that follow from the config.
        prepends_bos: Whether its prompts begin with a BOS token.
    """

    name: str
    model_type: str
    hub_ids: tuple[str, ...]
    matches: Callable[[Config, frozenset[str]], bool]
    config: Callable[[Config], LoopedConfig]
    entries: Callable[[LoopedConfig], list[Entry]]
    derived: Callable[[LoopedConfig], dict[str, Tensor]] = lambda config: {}
    prepends_bos: bool = True

    def to_published(self, config: LoopedConfig, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native parameters as the family's checkpoints hold them. One-to-one entries keep their storage."""
        renamed = {
            entry.published: entry.join(*(native[name] for name in entry.native))
            for entry in self.entries(config)
        }
        return {**renamed, **self.derived(config)}

    def to_native(
        self,
        config: LoopedConfig,
        published: Mapping[str, Tensor],
        native: Mapping[str, Tensor],
        *,
        strict: bool = True,
        source: str,
    ) -> dict[str, Tensor]:
        """A checkpoint of the family as native parameters; see `loop_lens.models.published.weights.to_native`."""
        entries = self.entries(config)
        if not strict:
            entries = [entry for entry in entries if entry.published in published]
            published = {entry.published: published[entry.published] for entry in entries}
        return to_native(published, entries, native, ignored=self.derived(config), source=source)


def token_ids(published: Config) -> dict[str, Any]:
    """The special tokens that a config names."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: published[name] for name in names if published.get(name) is not None}


def rope_parameters(published: Config, default_theta: float) -> dict[str, Any]:
    """RoPE fields of any transformers version as those of version 5."""
    given = published.get("rope_parameters") or published.get("rope_scaling") or {}
    theta = given.get("rope_theta") or published.get("rope_theta") or default_theta
    kind = given.get("rope_type") or given.get("type") or "default"
    return {**{k: v for k, v in given.items() if k != "type"}, "rope_type": kind, "rope_theta": theta}


def require_fields(published: Config, *names: str) -> None:
    """Raise unless a config has these fields."""
    missing = [name for name in names if published.get(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing, which model_type {published.get('model_type')!r} needs: it is not a "
            "published config of that family"
        )
