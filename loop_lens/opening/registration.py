"""Let transformers and transformer-lens open looped models through this package, when asked to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, HrmTextForCausalLM, PreTrainedConfig

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.published.checkpoint import read_config
from loop_lens.models.published.families import NATIVE_TYPE, looped_model_types
from loop_lens.opening.entry import boot, load_native, wrap
from loop_lens.opening.hub import resolve_checkpoint


class RavenConfig(PreTrainedConfig):
    """Published config of Huginn and the retrofits, as it is."""

    model_type = "huginn_raven"


class OuroConfig(PreTrainedConfig):
    """Published config of Ouro, as it is."""

    model_type = "ouro"


class _Published(LoopedTransformer):
    """A published checkpoint that ``from_pretrained`` opens as a `LoopedTransformer`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a published checkpoint. Takes ``dtype``, ``revision``, ``attn_implementation``."""
        source = str(pretrained_model_name_or_path)
        folder = resolve_checkpoint(pretrained_model_name_or_path, kwargs.get("revision"))
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        return load_native(
            folder,
            source=source,
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            attn_implementation=kwargs.get("attn_implementation"),
        )


class RavenForCausalLM(_Published):
    """Huginn and the retrofits."""

    config_class: Any = RavenConfig


class OuroForCausalLM(_Published):
    """Ouro."""

    config_class: Any = OuroConfig


def register() -> None:
    """Open looped models through this package everywhere, for the rest of the process.

    ``transformers.AutoModelForCausalLM`` then opens published checkpoints of the families as a
    `LoopedTransformer`, without remote code, and transformer-lens'
    ``TransformerBridge.boot_transformers`` opens them as a `HookedLoopedTransformer`. Importing
    loop_lens alone changes nothing in either. Calling this twice is the same as once.
    """
    for model_type, config, model in (
        (NATIVE_TYPE, LoopedConfig, LoopedTransformer),
        (RavenConfig.model_type, RavenConfig, RavenForCausalLM),
        (OuroConfig.model_type, OuroConfig, OuroForCausalLM),
    ):
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    stock = TransformerBridge.boot_transformers
    if not hasattr(stock, "looped"):
        TransformerBridge.boot_transformers = staticmethod(_boot_looped_or(stock))  # type: ignore[assignment]


def _boot_looped_or(stock: Any) -> Any:
    @functools.wraps(stock)
    def boot_transformers(model_name: str, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("hf_model")
        if isinstance(model, LoopedTransformer | HrmTextForCausalLM):
            return wrap(model, tokenizer=kwargs.get("tokenizer"), model_name=model_name)
        if model is None and _is_looped(model_name):
            return _boot(model_name, *args, **kwargs)
        return stock(model_name, *args, **kwargs)

    boot_transformers.looped = True  # type: ignore[attr-defined]
    return boot_transformers


def _is_looped(model_name: str | Path) -> bool:
    folder = Path(model_name).expanduser()
    if not folder.is_dir():
        return _hub_type(str(model_name)) in looped_model_types()
    config = read_config(folder)
    return config.get("model_type") in looped_model_types() or "loop_lens" in config


def _hub_type(name: str) -> str | None:
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError):
        return None  # whatever is wrong, the stock function says it better


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
