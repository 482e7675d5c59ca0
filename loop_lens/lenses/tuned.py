"""The tuned lens per iteration and layer: an affine translator before the logit lens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.readers import is_normed, sites_of
from loop_lens.unrolling.sites import Firing, Site

Form = Literal["affine", "bias", "low_rank"]


def fingerprint(model: HookedLoopedTransformer) -> str:
    """Tells one model's weights from another's: a hash of sizes and of a few numbers of each parameter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.native_state().items()):
        sample = tensor.detach().flatten()[:4].float().cpu().tolist()
        digest.update(f"{name}{tuple(tensor.shape)}{[round(x, 4) for x in sample]}".encode())
    return digest.hexdigest()[:16]


class TunedLens(nn.Module):
    """Translators h + A h + b, one per site or one per layer for all iterations.

    Attributes:
        sites: Keys of the translators.
        form: ``"affine"`` (A full), ``"low_rank"`` (A = U V) or ``"bias"`` (no A).
        shared: Whether iterations share their layer's translator.
        model_id: Fingerprint of the model that it was trained for.
        report: What training measured, one row per site; empty for a loaded lens without one.
    """

    ends_normed: bool | None = None

    def __init__(
        self,
        sites: Sequence[str],
        d_model: int,
        *,
        form: Form = "affine",
        rank: int = 16,
        shared: bool = False,
        model_id: str = "",
    ) -> None:
        super().__init__()
        if form not in ("affine", "bias", "low_rank"):
            raise ValueError(f"form {form!r} is unknown: choose 'affine', 'bias' or 'low_rank'")
        if not 1 <= rank <= d_model:
            raise ValueError(f"rank must be 1 to d_model={d_model}, got {rank}")
        self.sites, self.form, self.rank, self.shared = tuple(sites), form, rank, shared
        self.d_model, self.model_id = d_model, model_id
        self.report = pd.DataFrame()
        n = len(self.sites)
        self.bias = nn.Parameter(torch.zeros(n, d_model))
        if form == "affine":
            self.weight = nn.Parameter(torch.zeros(n, d_model, d_model))
        elif form == "low_rank":
            self.down = nn.Parameter(torch.randn(n, rank, d_model) * d_model**-0.5)
            self.up = nn.Parameter(torch.zeros(n, d_model, rank))

    def translate(self, stream: Tensor, index: int) -> Tensor:
        """A stream [... d_model] of the site with this index, translated to the final layer's basis."""
        dtype = stream.dtype
        x = stream.to(self.bias.dtype)
        out = x + self.bias[index]
        if self.form == "affine":
            out = out + x @ self.weight[index].T
        elif self.form == "low_rank":
            out = out + (x @ self.down[index].T) @ self.up[index].T
        return out.to(dtype)

    def carry(self, stream: Tensor, spot: Site, model: HookedLoopedTransformer) -> Tensor:
        """The stream of a site, translated."""
        return self.translate(stream, self.sites.index(_key(spot, shared=self.shared)))

    def require(self, model: HookedLoopedTransformer, spots: Sequence[Site]) -> None:
        """Raise ValueError unless it was trained for this model and these sites."""
        require_model(self.model_id, self.d_model, model, "this tuned lens was trained")
        missing = [spot.flat for spot in spots if _key(spot, shared=self.shared) not in self.sites]
        if missing:
            raise ValueError(
                f"this tuned lens has no translator for {missing[0]} (nor {len(missing) - 1} others): it has "
                f"{', '.join(self.sites[:4])}, ... Pass sites= to lens(), or train with them"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file.

        Raises:
            OSError: If the file cannot be written.
        """
        described = {
            "kind": "loop_lens tuned lens",
            "sites": self.sites,
            "form": self.form,
            "rank": self.rank,
            "shared": self.shared,
            "d_model": self.d_model,
            "model_id": self.model_id,
            "report": self.report.to_dict("list"),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"loop_lens": json.dumps(described)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read a file that `save` wrote.

        Raises:
            ValueError: If it is another kind of file.
        """
        described, tensors = read_lens_file(path, "loop_lens tuned lens")
        lens = cls(
            described["sites"],
            described["d_model"],
            form=described["form"],
            rank=described["rank"],
            shared=described["shared"],
            model_id=described["model_id"],
        )
        lens.load_state_dict(tensors)
        lens.report = pd.DataFrame(described["report"])
        return lens.requires_grad_(False)


def read_lens_file(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a lens file.

    Raises:
        ValueError: If it is another kind of file.
    """
    with safe_open(path, framework="pt") as file:
        described = json.loads((file.metadata() or {}).get("loop_lens", "{}"))
        if described.get("kind") != kind:
            raise ValueError(f"{path} is no {kind}: it is {described.get('kind', 'something else')!r}")
        return described, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def require_model(model_id: str, d_model: int, model: HookedLoopedTransformer, what: str) -> None:
    """Raise ValueError unless a lens belongs to a model."""
    if d_model != model.cfg.d_model:
        raise ValueError(f"{what} for d_model={d_model}, but this model has d_model={model.cfg.d_model}")
    if model_id and model_id != fingerprint(model):
        raise ValueError(f"{what} for another model: the weights differ")


def _key(spot: Site, *, shared: bool) -> str:
    """What a site's translator goes by."""
    place, hook = spot.place, spot.flat.rsplit(".", 1)[-1]
    if not shared:
        prefix = place.prefix if place.prefix else "model"
        return f"{prefix}.{hook}"
    layer = f".blocks.{place.layer}" if isinstance(place, Firing) else ""
    return f"{place.segment}{layer}.{hook}"


def batches(model: HookedLoopedTransformer, data: Any, seq_len: int) -> Tensor:
    """Rows of tokens [row pos] from texts, token tensors, or a dataset with a column of either.

    Texts are joined, with the tokenizer's end-of-text token between them, and cut into rows.

    Raises:
        ValueError: If there is not enough for two rows.
    """
    if isinstance(data, Tensor):
        rows = (
            data.flatten(0, -2) if data.ndim > 1 else data[: len(data) // seq_len * seq_len].view(-1, seq_len)
        )
        rows = rows[:, :seq_len]
    else:
        columns = getattr(data, "column_names", None)
        if columns is not None:
            column = "input_ids" if "input_ids" in columns else "text"
            data = (row[column] for row in data)
        texts: Iterable[Any] = [data] if isinstance(data, str) else data
        stream: list[int] = []
        for text in texts:
            stream += (
                model.to_tokens(text, prepend_bos=False)[0].tolist() if isinstance(text, str) else list(text)
            )
            end = getattr(model.tokenizer, "eos_token_id", None)
            stream += [] if end is None else [end]
        rows = torch.tensor(stream[: len(stream) // seq_len * seq_len], dtype=torch.long).view(-1, seq_len)
    if len(rows) < 2:
        raise ValueError(
            f"the data make {len(rows)} rows of {seq_len} tokens: give more text, or a smaller seq_len"
        )
    return rows


def fit_tuned_lens(
    model: HookedLoopedTransformer,
    data: Any,
    *,
    sites: str | Sequence[str] = "resid_post",
    form: Form = "affine",
    rank: int = 16,
    shared: bool = False,
    steps: int = 250,
    batch_size: int = 4,
    seq_len: int = 64,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train translators so that the logit lens after them says what the model says in the end.

    The loss is KL(model || lens) at every position. A translator that does not lower it on held-out
    rows is put back to the identity, so the lens is never worse there than the logit lens.

    Args:
        model: The model; its weights are not changed.
        data: Texts, tokens [row pos], or a dataset with a column ``text`` or ``input_ids``.
        sites: A kind of site or hooks' names, of streams.
        form: ``"affine"``, ``"low_rank"`` or ``"bias"``.
        rank: Rank, for ``"low_rank"``.
        shared: Whether iterations share their layer's translator.
        steps: Steps of Adam.
        batch_size: Rows a step.
        seq_len: Tokens a row.
        learning_rate: Step size, decaying linearly to zero.
        held_out: Share of the rows kept for measuring.
        seed: Seed of the rows' order.
        progress: Whether to show a progress bar.

    Returns:
        The lens; ``report`` has each site's held-out KL with the logit lens and with this one.

    Raises:
        ValueError: If there are too few data.

    Source:
        Belrose et al., arXiv 2303.08112; here per iteration, with rows where theirs are documents.
    """
    found = sites_of(model, "tuned", sites)
    rows = batches(model, data, seq_len)
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    n_held = min(len(rows) - 1, max(1, round(held_out * len(rows))))
    kept, training = rows[:n_held], rows[n_held:]
    keys = [_key(spot, shared=shared) for spot in found]
    torch.manual_seed(seed)
    lens = TunedLens(
        list(dict.fromkeys(keys)),
        model.cfg.d_model,
        form=form,
        rank=rank,
        shared=shared,
        model_id=fingerprint(model),
    ).to(next(model.original_model.parameters()).device)
    optimizer = torch.optim.Adam(lens.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in tqdm(range(steps), desc="tuned lens", disable=not progress):
        picked = training[torch.randint(len(training), (batch_size,), generator=generator)]
        streams, wanted = _run(model, picked, found)
        optimizer.zero_grad()
        for spot, key in zip(found, keys, strict=True):
            with torch.enable_grad():
                translated = lens.translate(streams[spot.flat], lens.sites.index(key))
                loss = _kl(model, translated, wanted, spot)
                (loss / len(found)).backward()
        optimizer.step()
        decay.step()
    lens.requires_grad_(False)
    lens.report = _keep_what_helps(model, lens, found, keys, kept, batch_size)
    return lens


@torch.no_grad()
def _run(
    model: HookedLoopedTransformer, tokens: Tensor, found: Sequence[Site]
) -> tuple[dict[str, Tensor], Tensor]:
    """The sites' streams and the model's log-probabilities."""
    device = next(model.original_model.parameters()).device
    logits, cache = model.run_with_cache(tokens.to(device), names_filter=[spot.flat for spot in found])
    return {spot.flat: cache[spot.flat] for spot in found}, logits.float().log_softmax(-1)


def _kl(model: HookedLoopedTransformer, stream: Tensor, wanted: Tensor, spot: Site) -> Tensor:
    read = logit_readout(
        model,
        stream,
        apply_ln=not is_normed(model, spot),
        return_type="log_probs",
        chunk_size=max(1, stream[..., 0].numel()),
        enable_grad=torch.is_grad_enabled(),
    )
    return (wanted.exp() * (wanted - read.values)).sum(-1).mean()


@torch.no_grad()
def _keep_what_helps(
    model: HookedLoopedTransformer,
    lens: TunedLens,
    found: Sequence[Site],
    keys: Sequence[str],
    rows: Tensor,
    batch_size: int,
) -> pd.DataFrame:
    """Measure on held-out rows; put translators back that do not help at every site they serve."""
    plain, tuned = torch.zeros(len(found)), torch.zeros(len(found))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        streams, wanted = _run(model, part, found)
        for i, (spot, key) in enumerate(zip(found, keys, strict=True)):
            stream, share = streams[spot.flat], len(part) / len(rows)
            plain[i] += share * _kl(model, stream, wanted, spot).cpu()
            translated = lens.translate(stream, lens.sites.index(key))
            tuned[i] += share * _kl(model, translated, wanted, spot).cpu()
    for key in lens.sites:
        served = [i for i, other in enumerate(keys) if other == key]
        if (tuned[served] > plain[served]).any():
            index = lens.sites.index(key)
            for name in ("bias", "weight", "up"):
                if hasattr(lens, name):
                    getattr(lens, name).data[index].zero_()
            tuned[served] = plain[served]
    return pd.DataFrame(
        {"site": [s.flat for s in found], "logit_kl": plain.tolist(), "tuned_kl": tuned.tolist()}
    )
