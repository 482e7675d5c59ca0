"""The ablation end to end in small, and its verdicts both ways."""

import math
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from loop_lens.data import AdditionTask
from loop_lens.dynamics import Convergence
from loop_lens.experiments.ablation import cells
from loop_lens.experiments.ablation.cells import Cell, Settings, finished, grid, run_grid
from loop_lens.experiments.ablation.command import main, write_report
from loop_lens.experiments.ablation.measures import CellResult, Measuring, StateResult, as_feed_forward
from loop_lens.experiments.ablation.verdicts import (
    beyond_training,
    distance_to,
    kind_of,
    layer_spread,
    matches,
    repetition,
    self_organisation,
    stability,
    summaries,
)
from loop_lens.experiments.claims import FAILS, HOLDS, UNTOLD, decide
from loop_lens.measuring.moments import Moments
from loop_lens.models.native import LoopedTransformer
from loop_lens.stages import Stages

DOCUMENTS = [f"Words {i} are made of letters, and sentences of words. " * 6 for i in range(40)]
SMALL = Settings(
    width=16,
    mlp=16,
    vocabulary=270,
    window=12,
    steps=4,
    text_steps=3,
    batch=4,
    text_batch=4,
    warmup=1,
    level=2,
    measuring=Measuring(
        recurrences=(1, 2, 4, 8),
        tested=8,
        text_tested=4,
        iterations=8,
        reference=12,
        prompts=3,
        krylov=4,
        krylov_prompts=1,
    ),
)
CELLS = [
    Cell("text", core=1, recurrences=1),
    Cell("text", core=3),
    Cell("text", "pre", "linear", 3),
    Cell("text", core=3, outer=0),
    Cell("addition", "ouro", "linear", 1),
]


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr("loop_lens.data.text.standard_library_documents", lambda: DOCUMENTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@pytest.fixture
def found(folder):
    return run_grid(CELLS, SMALL, folder, progress=False)


def test_measured_models_are_the_trained_ones(found, folder):
    cell = CELLS[-1]
    model = LoopedTransformer.from_pretrained(folder / cell.name / "run" / "model").eval()
    generator = torch.Generator().manual_seed(0)
    batch = AdditionTask(modulus=5).batch(8, level=2, generator=generator, split="test")
    kept = batch.labels != -100
    said = found[cell].to_dataframe().set_index("recurrences")
    for r in (1, 4, 8):
        model.config.recurrences = r
        with torch.no_grad():
            logits = model(batch.input_ids).logits[kept]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[kept])
        accuracy = (logits.argmax(-1) == batch.labels[kept]).float().mean()
        assert said["loss"][r] == pytest.approx(float(loss), rel=1e-4)
        assert said["accuracy"][r] == pytest.approx(float(accuracy))


def test_a_feed_forward_model_is_measured_once_and_without_a_loop(found):
    measured = found[CELLS[0]]
    assert measured.to_dataframe()["recurrences"].tolist() == [1]
    assert measured.trained.stages.recurrences == 0
    assert all(state.convergence is None for state in measured.states.values())


def test_states_before_training_are_measured_too(found):
    measured = found[CELLS[1]]
    initial, trained = (state.summary() for state in measured.states.values())
    assert initial["cosine"] != trained["cosine"]
    assert measured.initial.convergence.reference == 12
    assert len(measured.initial.convergence.iterations) == 8


def test_a_second_run_trains_nothing(found, folder, monkeypatch):
    monkeypatch.setattr(cells, "train", lambda *a, **k: pytest.fail("trained again"))
    again = run_grid(CELLS, SMALL, folder, progress=False)
    for cell in CELLS:
        pd.testing.assert_frame_equal(again[cell].to_dataframe(), found[cell].to_dataframe())
        for one, other in zip(again[cell].states.values(), found[cell].states.values(), strict=True):
            assert one.radius == pytest.approx(other.radius, nan_ok=True)


def test_a_killed_run_goes_on_with_the_trained_model(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    cell = CELLS[-1]
    with monkeypatch.context() as patch:
        patch.setattr(cells, "measure_cell", killed)
        with pytest.raises(KeyboardInterrupt):
            run_grid([cell], SMALL, tmp_path, progress=False)
    steps: list[int] = []
    real = cells.train

    def counted(*args, **kwargs):
        return real(*args, **kwargs, on_step=lambda record: steps.append(record.step))

    monkeypatch.setattr(cells, "train", counted)
    assert not list(tmp_path.glob("*.safetensors*"))
    run_grid([cell], SMALL, tmp_path, progress=False)
    assert steps == []


def test_other_settings_in_the_same_folder_are_refused(found, folder):
    with pytest.raises(ValueError, match=r"other settings \(steps was 4, now 5\)"):
        run_grid(CELLS[-1:], replace(SMALL, steps=5), folder, progress=False)
    with pytest.raises(ValueError, match="other settings"):
        finished(CELLS[-1:], replace(SMALL, width=32), folder)


def test_the_other_tasks_steps_may_change(found, folder):
    run_grid(CELLS[:1], replace(SMALL, steps=5), folder, progress=False)
    with pytest.raises(ValueError, match="text_steps was 3, now 5"):
        run_grid(CELLS[:1], replace(SMALL, text_steps=5), folder, progress=False)


def test_another_way_of_measuring_trains_nothing(tmp_path, monkeypatch):
    cell = CELLS[-1]
    run_grid([cell], SMALL, tmp_path, progress=False)
    steps: list[int] = []
    real = cells.train
    monkeypatch.setattr(
        cells, "train", lambda *a, **k: real(*a, **k, on_step=lambda record: steps.append(record.step))
    )
    how = replace(SMALL.measuring, recurrences=(1, 3, 4, 8))
    found = run_grid([cell], replace(SMALL, measuring=how), tmp_path, progress=False)
    assert found[cell].to_dataframe()["recurrences"].tolist() == [1, 3, 4, 8]
    assert steps == []


def test_an_orbit_of_period_two_is_not_taken_for_a_fixed_point():
    # Distance 0 in every other iteration: the reference has the same parity as the last one.
    values = torch.zeros(6, 8, 1, dtype=torch.float64)
    metrics = ("norm", "relative_distance", "cosine", "relative_step", "degeneracy_cosine", "floor")
    values[0], values[3] = 1.0, 0.5
    values[1, 0::2], values[2] = 0.5, 1.0
    values[2, 0::2] = 0.875
    ones = torch.ones_like(values)
    axes = {"iteration": tuple(range(8)), "layer": (0,)}
    moments = Moments(axes, metrics, torch.stack([ones, values, values**2] * 2))
    row = replace(_fake().trained, convergence=Convergence("loop", 12, moments)).summary()
    assert (row["relative_distance"], row["nearest"], row["cosine"]) == (0.5, 0.0, 0.875)
    assert kind_of(row) == "orbit"


def test_what_is_finished_is_found_without_training(found, folder, tmp_path):
    assert list(finished([Cell("text", core=9), *CELLS], SMALL, folder)) == CELLS
    with pytest.raises(ValueError, match="holds no measured cell"):
        finished(CELLS, SMALL, tmp_path)


def test_results_come_back_from_disk(found, tmp_path):
    measured = found[CELLS[2]]
    measured.save(tmp_path / "m")
    back = CellResult.load(tmp_path / "m")
    assert back.trained.summary() == pytest.approx(measured.trained.summary())
    pd.testing.assert_frame_equal(back.training(), measured.training())
    pd.testing.assert_frame_equal(back.initial.stages.to_dataframe(), measured.initial.stages.to_dataframe())


def test_the_report_names_its_files_and_what_is_missing(found, tmp_path):
    missing = Cell("addition", "huginn")
    paths = write_report(found, SMALL, tmp_path / "ablation", missing=[missing], command="ablation --seed 0")
    page = paths[0].read_text()
    assert f"Not measured: {missing.name}" in page
    assert "ablation --seed 0" in page
    for path in paths[1:]:
        assert f"ablation/{path.name}" in page
        assert 0 < path.stat().st_size < 150_000
    dynamics = pd.read_csv(tmp_path / "ablation" / "dynamics.csv")
    assert len(dynamics) == 8  # four looped models, before and after training


def _app():
    app = typer.Typer()
    app.command()(main)
    return app


def test_the_command_reports_what_is_done_and_what_is_not(found, folder, tmp_path, monkeypatch):
    module = "loop_lens.experiments.ablation.command"
    missing = Cell("text", "huginn", core=3)
    monkeypatch.setattr(f"{module}.Settings", lambda **options: replace(SMALL, **options))
    monkeypatch.setattr(f"{module}.grid", lambda *a, **k: [*CELLS, missing])
    asked: list[tuple[object, ...]] = []

    def report(found, settings, out, *, missing, command):
        asked.append((list(found), missing, command))
        return [out]

    monkeypatch.setattr(f"{module}.write_report", report)
    options = ["--out", str(tmp_path / "r"), "--work", str(folder), "--steps", "4", "--text-steps", "3"]
    result = CliRunner().invoke(_app(), [*options, "--report-only"])
    assert result.exit_code == 0, result.output
    told = "python -m loop_lens.experiments ablation --task addition --cores 2,4 --steps 4 --text-steps 3 --seed 0"
    assert asked == [(CELLS, [missing], told)]
    assert "wrote" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "text"], "text is always in the grid"),
        (["--cores", "2,x"], "invalid literal"),
        (["--cores", "0"], "at least one core layer"),
        (["--report-only", "--work", "nowhere"], "holds no measured cell"),
    ],
)
def test_the_command_says_what_is_wrong(options, message):
    result = CliRunner().invoke(_app(), options, terminal_width=400)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_grid_crosses_injection_norm_and_block_size_on_both_tasks():
    cells = grid("composition", cores=(2, 4))
    assert len(set(cells)) == len(cells) == 31
    for task in ("composition", "text"):
        crossed = [c for c in cells if c.task == task and c.looped and c.outer and c.seed == 0]
        assert {(c.norm, c.injection, c.core) for c in crossed} == {
            (norm, injection, core)
            for norm in ("pre", "huginn", "ouro")
            for injection in ("linear", "none")
            for core in (2, 4)
        }
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    "wrong", [{"task": "sums"}, {"task": "text", "norm": "post"}, {"task": "text", "injection": "add"}]
)
def test_unknown_parts_of_a_cell_are_named(wrong):
    with pytest.raises(ValueError, match="is unknown: choose one of"):
        Cell(**wrong)


def test_a_looped_models_stages_are_no_feed_forward_ones(found):
    with pytest.raises(ValueError, match="4 iterations"):
        as_feed_forward(found[CELLS[1]].trained.stages)


def test_measuring_needs_a_reference_beyond():
    with pytest.raises(ValueError, match="beyond"):
        Measuring(iterations=64, reference=64)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"cosine": 0.99, "growth": 1.0, "nearest": 0.0}, "fixed point"),
        ({"cosine": 0.99, "growth": 1.5, "nearest": 0.5}, "direction only"),
        ({"cosine": 0.5, "growth": 1.0, "nearest": 0.01}, "orbit"),
        ({"cosine": 0.5, "growth": 1.0, "nearest": 0.5}, "none"),
        ({"cosine": 0.9, "growth": 1.5, "nearest": 0.5}, "drift"),
        ({"cosine": math.nan, "growth": math.nan, "nearest": math.nan}, "diverged"),
    ],
)
def test_where_a_loop_ends_up_has_a_name(row, kind):
    assert kind_of(row) == kind


@pytest.mark.parametrize(
    ("agree", "verdict"),
    [
        ([], UNTOLD),
        ([True], HOLDS),
        ([True, True], HOLDS),
        ([True, False], UNTOLD),
        ([True, False, False], FAILS),
        ([False], FAILS),
    ],
)
def test_a_claim_holds_if_all_agree(agree, verdict):
    assert decide(agree) == verdict


def _table(kinds, degeneracy=0.99):
    """One model of each kind: {(injection, norm): kind}."""
    rows = [
        {
            "state": "trained",
            "outer": 1,
            "learnt": True,
            "injection": i,
            "norm": n,
            "kind": k,
            "cosine": 0.9,
            "degeneracy": degeneracy,
        }
        for (i, n), k in kinds.items()
    ]
    return pd.DataFrame(rows)


AS_PAPER = {
    ("linear", "pre"): "fixed point",
    ("linear", "huginn"): "fixed point",
    ("linear", "ouro"): "none",
    ("none", "pre"): "direction only",
    ("none", "huginn"): "orbit",
    ("none", "ouro"): "diverged",
}


def test_stability_holds_where_models_are_as_the_paper_says():
    assert [v.verdict for v in stability(_table(AS_PAPER), "trained")] == [HOLDS] * 7


def test_stability_does_not_hold_where_models_are_the_other_way_round():
    stable = ("fixed point", "direction only")
    turned = {key: "orbit" if kind in stable else "fixed point" for key, kind in AS_PAPER.items()}
    assert [v.verdict for v in stability(_table(turned, degeneracy=0.3), "trained")] == [FAILS] * 7


def test_a_model_that_learnt_nothing_says_nothing_after_training():
    table = _table(AS_PAPER)
    table["learnt"] = False
    assert {v.verdict for v in stability(table, "trained")} == {UNTOLD}
    table["state"] = "initial"
    assert {v.verdict for v in stability(table, "initial")} == {HOLDS}


def test_a_growing_norm_is_no_fixed_point():
    growing = {**AS_PAPER, ("linear", "pre"): "direction only"}
    assert stability(_table(growing), "trained")[0].verdict == FAILS


def test_a_state_without_models_has_no_verdict():
    assert {v.verdict for v in stability(_table(AS_PAPER), "initial")} == {UNTOLD}


def _stages(mixing, outside=()):
    """Stages of one prompt and two heads from mixing scores [recurrence layer], or of layers where 1-d."""
    values = torch.tensor(mixing, dtype=torch.float64)
    if values.ndim == 2:
        firings = [("loop", t, k, k) for t in range(len(values)) for k in range(values.shape[1])]
    else:
        firings = [("blocks", None, k, k) for k in range(len(values))]
    flat = values.flatten()
    metrics = ("colsum_concentration", "mixing_score", "sink_rate")
    total = torch.stack([flat, flat, flat])
    ones = torch.ones_like(total)
    axes = {"firing": tuple(map(str, firings))}
    pooled = Moments(axes, metrics, torch.stack([ones, total, total**2] * 2))
    each = torch.stack([flat, -flat], 1)[None]
    one = torch.ones_like(each)
    heads = Moments({**axes, "head": (0, 1)}, ("mixing_score",), torch.stack([one, each, each**2] * 2))
    return Stages(tuple(firings), 0.3, 0, pooled, heads)


def test_layer_spread_is_the_mean_range_within_a_recurrence():
    assert layer_spread(_stages([[1.0, 3.0, 2.0], [1.0, 1.0, 5.0]]), "mixing_score") == pytest.approx(3.0)


def test_repetition_is_one_for_equal_profiles_and_minus_one_for_mirrored_ones():
    assert repetition(_stages([[1.0, 2.0, 3.0]] * 3)) == pytest.approx(1.0)
    assert repetition(_stages([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(-1.0)


def test_distance_to_a_feed_forward_model_is_the_mean_of_three_in_units_of_one():
    looped = _stages([[0.5, 0.5, 0.5]] * 2)
    found = distance_to(looped, _stages([0.5, 0.5, 0.5]), 10)
    assert found["distance"] == pytest.approx(0.0, abs=1e-12)
    found = distance_to(looped, _stages([0.7, 0.7, 0.7]), 10)
    assert found["colsum_concentration"] == pytest.approx(0.2)
    assert found["mixing_score"] == pytest.approx(0.2 / math.log(10))
    assert found["distance"] == pytest.approx((0.2 + 0.2 + 0.2 / math.log(10)) / 3)


def _fake(trained=None, initial=None, said=None):
    said = said or {1: (1.0, 0.5), 4: (0.5, 0.8), 8: (0.5, 0.8), 32: (0.5, 0.8)}
    columns = {
        "recurrences": torch.tensor([float(r) for r in said]),
        "loss": torch.tensor([v[0] for v in said.values()]),
        "accuracy": torch.tensor([v[1] for v in said.values()]),
        "kl": torch.zeros(len(said)),
    }
    states = (StateResult(stages, None, math.nan) for stages in (initial, trained))
    return CellResult({}, columns, *states)


@pytest.mark.parametrize(
    ("trained", "verdict"),
    [
        ([[1.0, 3.0, 2.0]] * 3, HOLDS),  # layers differ, and every recurrence repeats it
        ([[1.0, 1.02, 1.01]] * 3, FAILS),  # layers are alike
        ([[1.0, 3.0, 2.0], [3.0, 1.0, 0.5]], FAILS),  # recurrences differ
    ],
)
def test_stages_organise_themselves_if_layers_differ_in_every_recurrence_alike(trained, verdict):
    flat = _stages([[1.0, 1.01, 1.0]] * len(trained))
    table, verdicts = self_organisation({Cell("text", core=3): _fake(_stages(trained), flat)})
    assert verdicts[0].verdict == verdict
    assert verdicts[1].verdict == UNTOLD
    assert len(table) == 1


@pytest.mark.parametrize(("nearest", "verdict"), [("plain", HOLDS), ("injected", FAILS), ("bare", FAILS)])
def test_the_best_match_is_the_nearest(nearest, verdict):
    reference = [1.0, 2.0, 3.0]
    cells = {
        "plain": Cell("text", core=3),
        "injected": Cell("text", "pre", "linear", 3),
        "bare": Cell("text", core=3, outer=0),
    }
    found = {
        cell: _fake(_stages([reference if name == nearest else [3.0, 5.0, 9.0]] * 2))
        for name, cell in cells.items()
    }
    found[Cell("text", core=3, recurrences=1)] = _fake(_stages(reference))
    table, verdicts = matches(found, 10)
    assert [v.verdict for v in verdicts] == [verdict]
    assert len(table) == 3


def test_a_best_match_that_depends_on_the_reference_cannot_be_told():
    near, far = [1.0, 2.0, 3.0], [3.0, 5.0, 9.0]
    found = {
        Cell("text", core=3): _fake(_stages([near] * 2)),
        Cell("text", "pre", "linear", 3): _fake(_stages([far] * 2)),
        Cell("text", core=3, outer=0): _fake(_stages([[9.0, 9.0, 9.0]] * 2)),
        Cell("text", core=3, recurrences=1): _fake(_stages(near)),
        Cell("text", core=3, recurrences=1, seed=1): _fake(_stages(far)),
    }
    assert matches(found, 10)[1][0].verdict == UNTOLD


def test_what_was_not_learnt_cannot_be_lost():
    nothing = dict.fromkeys((1, 4, 8, 32), (6.0, 0.03))
    table, verdicts = beyond_training({Cell("text"): _fake(said=nothing)})
    assert not table["learnt"].any()
    assert {v.verdict for v in verdicts} == {UNTOLD}


def test_without_a_reference_there_is_nothing_to_match():
    table, verdicts = matches({Cell("text", core=3): _fake(_stages([[1.0, 2.0, 3.0]] * 2))}, 10)
    assert table.empty and not verdicts


def test_accuracy_lasts_or_is_lost():
    lasting = {1: (1.0, 0.5), 4: (0.5, 0.8), 8: (0.4, 0.79), 32: (0.6, 0.79)}
    lost = {1: (1.0, 0.5), 4: (0.5, 0.8), 8: (0.9, 0.79), 32: (2.0, 0.3)}
    table, verdicts = beyond_training(
        {Cell("text", "pre", "linear"): _fake(said=lasting), Cell("text"): _fake(said=lost)}
    )
    assert [v.verdict for v in verdicts] == [HOLDS, HOLDS, HOLDS, FAILS]
    assert table["best"].tolist() == [8, 4]


def test_a_diverged_model_is_not_stable():
    table = summaries({Cell("text", "pre", "linear"): _fake()})
    assert table["diverged"].all() and table["cosine"].isna().all()
    assert stability(table, "trained")[0].verdict == FAILS


def test_settings_and_cells_are_written_as_json_can_say_them(folder, found):
    import json

    kept = json.loads((folder / CELLS[0].name / "settings.json").read_text())
    assert kept.items() >= asdict(CELLS[0]).items()
    assert kept["text_steps"] == SMALL.text_steps and "steps" not in kept
