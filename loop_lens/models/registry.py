"""The kinds of loops that loop_lens knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.hrm_text import HRM_TEXT
from loop_lens.models.kind import Kind, UnknownFamilyError
from loop_lens.models.native.kind import NATIVE
from loop_lens.models.published.kind import PUBLISHED
from loop_lens.models.remote import REMOTE
from loop_lens.models.window import WINDOW

KINDS: tuple[Kind, ...] = (WINDOW, NATIVE, HRM_TEXT, PUBLISHED)
"""In the order in which they are asked. A checkpoint of none of them may bring code of its own along."""


def is_looped(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a kind that needs no code from its checkpoint."""
    return any(kind.matches(config) for kind in KINDS)


def kind_of_checkpoint(checkpoint: Checkpoint) -> Kind:
    """The kind of a checkpoint.

    Raises:
        UnknownFamilyError: If it is of none.
    """
    for kind in (*KINDS, REMOTE):
        if kind.matches(checkpoint.config):
            return kind
    known = sorted(name for kind in KINDS for name in kind.model_types)
    raise UnknownFamilyError(
        f"{checkpoint.name}: model_type {checkpoint.model_type!r} is no looped family that loop_lens knows "
        f"({', '.join(known)}). A looped model in memory opens with loop_lens.wrap(), an ordinary decoder "
        "with loop_lens.loopify()."
    )


def kind_of_model(model: nn.Module) -> Kind | None:
    """The kind of a model in memory, None for an ordinary one."""
    return next((kind for kind in KINDS if kind.matches_model(model)), None)
