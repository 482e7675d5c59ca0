"""Let transformers and transformer-lens open looped models through this package, when asked to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.registry import KINDS, is_looped, kind_of_checkpoint, kind_of_model
from loop_lens.opening.entry import boot, wrap
from loop_lens.opening.hub import find_checkpoint


class _Published(LoopedTransformer):
    """A published checkpoint that ``from_pretrained`` opens by its kind."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a published checkpoint. Takes ``dtype``, ``revision``, ``attn_implementation``."""
        checkpoint = find_checkpoint(pretrained_model_name_or_path, kwargs.get("revision"))
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        return kind_of_checkpoint(checkpoint).load(
            checkpoint,
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            attn_implementation=kwargs.get("attn_implementation"),
        )


@functools.cache
def _classes(model_type: str) -> tuple[type[PreTrainedConfig], type[_Published]]:
    """Classes for a ``model_type`` that transformers does not know: its config as it is, and who loads it."""
    name = model_type.title().replace("_", "")
    config = type(f"{name}Config", (PreTrainedConfig,), {"model_type": model_type})
    return config, type(f"{name}ForCausalLM", (_Published,), {"config_class": config})


def register() -> None:
    """Open looped models through this package everywhere, for the rest of the process.

    ``transformers.AutoModelForCausalLM`` then opens published checkpoints of the families as a
    `LoopedTransformer`, without remote code, and transformer-lens'
    ``TransformerBridge.boot_transformers`` opens them as a `HookedLoopedTransformer`. Importing
    loop_lens alone changes nothing in either. Calling this twice is the same as once.

    Example:
        >>> from transformer_lens.model_bridge import TransformerBridge
        >>> loop_lens.register()
        >>> folder = loop_lens.shipped.shipped_folder("hops")
        >>> TransformerBridge.boot_transformers(str(folder)).schedule[4].prefix
        'loop.1.blocks.1'
    """
    for kind in KINDS:
        for model_type in kind.model_types:
            config, model = kind.classes or _classes(model_type)
            AutoConfig.register(model_type, config, exist_ok=True)
            AutoModelForCausalLM.register(config, model, exist_ok=True)
    stock = TransformerBridge.boot_transformers
    if not hasattr(stock, "looped"):
        TransformerBridge.boot_transformers = staticmethod(_boot_looped_or(stock))  # type: ignore[assignment]


def _boot_looped_or(stock: Any) -> Any:
    @functools.wraps(stock)
    def boot_transformers(model_name: str, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("hf_model")
        if model is not None and kind_of_model(model) is not None:
            return wrap(model, tokenizer=kwargs.get("tokenizer"), model_name=model_name)
        if model is None and _is_looped(model_name):
            return _boot(model_name, *args, **kwargs)
        return stock(model_name, *args, **kwargs)

    boot_transformers.looped = True  # type: ignore[attr-defined]
    return boot_transformers


def _is_looped(model_name: str | Path) -> bool:
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        return is_looped(Checkpoint(folder).config)
    try:
        return is_looped(PreTrainedConfig.get_config_dict(str(model_name))[0])
    except (OSError, ValueError):
        return False  # whatever is wrong, the stock function says it better


def _boot(
    model_name: str,
    hf_config_overrides: dict[str, Any] | None = None,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    load_weights: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> HookedLoopedTransformer:
    revision = kwargs.pop("revision", None)
    given = [name for name, value in kwargs.items() if value is not None]
    if hf_config_overrides or not load_weights or given:
        raise ValueError(
            f"looped models do not take {given or ['hf_config_overrides or load_weights=False']} here: "
            "use loop_lens.boot() or loop_lens.wrap()"
        )
    return boot(
        model_name,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attn_implementation="eager",
    )
