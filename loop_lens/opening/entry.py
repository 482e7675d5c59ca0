"""Ways to open a looped model: from a checkpoint, from memory, or by looping an ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import AttentionBridge, BlockBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    configure_tokenizer,
)
from transformer_lens.model_bridge.sources._hf_format import (
    determine_architecture_from_hf_config,
    setup_tokenizer,
)
from transformer_lens.utilities.attn_implementation import force_eager_attention
from transformers import AutoModelForCausalLM, HrmTextForCausalLM

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.models.hrm_adapter import HrmTextLoopedAdapter
from loop_lens.models.hrm_text import HrmBody
from loop_lens.models.native.adapter import LoopedAdapter
from loop_lens.models.native.body import NativeBody
from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.published.checkpoint import Weights, build_native, read_config, weight_files
from loop_lens.models.published.families import (
    HRM_TYPE,
    NATIVE_TYPE,
    UnknownFamilyError,
    detect_family,
    family_of,
)
from loop_lens.models.published.weights import WeightsError
from loop_lens.models.window import Window, WindowBody
from loop_lens.opening.hub import load_tokenizer, resolve_checkpoint
from loop_lens.unrolling.body import LoopBody


def boot(
    model_name: str | Path,
    *,
    recurrences: int | None = None,
    initial_state: Any = 0,
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
        initial_state: A seed of the family's own noise, ``"zeros"``, or a tensor
            [batch pos d_model]; ignored with a warning where the family has none.
        device: Where to put the model; the CPU by default.
        dtype: Of the weights, e.g. ``torch.bfloat16`` or ``"bfloat16"``; the checkpoint's own by
            default and for ``"auto"``.
        revision: Of a hub id.
        attn_implementation: As in transformers: ``"sdpa"`` (its default) or ``"eager"``, under
            which hooked and unhooked blocks agree bitwise.
        tokenizer: Instead of the checkpoint's own.
        trust_remote_code: Whether code from the checkpoint may run, for families that loop_lens
            does not know. The known ones never need it.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        UnknownFamilyError: If its family cannot be told.
        WeightsError: If its weights do not fit its config.
        UnsafeCheckpointError: If its weights are pickled.
    """
    if isinstance(dtype, str):
        dtype = _named_dtype(dtype)
    folder = resolve_checkpoint(model_name, revision)
    config = read_config(folder)
    kind = config.get("model_type")
    source = str(model_name)
    loading: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    looped: HookedLoopedTransformer
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    if "loop_lens" in config:
        model = _load_transformers(AutoModelForCausalLM, folder, source, **loading)
        loop = config["loop_lens"]
        first, last = loop["layers"]
        looped = loopify(
            model,
            layers=range(first, last + 1),
            times=recurrences or loop["times"],
            rule=loop["rule"],
            alpha=loop["alpha"],
            tokenizer=tokenizer,
        )
        return looped.to(device) if device is not None else looped
    if kind == HRM_TYPE:
        model = _load_transformers(HrmTextForCausalLM, folder, source, **loading)
    elif kind == NATIVE_TYPE:
        model = load_native(folder, source=source, **loading)
    else:
        try:
            model = load_native(folder, source=source, **loading)
        except UnknownFamilyError:
            if "auto_map" not in config:
                raise
            if not trust_remote_code:
                raise UnknownFamilyError(
                    f"{source}: model_type {kind!r} is no family that loop_lens knows, and its own code is not "
                    "allowed to run: pass trust_remote_code=True if you trust it"
                ) from None
            weight_files(folder)
            model = _load_transformers(
                AutoModelForCausalLM, folder, source, trust_remote_code=True, **loading
            )
    if device is not None:
        cast(nn.Module, model).to(device)
    return wrap(
        model,
        tokenizer=tokenizer,
        recurrences=recurrences,
        initial_state=initial_state,
        model_name=source,
    )


def wrap(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    recurrences: int | None = None,
    initial_state: Any = 0,
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

    Raises:
        ValueError: If the model is no looped model that loop_lens knows.
    """
    if isinstance(model, HookedLoopedTransformer):
        raise ValueError("this is a HookedLoopedTransformer already: use set_recurrences() to change it")
    if (body is None) != (adapter is None):
        raise ValueError("body and adapter go together: one says what loops, the other what is in a block")
    if body is None or adapter is None:
        if not isinstance(model, LoopedTransformer | HrmTextForCausalLM):
            model = _as_native(model)
        if isinstance(model, LoopedTransformer):
            body, adapter = NativeBody(model), LoopedAdapter(_bridge_config(model, model_name), model.config)
            adapter.cfg.default_prepend_bos = _prepends_bos(model.config, tokenizer)
        else:
            body, adapter = HrmBody(model), HrmTextLoopedAdapter(_bridge_config(model, model_name))
    looped = _open(model, adapter, tokenizer, body)
    if recurrences is not None:
        looped.set_recurrences(recurrences)
    if not _is_default_state(initial_state):
        looped.initial_state = initial_state
    return looped


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

    Raises:
        ValueError: If the model has no uniform list of blocks, or the layers are not in it.
    """
    if isinstance(model, HookedLoopedTransformer | LoopedTransformer | HrmTextForCausalLM):
        raise ValueError(f"{type(model).__name__} is a looped model already: open it with loop_lens.wrap()")
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: loopify takes a transformers causal LM")
    name = model_name or getattr(config, "_name_or_path", "") or "external"
    architecture = type(model).__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        architecture = determine_architecture_from_hf_config(config)
    cfg = build_bridge_config_from_hf(config, architecture, name, _dtype(model))
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    template = (adapter.component_mapping or {}).get("blocks")
    lists = [n for n, c in (adapter.component_mapping or {}).items() if getattr(c, "is_list_item", False)]
    if not isinstance(template, BlockBridge) or lists != ["blocks"] or template.name is None:
        raise ValueError(
            f"{architecture} has no uniform list of decoder blocks (transformer-lens sees {lists or 'none'}): "
            "loopify cannot tell which layers to repeat"
        )
    blocks = list(adapter.get_remote_component(model, template.name))  # type: ignore[arg-type]
    window = Window.of(layers, times, rule, alpha, len(blocks))
    adapter.prepare_model(model)
    body = WindowBody(model, blocks, template.name, window)
    if not getattr(adapter, "supports_fold_ln", True):
        body.fold_unsound_because = f"transformer-lens does not fold the norms of {architecture}"
    attention = template.submodules.get("attn")
    if attention is not None and type(attention).forward is AttentionBridge.forward:
        # This bridge shows the pattern that the module returns, and only eager attention returns one.
        force_eager_attention(model)
    else:
        # With attentions asked for, transformers would leave SDPA for eager in every block.
        adapter.supports_hf_output_attentions = False
    adapter.cfg.device = str(next(model.parameters()).device)
    return _open(model, adapter, tokenizer, body)


def load_native(
    folder: Path,
    *,
    source: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> LoopedTransformer:
    """Load a published or native checkpoint folder as a native model."""
    config, weights = read_config(folder), Weights(folder)
    source = source or str(folder)
    if config.get("model_type") == NATIVE_TYPE:
        native = LoopedConfig.from_dict(config)
    else:
        family = detect_family(config, weights, source)
        native = family.config(config)
    model = build_native(native, weights, dtype=dtype, source=source)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


def _open(model: nn.Module, adapter: Any, tokenizer: Any, body: LoopBody) -> HookedLoopedTransformer:
    given = tokenizer
    if tokenizer is not None:
        tokenizer = copy.deepcopy(
            tokenizer
        )  # transformer-lens gives it special tokens: ours to read, not to save
        if not tokenizer.init_kwargs.get("name_or_path"):
            # Made in memory: transformer-lens would load it anew to have BOS tokens added, from nowhere.
            tokenizer.init_kwargs |= {"name_or_path": "in memory", "add_bos_token": True}
        tokenizer = _configured(tokenizer, adapter.cfg)
    looped = HookedLoopedTransformer(model, adapter, tokenizer, body)
    looped.saved_tokenizer = given
    return looped


def _configured(tokenizer: Any, cfg: Any) -> Any:
    """A tokenizer as transformer-lens wants it, which tries it on the text "a"."""
    closed = tokenizer.unk_token is None and type(_model_of(tokenizer)).__name__ == "WordLevel"
    if not closed or "a" in tokenizer.get_vocab():
        return configure_tokenizer(tokenizer, cfg)
    cfg.tokenizer_prepends_bos = cfg.tokenizer_appends_eos = False
    return setup_tokenizer(tokenizer, default_padding_side=getattr(cfg, "default_padding_side", None))


def _model_of(tokenizer: Any) -> Any:
    return getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)


def _prepends_bos(config: LoopedConfig, tokenizer: Any) -> bool:
    family = family_of(config)
    if family is not None:
        return family.prepends_bos
    return tokenizer is None or tokenizer.bos_token is not None or config.bos_token_id is not None


def _bridge_config(model: Any, name: str) -> Any:
    architecture = type(model).__name__
    cfg = build_bridge_config_from_hf(model.config, architecture, name, _dtype(model))
    cfg.device = str(next(model.parameters()).device)
    return cfg


def _named_dtype(name: str) -> torch.dtype | None:
    dtype = None if name == "auto" else getattr(torch, name, name)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown: give a torch.dtype, its name, or 'auto'")
    return dtype


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _as_native(model: Any) -> LoopedTransformer:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UnknownFamilyError(
            f"{type(model).__name__} is no looped model that loop_lens knows: give body= and adapter= to wrap a "
            "model of your own, or use loopify() to loop layers of an ordinary decoder"
        )
    published, weights = config.to_dict(), model.state_dict()
    family = detect_family(published, weights, type(model).__name__)
    native = build_native(family.config(published), weights, dtype=None, source=type(model).__name__)
    return native.train(model.training)


def _is_default_state(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 0


def _load_transformers(
    cls: Any, folder: Path, source: str, *, dtype: Any, attn_implementation: Any, **kwargs: Any
) -> Any:
    weight_files(folder)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        model, info = cls.from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            local_files_only=True,
            **given,
        )
    except RuntimeError as error:
        raise WeightsError(f"{source}: its weights do not fit its config.json: {error}") from error
    problems = {
        what: sorted(str(key) for key in info.get(field, ()))
        for what, field in (
            ("missing", "missing_keys"),
            ("unknown", "unexpected_keys"),
            ("misshapen", "mismatched_keys"),
        )
    }
    if any(problems.values()):
        raise WeightsError(
            f"{source} does not hold this family's weights: "
            + "; ".join(
                f"{len(keys)} {what} ({', '.join(keys[:4])})" for what, keys in problems.items() if keys
            )
        )
    return model.eval()
