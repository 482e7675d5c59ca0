"""Ways to open a looped model: from a checkpoint, from memory, or by looping an ordinary one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.models.files import reading
from loop_lens.models.kind import Kind, UnknownFamilyError, Unrolled
from loop_lens.models.registry import kind_of_checkpoint, kind_of_model
from loop_lens.models.window import WINDOW, unroll_window
from loop_lens.opening.hub import find_checkpoint
from loop_lens.opening.tokenizers import load_tokenizer, prepare_tokenizer
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.slots import Slot


def boot(
    model_name: str | Path,
    *,
    recurrences: int | None = None,
    initial_state: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> HookedLoopedTransformer:
    """Open a checkpoint of a looped model.

    Args:
        model_name: A local folder, a hub id, or ``"loop-lens/NAME"`` for a model of `shipped_models`.
        recurrences: Number of iterations; the checkpoint's own by default.
        initial_state: A seed of the family's own noise, ``"zeros"``, or a tensor [batch pos d_model]; ignored with
            a warning where the family has none. By default that with which the model was saved, 0 for most.
        device: Where to put the model; the CPU by default.
        dtype: Of the weights, e.g. ``torch.bfloat16`` or ``"bfloat16"``; the checkpoint's own by
            default and for ``"auto"``.
        revision: Of a hub id.
        attn_implementation: As in transformers: ``"sdpa"`` (its default) or ``"eager"``, under
            which hooked and unhooked blocks agree bitwise.
        tokenizer: Instead of the checkpoint's own.
        trust_remote_code: Whether code from the checkpoint may run, for families that loop_lens
            does not know. The known ones never need it. Nobody is asked while a model is opened.

    Example:
        >>> model = loop_lens.boot("loop-lens/hops", recurrences=6)
        >>> print(model.schedule)
        prelude  1 block             firing  0
        loop     6 x 2 blocks        firings 1-12
        coda     1 block             firing  13

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        UnknownFamilyError: If its family cannot be told.
        WeightsError: If its weights do not fit its config.
        UnsafeCheckpointError: If its weights are pickled.
        UnreadableError: If a file is damaged, or names files outside its folder. The two errors before are of its kind.
    """
    checkpoint = find_checkpoint(model_name, revision, trusted=trust_remote_code)
    kind = kind_of_checkpoint(checkpoint)
    model = kind.load(checkpoint, dtype=_dtype(dtype), attn_implementation=attn_implementation)
    model = model if device is None else model.to(device)
    tokenizer = load_tokenizer(checkpoint) if tokenizer is None else tokenizer
    kind = _kind(model)
    with reading(checkpoint.config_path):
        looped = _bridge(kind.unroll(model, name=checkpoint.name, tokenizer=tokenizer), tokenizer)
    return _set(looped, recurrences, initial_state)


def wrap(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    recurrences: int | None = None,
    initial_state: Any = None,
    body: LoopBody | None = None,
    adapter: ArchitectureAdapter | None = None,
    model_name: str = "external",
) -> HookedLoopedTransformer:
    """Open a looped model that is in memory already. The model is changed in place.

    Args:
        model: A `LoopedTransformer`, a ``transformers.HrmTextForCausalLM``, or a model of a
            published family in that family's own code (its weights are copied into the native
            model). Any other model with ``body`` and ``adapter``.
        tokenizer: For text input.
        recurrences: Number of iterations; the model's own by default.
        initial_state: As in `boot`.
        body: What unrolls a model of your own: a `LoopBody` with its schedule.
        adapter: How transformer-lens reads its blocks, found at ``body.block_path``.
        model_name: What to call it.

    Example:
        >>> config = loop_lens.LoopedConfig(vocab_size=50, hidden_size=32, core_layers=3)
        >>> model = loop_lens.wrap(loop_lens.LoopedTransformer(config), recurrences=8)
        >>> model.run_with_cache(torch.arange(4)[None])[1].grid("resid_post").shape
        torch.Size([8, 3, 1, 4, 32])

    Raises:
        ValueError: If the model is no looped model that loop_lens knows.
    """
    _require_bare(model)
    if (body is None) != (adapter is None):
        raise ValueError("body and adapter go together: one says what loops, the other what is in a block")
    if body is None or adapter is None:
        unrolled = _kind(model).unroll(model, name=model_name, tokenizer=tokenizer)
    else:
        unrolled = Unrolled(model, body, adapter)
    return _set(_bridge(unrolled, tokenizer), recurrences, initial_state)


def loopify(
    model: nn.Module,
    *,
    layers: Sequence[int],
    times: int,
    tokenizer: Any = None,
    rule: str = "naive",
    alpha: float | None = None,
    model_name: str | None = None,
) -> HookedLoopedTransformer:
    """Loop layers of an ordinary decoder language model. The model is changed in place.

    Args:
        model: A transformers causal language model whose blocks transformer-lens finds in one list.
        layers: Neighbouring layers, e.g. ``range(10, 20)``.
        times: How often they run.
        tokenizer: For text input.
        rule: ``"naive"`` repetition, or a damped rule, see `loop_lens.models.window.LOOP_RULES`.
        alpha: The rule's weight, for ``"ema"`` and ``"input_anchor"``.
        model_name: What to call it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=4, n_embd=32, n_head=2))
        >>> model = loop_lens.loopify(gpt2, layers=[1, 2], times=3)
        >>> [firing.block for firing in model.schedule]
        [0, 1, 2, 1, 2, 1, 2, 3]

    Raises:
        ValueError: If the model has no uniform list of blocks, or the layers are not in it.
    """
    _require_bare(model)
    if kind_of_model(model) not in (None, WINDOW):
        raise ValueError(f"{type(model).__name__} is a looped model already: open it with loop_lens.wrap()")
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: loopify takes a transformers causal LM")
    name = model_name or getattr(config, "_name_or_path", "") or "external"
    return _bridge(unroll_window(model, layers, times, rule=rule, alpha=alpha, name=name), tokenizer)


def _require_bare(model: Any) -> None:
    """Raise unless a model is a plain torch module that nobody has wrapped or opened yet."""
    if isinstance(model, HookedLoopedTransformer):
        raise ValueError(
            "this is a HookedLoopedTransformer already: use set_recurrences() to change it, or give wrap() or "
            "loopify() the torch model itself, loaded anew"
        )
    name = type(model).__name__
    if isinstance(model, TransformerBridge):
        cure = "give the torch model itself, loaded anew: transformer-lens has replaced modules of this one"
    elif hasattr(model, "_orig_mod"):
        name, cure = "a compiled model", "give the model as it was before torch.compile, model._orig_mod"
    elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        cure = "give model.merge_and_unload(), whose weights hold the adapters"
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        cure = "give the model in it, model.module"
    elif isinstance(model, nn.Module):
        if not any(isinstance(module, Slot) for module in model.modules()):
            return
        cure = "it is unrolled already: use the HookedLoopedTransformer made from it, or load it anew"
    else:
        raise TypeError(f"a model is a torch module, got a {name}: boot() opens a folder or a name")
    raise ValueError(f"{name} cannot be opened as it is: {cure}")


def _kind(model: nn.Module) -> Kind:
    kind = kind_of_model(model)
    if kind is None:
        raise UnknownFamilyError(
            f"{type(model).__name__} is no looped model that loop_lens knows: give body= and adapter= to wrap "
            "a model of your own, or use loopify() to loop layers of an ordinary decoder"
        )
    return kind


def _set(
    looped: HookedLoopedTransformer, recurrences: int | None, initial_state: Any
) -> HookedLoopedTransformer:
    if recurrences is not None:
        looped.set_recurrences(recurrences)
    if initial_state is not None:
        looped.initial_state = initial_state
    return looped


def _bridge(unrolled: Unrolled, tokenizer: Any) -> HookedLoopedTransformer:
    adapter = unrolled.adapter
    prepared = prepare_tokenizer(tokenizer, adapter.cfg)
    looped = HookedLoopedTransformer(unrolled.model, adapter, prepared, unrolled.body)
    looped.saved_tokenizer = tokenizer
    return looped


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        named = None if dtype == "auto" else getattr(torch, dtype, dtype)
        if named is not None and not isinstance(named, torch.dtype):
            raise ValueError(f"dtype {dtype!r} is unknown: give a torch.dtype, its name, or 'auto'")
        return named
    return dtype
