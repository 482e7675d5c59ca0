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
# # One hop per iteration
#
# **A looped model that thinks one step per pass, and what happens when one of its thoughts is changed.**
#
# `loop-lens/hops` is a small looped transformer that comes with the package. Its prompts list the eight arrows of a random
# cycle in random order, name a start, and ask where one is after one hop, two hops, and so on. Nothing but the arrows
# is in the prompt, so the answer to the third question must be worked out from the answer to the second, and the model has
# two layers in its loop to do it with.

# %%
import matplotlib.pyplot as plt
import torch

import loop_lens
from loop_lens.data import HopsTask
from loop_lens.dynamics import convergence
from loop_lens.interventions import transplant

torch.set_grad_enabled(False)
model = loop_lens.boot("loop-lens/hops")
print(model.schedule)
print(f"{model.n_params:,} parameters")

prompt = "a b g a h e e c b h d g c f f d ? c -> -> -> -> -> ->"  # c -> f -> d -> g -> a -> b -> h
arrows = range(18, 24)
loop_lens.lens(model, prompt, kind="coda", positions=arrows).plot()

# %% [markdown]
# Each row is what the model would answer at the six arrows if the loop ended after that iteration (the *coda lens*). A
# front of right answers, *f d g a b h*, moves one arrow to the right with each iteration. This prompt was picked because its
# guesses ahead of the front are all wrong, which makes the front easy to see; here is the average over 512 prompts whose
# cycles never occurred in training, for eight arrows, two more than the model was ever trained on.

# %%
task = HopsTask()
batch = task.batch(512, level=8, generator=torch.Generator().manual_seed(1), split="test")
asked = (batch.labels[0] != -100).nonzero().flatten()
accuracy = []
for recurrences in range(1, 11):
    with model.at_recurrences(recurrences):
        said = model(batch.input_ids)[:, asked].argmax(-1)
    accuracy.append((said == batch.labels[:, asked]).float().mean(0))
accuracy = torch.stack(accuracy)  # [recurrences arrow]
for recurrences in (1, 2, 4, 8, 10):
    print(f"after {recurrences:>2} iterations:", " ".join(f"{x:.2f}" for x in accuracy[recurrences - 1]))
assert (accuracy.diagonal() > 0.85).all()  # hop t at iteration t ...
assert (accuracy.triu(1)[accuracy.triu(1) > 0] < 0.3).all()  # ... and not before
assert (accuracy[-1] > 0.99).all()

# %% [markdown]
# ## Change a thought
#
# After iteration 2 the second arrow knows its answer. We put there the state that it has in another question, one
# that starts at *h* instead of *c*, where the second hop lands on *c*. Every site of a looped model has a name that holds the iteration, so the
# patch goes to one iteration alone.

# %%
other = prompt.replace("? c", "? h")
_, donor = model.run_with_cache(other)
follows = ["c", "f", "d", "g", "a"]  # what the arrows from the second on should say if they believe the patch
ids = torch.tensor([model.to_single_token(word) for word in follows])


def belief(iterations):
    """How likely each arrow finds what follows from the patch, after each iteration [iteration arrow]."""
    with transplant(model, "state_out", source=2, to=iterations, cache=donor, positions=[arrows[1]]):
        read = loop_lens.lens(model, prompt, kind="coda", positions=arrows[1:], keep_logits=True)
    return read.logits[:, 0].softmax(-1)[:, torch.arange(5), ids]


once, held = belief(2), belief(range(2, 8))
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
pictures = {
    "512 prompts: right answers": accuracy[:8, :6],
    "patched once, after iteration 2": once,
    "patched from iteration 2 on": held,
}
for panel, (title, values) in zip(axes, pictures.items(), strict=True):
    first = 7 - values.shape[1]
    extent = (first - 0.5, 6.5, -0.5, 7.5)
    image = panel.imshow(values, origin="lower", cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="auto")
    panel.set(title=title, xlabel="arrow", xticks=range(first, 7))
axes[0].set_ylabel("iteration")
_ = figure.colorbar(image, ax=axes, label="accuracy; probability\nof what follows from the patch")


# %% [markdown]
# Left, the front. Middle: patched once, the foreign thought becomes a wave. The arrow after it believes the patch one
# iteration later, the next one iteration after that, while behind the wave the loop repairs itself: the second arrow looks up its own
# answer again, from the arrow before it, and everything follows. By the last iteration nothing is left of the patch. Right:
# held in place, it is never repaired, and the rest of the chain belongs to the other question.

# %%
wave = [float(once[t, t - 2]) for t in range(2, 7)]
print("the wave, iterations 2 to 6:", " ".join(f"{p:.2f}" for p in wave))
print("what is left after iteration 7: ", " ".join(f"{p:.2f}" for p in once[7]))
print("held, after iteration 7:        ", " ".join(f"{p:.2f}" for p in held[7]))
assert min(wave) > 0.5 and float(once[7].max()) < 0.1 and float(held[7].min()) > 0.9

# %% [markdown]
# ## A fixed point, and a model without one
#
# Repair suggests a fixed point: whatever the state, the injected prompt pulls it back. The size of each iteration's
# step says so too. The same task was learnt just as well by `loop-lens/hops-no-injection`, whose loop is given the
# prompt once, at the start, and never again.

# %%
plain = loop_lens.boot("loop-lens/hops-no-injection")
prompts = batch.input_ids[:64, :-2]  # six arrows
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for name, each in (("with injection", model), ("without", plain)):
    with each.at_recurrences(48):
        steps = convergence(each, prompts, patterns=False, progress=False).mean("relative_step")[:, -1]
    right = []
    for recurrences in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48):
        with each.at_recurrences(recurrences):
            said = each(prompts)[:, 18:].argmax(-1)
        right.append((recurrences, float((said == batch.labels[:64, 18:24]).float().mean())))
    axes[0].semilogy(range(1, 48), steps[1:], label=name)
    axes[1].plot(*zip(*right, strict=True), "o-", markersize=3, label=name)
    print(
        f"{name:>15}: step {steps[-1]:.1e}, accuracy {dict(right)[8]:.2f} at 8, {right[-1][1]:.2f} at 48 iterations"
    )
axes[0].set(xlabel="iteration", ylabel="step / norm of the state", title="movement of the state")
axes[1].set(xlabel="iterations", title="accuracy")
_ = axes[1].legend()


# %% [markdown]
# With injection the loop settles and may run as long as it likes. Without, it solves the task at the numbers of iterations that it was
# trained for and then wanders off: nothing tells it when to stop, and nothing calls it back.
#
# ## Where to go from here
#
# [Tutorial 1](01_a_loop_opened.ipynb) opens the loop of a real language model, [2](02_patching_across_iterations.ipynb) patches every
# iteration of it in one call, [3](03_lenses_per_iteration.ipynb) reads it with five lenses; [4](04_attention_across_iterations.ipynb) follows attention
# through the iterations, [5](05_fixed_points_and_stages.ipynb) measures fixed points and stages of inference, and
# [6](06_train_your_own_loops.ipynb) trains a model like this one.
