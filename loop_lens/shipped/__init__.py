"""Trained models that come with the package, each in a folder of its own with its card."""

from __future__ import annotations

from pathlib import Path

SHIPPED_PREFIX = "loop-lens/"


def shipped_models() -> list[str]:
    """The names of the models in this package, as ``loop_lens.boot`` takes them.

    README.md in each one's `shipped_folder` is its card.
    """
    found = sorted(folder.parent.name for folder in _here().glob("*/config.json"))
    return [SHIPPED_PREFIX + name for name in found]


def shipped_folder(name: str) -> Path:
    """Where a shipped model lies: config.json, model.safetensors, its tokenizer and its card.

    Args:
        name: Such as ``"loop-lens/hops"``; without the prefix too.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    full = name if name.startswith(SHIPPED_PREFIX) else SHIPPED_PREFIX + name
    if full not in shipped_models():
        raise FileNotFoundError(
            f"{name}: the package ships no such model; it has {', '.join(shipped_models()) or 'none'}"
        )
    return _here() / full.removeprefix(SHIPPED_PREFIX)


def _here() -> Path:
    return Path(__file__).parent
