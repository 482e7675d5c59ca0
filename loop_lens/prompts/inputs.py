"""What a model's own forward takes: transformer-lens' forms, a tokenizer's own output, ids in lists."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.prompts.forms import forms_of
from loop_lens.prompts.reader import device_of, require_context, require_ids, unmasked

_TAKEN = (
    "text, texts, ids [pos] or [batch pos], a mapping with input_ids (a tokenizer's own output), or the stream "
    "[batch pos d_model]"
)


class ReadsInput(TransformerBridge):
    """A bridge whose forward passes a mapping's ``attention_mask`` on, and refuses what it cannot read."""

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run the model, as in transformer-lens, on whatever `_read` takes."""
        given, mask = _read(self, input)
        if mask is not None:
            kwargs.setdefault("attention_mask", mask)
        if isinstance(given, Tensor) and not given.is_floating_point() and "past_key_values" not in kwargs:
            require_context(self, given.shape[-1], "input")
        return super().forward(given, *args, **kwargs)

    def to_tokens(  # type: ignore[override]
        self, input: Any, *args: Any, truncate: bool | None = None, **kwargs: Any
    ) -> Tensor:
        """Text as tokens, as in transformer-lens; text longer than the model's context is refused.

        Args:
            input: Text or texts.
            *args: As in transformer-lens.
            truncate: True cuts text to the context, as transformer-lens does by default; False allows any length.
            **kwargs: As in transformer-lens.

        Raises:
            ValueError: If a text has more tokens than the context, and ``truncate`` is not given, or none at all.
        """
        prepend_bos = args[0] if args else kwargs.get("prepend_bos")
        prepended = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if not prepended and "" in ([input] if isinstance(input, str) else list(input)):
            raise ValueError("an empty text has no tokens: give some text, or prepend_bos=True")
        tokens = super().to_tokens(input, *args, truncate=bool(truncate), **kwargs)
        if truncate is None:
            require_context(self, tokens.shape[-1], "the text")
        return tokens

    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Sample tokens, as in transformer-lens; padding of a mapping's ids is moved to the left."""
        given, mask = _read(self, input, left=True)
        if mask is not None:
            kwargs.setdefault("attention_mask", mask)
        return super().generate(given, *args, **kwargs)


def token_mask(
    model: TransformerBridge, given: Any, *, attention_mask: Tensor | None = None, **options: Any
) -> Bool[Tensor, "batch pos"] | None:
    """Which positions of a forward's input hold tokens rather than padding; None where all do.

    Args:
        model: The model.
        given: What its forward was given.
        attention_mask: As its forward was given it.
        **options: As its forward was given them; ``prepend_bos`` and ``padding_side`` say how texts are padded.
    """
    if attention_mask is None and not isinstance(given, str | Tensor):
        given, attention_mask = _read(model, given)
    if attention_mask is not None:
        return attention_mask.bool() if attention_mask.ndim == 2 else None
    if isinstance(given, str | Tensor) or len(given) == 1:
        return None
    bos = options.get("prepend_bos")
    lengths = [model.to_tokens(text, prepend_bos=bos, move_to_device=False).shape[-1] for text in given]
    side = options.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return None if bool(mask.all()) else mask.flip(-1) if side == "left" else mask


def _read(model: TransformerBridge, given: Any, *, left: bool = False) -> tuple[Any, Tensor | None]:
    """Text as it is, or ids [batch pos] and perhaps their mask.

    Args:
        model: For its vocabulary.
        given: What a user gave.
        left: Whether to pad on the left, for what is generated from the last position.

    Raises:
        TypeError: If it is neither; says what it is.
        ValueError: If an id is not in the vocabulary, or there is nothing.
    """
    if isinstance(given, Tensor) and not given.numel():
        raise ValueError(
            f"input has shape {list(given.shape)}: give at least one prompt of at least one token"
        )
    if isinstance(given, Tensor) and given.is_floating_point():
        if given.ndim not in (2, 3) or given.shape[-1] != model.cfg.d_model:
            raise TypeError(f"input must be {_TAKEN}, got a {given.dtype} tensor {list(given.shape)}")
        return given, None
    if isinstance(given, Tensor) and given.ndim in (1, 2) and given.dtype != torch.bool:
        if given.device.type == "cpu":  # elsewhere looking would make the device wait
            require_ids(model, given, "input")
        return given, None
    forms = list(forms_of(given, "input"))
    contents: list[Any] = [form.content for form in forms]
    if not contents:
        raise ValueError(f"input is empty: give {_TAKEN}")
    if all(isinstance(content, str) for content in contents):
        return contents[0] if isinstance(given, str) else contents, None
    if not all(isinstance(content, Tensor) for content in contents):
        raise TypeError(
            f"input must be {_TAKEN}, not chat messages: model.tokenizer.apply_chat_template(messages, "
            "add_generation_prompt=True, return_dict=True) makes a mapping of them"
        )
    masks = [torch.ones_like(f.content).bool() if f.mask is None else f.mask for f in forms]  # type: ignore[arg-type]
    if left and not all(map(torch.all, masks)):
        contents = [unmasked(ids, mask, "input") for ids, mask in zip(contents, masks, strict=True)]
        masks = [torch.ones_like(ids).bool() for ids in contents]
    for ids, mask in zip(contents, masks, strict=True):
        require_ids(model, ids.cpu()[mask.cpu()], "input")
    side, device = "left" if left else "right", device_of(model)
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    tokens, mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side).to(
            device
        )
        for rows, value in ((contents, pad), (masks, 0))
    )
    # Without padding there is nothing to tell, and attention keeps the kernel that it has without a mask.
    return tokens, None if bool(mask.all()) else mask.long()
