"""Trained models that come with the package, each in a folder of its own with its card."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SHIPPED_PREFIX", "shipped_folder", "shipped_models"]

SHIPPED_PREFIX = "loop-lens/"
_HERE = Path(__file__).parent


def shipped_models() -> list[str]:
    """The names of the models in this package, as ``loop_lens.boot`` takes them.

    README.md in each one's `shipped_folder` is its card.

    Example:
        >>> loop_lens.shipped_models()
        ['loop-lens/hops', 'loop-lens/hops-no-injection', 'loop-lens/hops-ouro', 'loop-lens/words']
    """
    return [
        SHIPPED_PREFIX + name for name in sorted(path.parent.name for path in _HERE.glob("*/config.json"))
    ]


def shipped_folder(name: str) -> Path:
    """Where a shipped model lies: config.json, model.safetensors, its tokenizer and its card.

    Args:
        name: Such as ``"loop-lens/hops"``; without the prefix too.

    Example:
        >>> from loop_lens.shipped import shipped_folder
        >>> (shipped_folder("hops") / "README.md").read_text().splitlines()[0]
        '# loop-lens/hops'

    Raises:
        FileNotFoundError: If there is no such model.
    """
    full = name if name.startswith(SHIPPED_PREFIX) else SHIPPED_PREFIX + name
    if full not in shipped_models():
        raise FileNotFoundError(
            f"{name}: the package ships no such model; it has {', '.join(shipped_models()) or 'none'}"
        )
    return _HERE / full.removeprefix(SHIPPED_PREFIX)
