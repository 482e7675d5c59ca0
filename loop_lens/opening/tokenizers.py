"""A checkpoint's tokenizer, and what transformer-lens wants of one."""

from __future__ import annotations

import copy
import logging
from typing import Any

from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer
from transformer_lens.model_bridge.sources._hf_format import setup_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.files import read_json, reading

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

logger = logging.getLogger(__name__)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint folder, None where it has none.

    Raises:
        UnreadableError: If one of its files is damaged.
    """
    folder = checkpoint.folder
    files = [path for path in map(folder.joinpath, _TOKENIZER_FILES) if path.is_file()]
    if not files:
        return None
    for path in files:
        read_json(path)
    options = {"trust_remote_code": checkpoint.trusted, "local_files_only": True}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        # The families' own model types are unknown to transformers, which then gives up.
        logger.info("AutoTokenizer could not read %s (%s): reading it without its class", folder, error)
    with reading(files[0]):
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def prepare_tokenizer(tokenizer: Any, cfg: Any) -> Any:
    """A tokenizer as transformer-lens wants it, and in ``cfg`` what it adds to texts.

    transformer-lens gives it special tokens, so this is a copy to read with, not the one to save.
    """
    if tokenizer is None:
        return None
    tokenizer = copy.deepcopy(tokenizer)
    # transformer-lens may load it anew to have BOS tokens added, and transformers then asks about foreign code.
    tokenizer.init_kwargs["trust_remote_code"] = False
    if not tokenizer.init_kwargs.get("name_or_path"):
        tokenizer.init_kwargs |= {"name_or_path": "in memory", "add_bos_token": True}
    if tokenizer.eos_token is None:
        # transformer-lens takes "<|endoftext|>" for it, which must be a token, lest it be an unknown word.
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        if tokenizer.bos_token is None:
            cfg.default_prepend_bos = False
    # transformer-lens tries a tokenizer on the text "a", which a closed vocabulary may lack.
    backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    closed = tokenizer.unk_token is None and type(backend).__name__ == "WordLevel"
    if not closed or "a" in tokenizer.get_vocab():
        return configure_tokenizer(tokenizer, cfg)
    cfg.tokenizer_prepends_bos = cfg.tokenizer_appends_eos = False
    return setup_tokenizer(tokenizer, default_padding_side=getattr(cfg, "default_padding_side", None))
