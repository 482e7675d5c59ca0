"""The models in the package do what their cards say."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import loop_lens
from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.data import AdditionTask, HopsTask
from loop_lens.shipped import shipped_folder
from loop_lens.training.recipes import RECIPES
from loop_lens.training.recipes.card import CARD, CURVES, MEASUREMENTS, SECTIONS
from loop_lens.training.recipes.measure import TEST_SEED

NAMES = ["hops", "hops-no-injection", "hops-ouro", "words"]
CHAINS = [name for name in NAMES if name.startswith("hops")]


def facts(name: str) -> dict[str, Any]:
    return json.loads((shipped_folder(name) / MEASUREMENTS).read_text())


def bare(name: str) -> loop_lens.LoopedTransformer:
    return loop_lens.LoopedTransformer.from_pretrained(shipped_folder(name)).eval()


def prompts(n: int, hops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Test sequences, and their answers by walking the pairs [n hops]."""
    generator = torch.Generator().manual_seed(TEST_SEED + hops)
    ids = HopsTask().batch(n, level=hops, generator=generator, split="test").input_ids
    answers: list[list[int]] = []
    for row in ids.tolist():
        successor, at = dict(zip(row[:16:2], row[1:16:2], strict=True)), row[17]
        answers.append([at := successor[at] for _ in range(hops)])
    return ids, torch.tensor(answers)


def test_what_ships() -> None:
    assert loop_lens.shipped_models() == [f"loop-lens/{name}" for name in NAMES]


def test_all_of_it_is_small() -> None:
    folder = Path(loop_lens.__file__).parent / "shipped"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6


def test_the_wheel_takes_all_of_it() -> None:
    root = Path(__file__).parent.parent
    target = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    # Hatch packs every file of the package but those that git ignores.
    assert target == {"packages": ["loop_lens"]}
    ignored = [line.rstrip("/") for line in (root / ".gitignore").read_text().split()]
    for file in (root / "loop_lens" / "shipped").rglob("*"):
        parts = file.relative_to(root).parts
        if "__pycache__" not in parts:
            assert not any(fnmatch(part, pattern) for part in parts for pattern in ignored), file


@pytest.mark.parametrize("name", NAMES)
def test_opens_offline_and_computes_what_the_plain_model_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = loop_lens.boot(f"loop-lens/{name}")
    tokens = torch.randint(model.cfg.d_vocab - 1, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), bare(name)(tokens).logits)
    assert model.cfg.default_prepend_bos == (name == "words")
    assert model.recurrences == RECIPES[name].model(FakeTask(model)).recurrences  # type: ignore[arg-type]


class FakeTask:
    """As much of a task as a model's configuration asks for."""

    def __init__(self, model: Any) -> None:
        self.vocab_size, self.tokenizer = model.cfg.d_vocab, model.tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_everything(name: str) -> None:
    text = (shipped_folder(name) / CARD).read_text()
    assert text.startswith(f"# loop-lens/{name}\n")
    for section in SECTIONS:
        assert f"\n## {section}\n" in text
    recorded = facts(name)
    for number in recorded["numbers"]:
        assert f"| {number} |" in text
    for fact in (
        "--seed 0",
        "minutes",
        "MIT",
        "### Convergence",
        CURVES,
        f"{recorded['training']['steps']:,}",
    ):
        assert fact in text
    assert (shipped_folder(name) / CURVES).stat().st_size > 5000


@pytest.mark.parametrize("name", CHAINS)
def test_accuracy_is_what_the_card_says(name: str) -> None:
    model, numbers = bare(name), facts(name)["numbers"]
    ids, answers = prompts(512, 6)
    with torch.no_grad():
        named = model(ids, use_cache=False).logits[:, 18:].argmax(-1)
        assert (named == answers).float().mean().item() == pytest.approx(numbers["accuracy"], abs=0.005)
        model.config.recurrences = 1
        named = model(ids, use_cache=False).logits[:, 18:].argmax(-1)
    at_one = (named == answers).float().mean().item()
    assert at_one == pytest.approx(numbers["accuracy_at_one_iteration"], abs=0.005)
    assert numbers["chance"] == 1 / 8


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_the_one_it_was_made_by(name: str) -> None:
    recipe, config = RECIPES[name], bare(name).config
    settings = json.loads(json.dumps(recipe.training(0).to_json()))
    assert facts(name)["training"]["settings"] == settings
    wanted = recipe.model(FakeTask(loop_lens.boot(f"loop-lens/{name}"))).to_dict()  # type: ignore[arg-type]
    given = config.to_dict()
    left_out = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in wanted.items() if k not in left_out} == {
        k: given[k] for k in wanted if k not in left_out
    }


def test_hops_solves_one_more_hop_per_iteration() -> None:
    model = loop_lens.boot("loop-lens/hops")
    ids, answers = prompts(128, 6)
    for t in range(1, 7):
        with torch.no_grad(), model.at_recurrences(t):
            right = (model(ids)[:, 18:].argmax(-1) == answers).float().mean(0)
        # Measured on 512: 0.90 or more at hop t, 0.19 or less at hop t + 1, chance 0.125.
        assert (right[:t] > 0.8).all() and (right[t:] < 0.3).all()


def test_hops_goes_on_beyond_what_it_was_trained_for() -> None:
    model = loop_lens.boot("loop-lens/hops", recurrences=48)
    ids, answers = prompts(32, 10)
    with torch.no_grad():
        assert (model(ids)[:, 18:].argmax(-1) == answers).float().mean() > 0.98


def test_hops_settles_wherever_it_starts() -> None:
    ids, _ = prompts(8, 6)
    last: list[torch.Tensor] = []
    for seed in (0, 1):
        model = loop_lens.boot("loop-lens/hops", recurrences=40, initial_state=seed)
        sites = ["loop.38.hook_state_out", "loop.39.hook_state_out"]
        _, cache = model.run_with_cache(ids, names_filter=sites)
        before, after = (cache[site] for site in sites)
        assert ((after - before).norm(dim=-1) < 1e-3 * after.norm(dim=-1)).all()
        last.append(after)
    assert torch.cosine_similarity(*last, dim=-1).min() > 0.999


def test_the_coda_lens_names_hop_i_at_arrow_i_after_iteration_i() -> None:
    model = loop_lens.boot("loop-lens/hops")
    ids, answers = prompts(16, 6)
    read = loop_lens.lens(model, ids, kind="coda")
    for t in range(1, 7):
        site = read.sites.index(f"loop.{t - 1}.hook_state_out")
        arrow = [read.positions[0].tolist().index(17 + t)]
        named = read.top_ids[site][:, arrow, 0].squeeze(1)
        assert (named == answers[:, t - 1]).float().mean() > 0.7


def test_a_patch_moves_one_arrow_per_iteration() -> None:
    model = loop_lens.boot("loop-lens/hops")
    ids, answers = prompts(64, 6)
    other = ids.clone()
    other[:, 17] = answers[:, 2]  # the same cycle, from three hops further along
    successor = torch.empty(64, 8, dtype=torch.long).scatter_(1, ids[:, :16:2], ids[:, 1:16:2])
    theirs = [successor.gather(1, other[:, 17:18])]
    for _ in range(5):
        theirs.append(successor.gather(1, theirs[-1]))
    _, cache = model.run_with_cache(other)
    for t, arrow, reached in ((3, 1, 5), (5, 2, 4), (7, 3, 3)):
        site = f"loop.{t}.hook_state_out"

        def patch(state: torch.Tensor, hook: Any, site: str = site, at: int = 17 + arrow) -> torch.Tensor:
            state[:, at] = cache[site][:, at]
            return state

        named = model.run_with_hooks(ids, fwd_hooks=[(site, patch)])[:, 18:].argmax(-1)
        expected = answers.clone()
        expected[:, reached - 1] = theirs[reached - 1][:, 0]
        assert (named == expected).float().mean(0).min() > 0.9


def test_without_injection_the_loop_forgets() -> None:
    ids, answers = prompts(64, 6)
    right: dict[str, float] = {}
    for name in ("hops", "hops-no-injection"):
        model = loop_lens.boot(f"loop-lens/{name}", recurrences=48)
        right[name] = (model(ids)[:, 18:].argmax(-1) == answers).float().mean().item()
    # 1.00 and 0.69 on 512 sequences.
    assert right["hops"] > 0.98 and right["hops-no-injection"] < 0.85


def test_prompts_of_the_task_read_as_words() -> None:
    model = loop_lens.boot("loop-lens/hops")
    text = HopsTask().prompt([2, 3, 1, 4, 5, 6, 7, 0], 0, 2)
    assert model.to_str_tokens(text) == text.split()
    last = model(model.to_tokens(text))[0, -2:].argmax(-1)
    assert model.to_str_tokens(last) == ["c", "b"]


def test_words_is_better_than_counting_words() -> None:
    numbers, model = facts("words")["numbers"], loop_lens.boot("loop-lens/words")
    assert numbers["loss"] < numbers["loss_of_the_token_frequencies"] - 1
    text = "Return True if the file exists, and False otherwise. If the object is not a string, a TypeError is raised."
    tokens = model.to_tokens(text)
    loss = model(tokens, return_type="loss").item()
    assert loss < numbers["loss_of_the_token_frequencies"] - 1


def test_a_name_that_does_not_ship() -> None:
    with pytest.raises(FileNotFoundError, match="loop-lens/hops"):
        loop_lens.boot("loop-lens/skips")


def test_a_closed_vocabulary_without_the_letter_a_opens() -> None:
    task = AdditionTask()
    model = LoopedTransformer(LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=32))
    opened = loop_lens.wrap(model, tokenizer=task.tokenizer)
    assert opened.to_tokens("3 9 = _").tolist() == [
        task.tokenizer.convert_tokens_to_ids(["3", "9", "=", "_"])
    ]
    assert opened.cfg.tokenizer_prepends_bos is False
