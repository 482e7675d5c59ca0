"""A checkpoint's tokenizer, and what transformer-lens wants of one."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer
from transformer_lens.model_bridge.sources._hf_format import setup_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        # The families' own model types are unknown to transformers, which then gives up.
        logger.info("AutoTokenizer could not read %s (%s): reading tokenizer.json alone", folder, error)
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def prepare_tokenizer(tokenizer: Any, cfg: Any) -> Any:
    """A tokenizer as transformer-lens wants it, and in ``cfg`` what it adds to texts."""
    if tokenizer is None:
        return None
    tokenizer = copy.deepcopy(
        tokenizer
    )  # transformer-lens gives it special tokens: to read with, not to save
    if not tokenizer.init_kwargs.get("name_or_path"):
        # Made in memory: transformer-lens would load it anew to have BOS tokens added, from nowhere.
        tokenizer.init_kwargs |= {"name_or_path": "in memory", "add_bos_token": True}
    # transformer-lens tries a tokenizer on the text "a", which a closed vocabulary may lack.
    backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    closed = tokenizer.unk_token is None and type(backend).__name__ == "WordLevel"
    if not closed or "a" in tokenizer.get_vocab():
        return configure_tokenizer(tokenizer, cfg)
    cfg.tokenizer_prepends_bos = cfg.tokenizer_appends_eos = False
    return setup_tokenizer(tokenizer, default_padding_side=getattr(cfg, "default_padding_side", None))
