"""Published families of looped models, each in a file of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.base import Family
from loop_lens.models.published.huginn import HUGINN
from loop_lens.models.published.ouro import OURO
from loop_lens.models.published.retrofit import RETROFIT_LLAMA, RETROFIT_OLMO

FAMILIES: tuple[Family, ...] = (HUGINN, OURO, RETROFIT_LLAMA, RETROFIT_OLMO)
"""Families that map onto the native model. HRM-Text is transformers' own class."""

NATIVE_TYPE, HRM_TYPE = "loop_lens", "hrm_text"


class UnknownFamilyError(ValueError):
    """A model whose family cannot be told from its config and the names of its weights."""


def detect_family(
    config: dict[str, Any], keys: Iterable[str] = (), source: str | Path = "this model"
) -> Family:
    """Tell a published family by its config and the names of its weights.

    Args:
        config: The content of its config.json.
        keys: Names of its weights; the retrofits cannot be told from each other without.
        source: What to call the model in errors.

    Raises:
        UnknownFamilyError: If no family fits.
    """
    names = frozenset(keys)
    for family in FAMILIES:
        if family.matches(config, names):
            return family
    known = sorted({f.model_type for f in FAMILIES} | {NATIVE_TYPE, HRM_TYPE})
    raise UnknownFamilyError(
        f"{source}: model_type {config.get('model_type')!r} is no looped family that loop_lens knows "
        f"({', '.join(known)}). A looped model in memory opens with loop_lens.wrap(), an ordinary decoder "
        "with loop_lens.loopify()."
    )


def family_of(config: LoopedConfig) -> Family | None:
    """The published family that a native model came from."""
    return next((family for family in FAMILIES if family.name == config.family), None)


def looped_model_types() -> frozenset[str]:
    """The ``model_type``s of all looped families."""
    return frozenset({family.model_type for family in FAMILIES} | {NATIVE_TYPE, HRM_TYPE})
