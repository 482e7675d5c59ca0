"""Where a checkpoint lies: a local folder, a shipped model, the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loop_lens.shipped import SHIPPED_PREFIX, shipped_folder

logger = logging.getLogger(__name__)

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_checkpoint(model_name: str | Path, revision: str | None) -> Path:
    """The local folder of a checkpoint, fetched from the hub if need be (no code, no pickles).

    Raises:
        FileNotFoundError: If there is none.
    """
    name = str(model_name)
    if name.startswith(SHIPPED_PREFIX):
        return shipped_folder(name)
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model_name, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a local folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no local folder, and the hub did not give it: {error}. Check the name, the network, "
            "and your access to it."
        ) from error


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
