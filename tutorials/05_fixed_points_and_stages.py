# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fixed points and stages
#
# **Where does a loop go when nobody stops it?**
#
# [arXiv 2604.11791](https://arxiv.org/abs/2604.11791) asked this of Huginn, Ouro and retrofitted Llamas. Its code is not public and its
# models are large. Here are its figures one by one, on models that run on a laptop: three that come with the package, learned the
# same task equally well and differ in the two things that the paper finds to matter, six small random ones, and SmolLM2.
#
# ## Every layer has a fixed point of its own
#
# `loop-lens/hops` was trained with eight iterations and gets the prompt injected into each. It runs 64 here. The
# distances are to the states after *128*, since a distance to the last state that is shown would be zero there, whatever the loop does.

# %%
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import loop_lens
from loop_lens import dynamics
from loop_lens.data import HopsTask
from loop_lens.experiments.random_init.models import RandomModel
from loop_lens.shipped.smollm2 import load_smollm2
from loop_lens.stages import stage_agreement, stages

torch.set_grad_enabled(False)
names = {"hops": "injection", "hops-no-injection": "no injection", "hops-ouro": "Ouro's norms"}
models = {label: loop_lens.boot(f"loop-lens/{name}") for name, label in names.items()}
batch = HopsTask().batch(16, level=6, generator=torch.Generator().manual_seed(1), split="test")
prompts, labels = batch.input_ids[:8], batch.labels[:8]

settled = {}
for label, model in models.items():
    with model.at_recurrences(64):
        settled[label] = dynamics.convergence(model, prompts, reference=128, progress=False)

found = settled["injection"]
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for layer in range(2):
    axes.semilogy(found.mean("distance")[:, layer], color=f"C{layer}", label=f"state, layer {layer}")
    axes.semilogy(
        found.mean("pattern_distance")[:, layer], "--", color=f"C{layer}", label=f"attention, layer {layer}"
    )
axes.semilogy(found.mean("floor")[:, 0], ":", color="gray", label="rounding of a state")
axes.set(xlabel="iteration", ylabel="distance to iteration 127")
_ = axes.legend(fontsize=7)

# %% [markdown]
# Both layers arrive, up to the rounding of float32, and their attention with them. At the same place? The paper's Proposition 4.1 says
# that if one layer's output stops changing, all do, and that their points are then either one, or a cycle that is walked again in every
# iteration.


# %%
def last(label, metric, layer=-1, iteration=-1):
    """A metric's mean late in a run."""
    return float(settled[label].mean(metric)[iteration, layer])


apart, left = last("injection", "degeneracy_distance", 0), last("injection", "distance", 0)
print(f"norm of the state {last('injection', 'norm'):.2f}")
print(f"from layer 0 to the farthest layer's fixed point {apart:.2f}")
print(f"from layer 0 to its own fixed point {left:.0e}")
print(f"change of an attention pattern per iteration {last('injection', 'pattern_step'):.0e}")
assert apart > 2 and left < 1e-4 and last("injection", "pattern_step") < 1e-4

# %% [markdown]
# A cycle of two points, far apart. The loop has not stopped working: one layer undoes what the other does, in every iteration.
#
# ## Injection, none, and Ouro's norm after every iteration

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
metrics = {"step": "size of a step", "norm": "norm of the state", "cosine": "cosine to the state at 128"}
for panel, (metric, title) in zip(axes, metrics.items(), strict=True):
    for label, found in settled.items():
        panel.plot(range(64), found.mean(metric)[:, -1], label=label)
    panel.set(title=title, xlabel="iteration")
axes[0].set_yscale("log")
axes[1].set_yscale("log")
_ = axes[2].legend()

# %%
print(f"{'iteration':<22}{'15':>8}{'31':>8}{'63':>8}")
for label in models:
    for metric in ("step", "relative_step", "norm", "cosine"):
        values = [last(label, metric, iteration=t) for t in (15, 31, 63)]
        print(f"{label:<13}{metric.split('_')[0]:<9}" + "".join(f"{v:8.2g}" for v in values))
walk = "no injection"
assert last(walk, "step") > 0.9 * last(walk, "step", iteration=15)
assert 0.4 < last(walk, "relative_step") / last(walk, "relative_step", iteration=31) < 0.6
assert last(walk, "cosine") > 0.9 and last(walk, "relative_distance") > 0.5
assert last("Ouro's norms", "step") > 0.1 and last("Ouro's norms", "cosine") < 0.95

# %% [markdown]
# Without injection the step does not shrink at all. The state walks away in a straight line, and because it grows,
# the same step is half as large *relative to the state* when the number of iterations has doubled, and the cosine goes to one. By
# relative steps or cosines this loop converges, slowly. By distances it does not: at 64 it is as far from where it will be at 128 as it
# is from zero. Ouro's norm forbids that walk. There the state keeps its length and keeps turning, slower and slower.
#
# The paper reports the same three cases of *random* models, before any training: with injection a stable fixed point (but not with Ouro's
# norms), without it only pre-norm is stable, and "degenerate", all layers at one point. Four layers are enough:

# %%
shapes = {"pre": "pre-norm", "huginn": "Huginn's norm", "ouro": "Ouro's norms"}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
print(f"{'':<28}{'cosine':>7}{'distance':>10}{'apart':>8}{'norm':>6}")
ends = {}
for k, (norm, shape) in enumerate(shapes.items()):
    for injection in (True, False):
        small = RandomModel(norm, injection, layers=4, width=64).open(64)
        words = torch.arange(16)[None] * 7
        found = dynamics.convergence(small, words, reference=96, patterns=False, progress=False)
        cosine, distance, norms = (
            found.mean(metric)[:, -1] for metric in ("cosine", "relative_distance", "norm")
        )
        apart = found.mean("degeneracy_distance")[-1, 0] / found.mean("distance")[-1, 0]
        label = f"{shape}, {'injection' if injection else 'none'}"
        ends[norm, injection] = [float(v) for v in (cosine[-1], distance[-1], apart)]
        print(f"{label:<28}{cosine[-1]:7.3f}{distance[-1]:10.0e}{apart:8.0e}{norms[-1]:6.0f}")
        style = {"color": f"C{k}", "linestyle": "-" if injection else "--", "label": label}
        axes[0].plot(range(64), cosine, **style)
        axes[1].semilogy(range(64), distance, **style)
axes[0].set(xlabel="iteration", title="cosine to the state at 96")
axes[1].set(xlabel="iteration", title="distance / norm")
_ = figure.legend(handles=axes[0].get_lines(), fontsize=7, loc="outside right center")
stable = {key for key, (cosine, _, _) in ends.items() if cosine > 0.9}
assert stable == {("pre", True), ("huginn", True), ("pre", False)}  # as in the paper
assert ends["pre", True][1] < 1e-4 and ends["pre", False][1] > 0.2  # a point, and a walk
assert ends["pre", True][2] > 50 and ends["pre", False][2] < 2

# %% [markdown]
# The paper's verdicts hold, and again the cosine is kind to pre-norm without injection. *Apart* is how far layer 0 is from the farthest
# layer's end, in units of how far it is from its own: with injection and pre-norm the layers end at different points; on the walk they are not
# farther apart than they have yet to go, which in cosines looks like one point. Huginn's norm settles as well, but
# slowly, far from rounding after 64 iterations. (One draw each. `python -m loop_lens.experiments random-init` runs the paper's whole
# grid, and finds draws in which some tokens never settle under Huginn's norm.)
#
# ## Token by token
#
# Algorithm 1 of the paper sorts each token's series of cosines to its final state: *fixed point* if 90% of them are above 0.95, else
# *orbit* if a frequency stands out, else *slider* if they rise. The same may be asked of distances.

# %%
print(f"{'% of tokens, 128 iterations':<38}{'fixed':>7}{'orbit':>7}{'slider':>8}{'unknown':>9}")
share, late = {}, None
for label, model in models.items():
    with model.at_recurrences(128):
        for of in ("cosine", "norm"):
            table = dynamics.limit_table(model, prompts, n=(32, 128), of=of, progress=False)
            share[label, of] = table.percent[-1, 0, 0, -1].tolist()  # of the state that leaves an iteration
            print(
                f"{label:<16}by {of:<19}" + "".join(f"{v:8.1f}" for v in share[label, of]),
            )
            if late is None:
                late = table.moving_tokens()  # at the first n, 32
assert share["injection", "cosine"][0] == share["injection", "norm"][0] == 100
assert share[walk, "cosine"][0] > 40 and share[walk, "norm"][0] < 5
assert share["Ouro's norms", "cosine"][2] > 60

late = late[late.layer.isna()]
print(
    "\nwith injection, not yet fixed at 32 iterations, by position:", late.position.value_counts().to_dict()
)
assert len(late) and late.position.min() >= 18

# %% [markdown]
# With injection every token ends at a fixed point. After only 32 iterations a few do not pass, because they spent more than a tenth of
# that time on the way: all of them arrows (positions 18 to 23), mostly late ones, whose answers come last. Without injection most tokens are
# fixed points by cosine and practically none by distance. Ouro's are mostly sliders, and some turn often enough to be called orbits.
#
# ## What the way looks like
#
# Principal components of the last arrow's states in one prompt, in both layers, fitted to all iterations. Colours are the quarters of 32
# iterations.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for panel, (label, model) in zip(axes, models.items(), strict=True):
    with model.at_recurrences(32):
        way = dynamics.trajectories(model, prompts[:1], progress=False)
    explained = float(way.explained[0, :2].sum())
    for layer, marker in enumerate("o^"):
        points = way.coordinates[0, :, layer]
        panel.plot(points[:, 0], points[:, 1], color="0.8", linewidth=0.7, zorder=0)
        shown = panel.scatter(points[:, 0], points[:, 1], c=way.quartile, marker=marker, s=16, cmap="viridis")
    panel.set_aspect("equal", adjustable="datalim")
    panel.set(title=f"{label} ({100 * explained:.0f}% of variance)", xlabel="pc1", ylabel="pc2")
    first, rest = (
        way.coordinates[0, at, -1].diff(dim=0).norm(dim=-1).sum() for at in (slice(0, 9), slice(8, 32))
    )
    print(f"{label:<13} length of the way in the first quarter {first:.1f}, after it {rest:.1f}")
    if label == "injection":
        assert rest < 0.02 * first
    else:
        assert rest > 0.1 * first
_ = figure.colorbar(shown, ax=axes, label="quarter", ticks=range(1, 5))

# %% [markdown]
# Circles are layer 0, triangles layer 1. Left: six hops' worth of wandering, then two points, one a layer. Middle: a line. Right: a jump
# when the answer is found, and then a creep that is not over.
#
# ## Does an iteration contract?
#
# Near a fixed point, steps should shrink by the *spectral radius* of an iteration's Jacobian each time. It is
# found from Jacobian-vector products, without looking at any step. The steps are measured without any Jacobian. Six prompts:

# %%
model = models["injection"]
observed, radii = [], []
with model.at_recurrences(48):
    for prompt in prompts[:6]:
        found = dynamics.convergence(model, prompt[None], patterns=False, progress=False)
        steps = found.mean("matrix_step")[:, -1]
        floor = float(found.mean("floor")[-1, -1]) * len(prompt) ** 0.5
        end = int((steps[1:] > 10 * floor).sum())  # the last step well above rounding
        observed.append(float((steps[end] / steps[end - 6]) ** (1 / 6)))
        radii.append(float(dynamics.spectral_radius(model, prompt, iteration=40)))
    spectrum = dynamics.jacobian_spectrum(model, prompts[:1], iterations=[40], steps=20)
    stretch = float(spectrum.singular_value)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
axes[0].plot([0, 1], [0, 1], color="0.8")
axes[0].plot(radii, observed, "o")
axes[0].set(
    xlabel="spectral radius at iteration 40",
    ylabel="step / step before",
    title="with injection, one dot a prompt",
)
axes[0].set(xlim=(0.3, 0.8), ylim=(0.3, 0.8))
for label, each in models.items():
    with each.at_recurrences(16):
        local = dynamics.step_geometry(each, prompts, progress=False)
    axes[1].plot(range(16), local.mean("step_angle")[:, -1], label=label)
    angle, straight = (float(local.mean(metric)[-1, -1]) for metric in ("step_angle", "drift_to_loop"))
    print(f"{label:<13} angle between steps {angle:.2f}, displacement / length of the way {straight:.2f}")
    if label == walk:
        assert angle < 0.05 and straight > 0.85
axes[1].set(xlabel="iteration", ylabel="radians", title="angle between successive steps")
axes[1].legend(fontsize=7)
print("spectral radius:  ", " ".join(f"{x:.2f}" for x in radii))
print("observed ratio:   ", " ".join(f"{x:.2f}" for x in observed))
print(f"largest stretch of one iteration, first prompt: {stretch:.2f}")
assert max(radii) < 1 and stretch > 1
assert all(abs(a - b) < 0.12 for a, b in zip(radii, observed, strict=True))

# %% [markdown]
# They agree, also for the two prompts that settle more slowly. A single iteration may well *stretch* a difference (the largest singular
# value is above one); it is in the long run that it shrinks. On the right, how a loop moves: with injection each step turns back on the one
# before, by more than a right angle, and without it steps go straight on. Where there is no fixed point, nothing contracts:

# %%
for label, each in models.items():
    with each.at_recurrences(48):
        radius = float(dynamics.spectral_radius(each, prompts[:1], iteration=40))
    print(f"{label:<13} spectral radius {radius:.2f}")
    assert (radius < 1) == (label == "injection")

# %% [markdown]
# ## Does it matter where the loop starts?
#
# If iterations contract to one point, the way there should not matter: other noise, or even the state in which *another prompt* ended.

# %%
paths = {}
for label, each in models.items():
    with each.at_recurrences(40):
        paths[label] = dynamics.path_independence(
            each, prompts[:4], starts=2 if label == "injection" else None, others=prompts[4:6], progress=False
        )
    print(f"{label:<13} cosine of where two starts lead: {paths[label].alignment:.3f}")
assert paths["injection"].worst > 0.999
assert paths[walk].alignment < 0.6 and paths["Ouro's norms"].alignment < 0.95
gathered = paths["Ouro's norms"].pairs.mean("cosine")[:, :2]  # its own end and another prompt's
assert gathered[-1].min() > gathered[0].max() + 0.2

# %% [markdown]
# With injection all meet. The other two get the prompt through the start alone: another start is another prompt, and
# they should not meet. Under Ouro's norms they come much nearer to each other all the same, as if the prompt were being forgotten.
#
# ## And what does it say?
#
# The paper has no accuracy against iterations. Here it is: what the answer is worth after R of them.

# %%
counts = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
said = {}
for label, each in models.items():
    found = dynamics.extrapolate(each, prompts, labels=labels, recurrences=counts, progress=False)
    said[label] = dict(zip(counts, found.mean("accuracy").tolist(), strict=True))
    for panel, metric in zip(axes, ("accuracy", "kl"), strict=True):
        panel.plot(counts, found.mean(metric).clamp_min(1e-7), "o-", markersize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.axvline(8, color="0.8", zorder=0)
        panel.set(xlabel="iterations", title={"kl": "KL to what it says after 8, nats"}.get(metric, metric))
    print(f"{label:<13}", ", ".join(f"{said[label][r]:.2f} at {r}" for r in (4, 8, 12, 32, 128)))
axes[1].set_yscale("log")
axes[0].legend(fontsize=7)
assert min(each[8] for each in said.values()) > 0.95 and min(each[12] for each in said.values()) > 0.95
assert said["injection"][128] == 1 and said[walk][128] < 0.7 and said["Ouro's norms"][128] < 0.5

# %% [markdown]
# At eight iterations the three cannot be told apart, and half as many again harm none. Then the two without a fixed point lose the answer,
# the walker more slowly than the one that turns.
#
# ## Stages of inference
#
# The paper's other half: feed-forward models mix early, gather attention on the first token in the middle, and undo that at the end.
# Does a loop repeat this in every pass, or spread it over all? The measures are the concentration of attention, the share of heads whose
# sink is the first token, the entropy of attention rows, and that of the residual stream's singular values. We ask SmolLM2-135M with layers
# 10 to 19 run three times, and the same model unlooped (dashed), on six snippets of text.

# %%
net, tokenizer = load_smollm2(attn_implementation="eager")
bare = copy.deepcopy(net)
plain = build_bridge_from_module(bare, type(bare).__name__, hf_config=bare.config, tokenizer=tokenizer)
looped = loop_lens.loopify(net, layers=range(10, 20), times=3, tokenizer=tokenizer)
looped.cfg.default_prepend_bos = False

pages = Path("pages.txt").read_text()
snippets = [looped.to_tokens(pages[i : i + 500])[0, :48] for i in range(0, 5400, 900)]
reference = stages(plain, snippets, progress=False)
measured = stages(looped, snippets, progress=False)

figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for panel, metric in zip(axes, ("colsum_concentration", "mixing_score", "matrix_entropy"), strict=True):
    for curve in measured.curves(metric, by="recurrence"):
        t = curve.recurrence
        colour = "0.6" if t is None else plt.get_cmap("viridis")(0.42 * t)
        panel.plot(curve.at, curve.mean, color=colour, label=None if t is None else curve.label)
    (whole,) = reference.curves(metric, by="recurrence")
    panel.plot(whole.at, whole.mean, "--", color="black", linewidth=1, label="unlooped")
    panel.set(xlabel="% of depth", title=metric)
_ = axes[0].legend(fontsize=7)

# %%
agreement = stage_agreement(
    measured, reference, metrics=("colsum_concentration", "sink_rate", "mixing_score", "matrix_entropy")
)
for metric, row in zip(agreement.metrics, agreement.correlation, strict=True):
    print(f"{metric:<14} correlation with the same layers unlooped: " + " ".join(f"{x:5.2f}" for x in row))
first = measured.mean("first_norm")
print(f"norm of the first token: {first[10]:.0f} after loop layer 0, {first[11]:.0f} after loop layer 1,")
print(
    f"  {first[20]:.0f} and {first[21]:.0f} in the second pass, {first[30]:.0f} and {first[31]:.0f} in the third"
)
assert (agreement.correlation[:3, 1:] > 0.8).all() and (agreement.correlation[3, 1:] < 0.2).all()
assert float(agreement.rmse[:, 0].max()) < 1e-3
assert first[11] > 100 * first[10] and abs(first[21] / first[20] - 1) < 0.05

# %% [markdown]
# The first pass *is* the unlooped model, which checks the measurement. In the next passes attention goes through the same stages again, layer by
# layer, though nobody trained this loop. The stream does not: in the loop its entropy falls once, in the second layer of the first pass, and stays down. That
# layer's MLP writes a *massive activation* on the first token, more than a hundred times as long as what was there, and what is
# in the stream already need not be written twice.
#
# In the retrofitted Llama, stages went away when the paper set the output of such an MLP to zero (its figure 41). Whatever hooks are in place while
# a measurement runs are measured too:

# %%
writes = looped.names("mlp_out", layer=1, segment="loop")
zeroed = {}
for what, where in (("in every pass", writes), ("in the first pass", writes[:1])):
    with looped.hooks(fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value)) for name in where]):
        zeroed[what] = stages(looped, snippets, progress=False)
print("share of heads with a sink, loop layers 3 to 9, pass by pass")
after = {}
for what, found in {"nowhere": measured, **zeroed}.items():
    rate, norm = found.mean("sink_rate")[10:40].unflatten(0, (3, 10)), found.mean("first_norm")[10:40]
    after[what] = rate[:, 3:].mean(1)
    largest = norm.unflatten(0, (3, 10)).amax(1)
    print(
        f"zeroed {what:<18}"
        + " ".join(f"{x:.2f}" for x in after[what])
        + "   largest norm of the first token "
        + " ".join(f"{x:.0f}" for x in largest)
    )
assert after["nowhere"].min() > 0.7 and after["in every pass"].max() < 0.4
assert after["in the first pass"][0] < 0.3 and after["in the first pass"][1] > 0.7

# %% [markdown]
# Zeroed in every pass, sinks are gone, and the stages with them. Zeroed in the first pass alone, the second writes
# a massive activation of its own, a tenth as large, which is enough: the sinks are back. An ordinary model has no second pass to repair
# its first.
#
# ## What you saw
#
# - With injection, each layer reaches a fixed point of its own, from anywhere, at the speed that the Jacobian predicts, and answers stay.
# - Without it, cosines and relative steps settle while the state walks on; measure distances, to a reference beyond what you plot.
# - Ouro's norm turns the walk into a slow turn. Neither keeps its answers far beyond the trained number of iterations.
# - A looped SmolLM2 repeats its attention's stages in every pass, around one massive activation that is written once.
