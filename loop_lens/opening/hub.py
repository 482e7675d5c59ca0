"""The checkpoint of a name: a local folder, a shipped model, the hub."""

from __future__ import annotations

from pathlib import Path

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.shipped import SHIPPED_PREFIX, shipped_folder

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find_checkpoint(
    model_name: str | Path, revision: str | None = None, *, trusted: bool = False
) -> Checkpoint:
    """The checkpoint of a name, fetched from the hub if need be (no code unless trusted, no pickles).

    Raises:
        FileNotFoundError: If there is none.
    """
    patterns = [*_HUB_FILES, "*.py"] if trusted else _HUB_FILES
    return Checkpoint(_folder_of(model_name, revision, patterns), str(model_name), trusted=trusted)


def _folder_of(model_name: str | Path, revision: str | None, patterns: list[str]) -> Path:
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
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no local folder, and the hub did not give it: {error}. Check the name, the network, "
            "and your access to it."
        ) from error
