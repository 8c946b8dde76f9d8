# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a trained CapsNet
#
# The net that comes with the library, on MNIST digits that it has never been trained on: what its
# class capsules say, what their poses mean, which parts of an image vote for which digit, and
# whether routing knows when it is wrong.

# %%
# %matplotlib inline
import torch
from safetensors.torch import load_file

import graphcaps as gc
from graphcaps.data import load_dataset
from graphcaps.nets.model import PRETRAINED
from graphcaps.pictures import figures, inspection
from graphcaps.training import as_input, evaluate

model = gc.CapsNet.from_pretrained("mnist-small")
digits = load_dataset("../tests/digits").test  # ten digits of each class, from the test set
mistakes = load_file(PRETRAINED / "mnist-small" / "mistakes.safetensors")
print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(digits.labels)} digits;")
print(f"{len(mistakes['labels'])} of the 10,000 test images are read wrongly")

# %% [markdown]
# ## Class capsules: a length is a claim
#
# The length of a class capsule says how sure the net is that its digit is there. Training pushes
# the capsule of the true class above 0.9, the others below 0.1.

# %%
score = evaluate(model, digits)
print(f"{score.errors} errors in {score.images} digits")
figures.class_lengths(score.lengths, score.labels)

# %% [markdown]
# ## Poses: the decoder draws the digit again
#
# The 16 numbers of the longest capsule are enough for the decoder to draw the image, style and
# all. The last three digits are ones that the net gets wrong: it draws what it believes.

# %%
images = as_input(digits.images, model)
wrong_images = as_input(mistakes["images"], model)
with torch.no_grad():
    output, trace = model(images, return_trace=True)
    wrong_output, wrong_trace = model(wrong_images, return_trace=True)

# %%
shown = [int((digits.labels == k).nonzero()[0]) for k in range(7)]
figures.reconstructions(
    torch.cat([images[shown], wrong_images[:3]]),
    torch.cat([output.reconstruction[shown], wrong_output.reconstruction[:3]]),
    torch.cat([digits.labels[shown], mistakes["labels"][:3]]),
    torch.cat([output.lengths[shown], wrong_output.lengths[:3]]).argmax(dim=1),
)

# %% [markdown]
# ## Tweaked poses: what each dimension means
#
# One number of the pose is moved at a time, by −0.25 to 0.25 (figure 4 of the paper). No label
# ever told the net about stroke width or slant; the dimensions found them.

# %%
three = int((digits.labels == 3).nonzero()[0])
drawn = inspection.tweak_pose(model, output.poses[three], parent=3)
figures.tweaked_poses(drawn, inspection.TWEAKS)

# %% [markdown]
# ## Routing: most children stay undecided, a few decide
#
# After three iterations the mean entropy is still close to $\ln 10$. Nearly all primary capsules
# are long, but most of their votes have stayed as short as training found them, so that their
# logits stay near zero and they couple to all classes alike. A few votes have grown long: these
# decide. Whoever says that a trained CapsNet routes its parts to wholes should look here first.

# %%
with torch.no_grad():
    u = model.primary(model.conv(images))
votes = trace.u_hat.norm(dim=-1)
print(f"length of the children: median {gc.length(u).median():.2f}, least {gc.length(u).min():.2f}")
print(f"length of the votes: median {votes.median():.2f}, largest {votes.max():.2f}")

# %%
figures.entropy_by_iteration(trace.entropy(), model.config.classes, digits.labels)

# %%
figures.coupling_histogram(trace.c, model.config.classes)

# %%
number = int((digits.labels == 7).nonzero()[0])
strongest = trace.strongest_children(number, iteration=2, count=20)
figures.coupling_graph(
    trace.networkx(number, iteration=2, children=strongest),
    title="A 7 at the last iteration: the 20 children that couple most, of 288",
)

# %% [markdown]
# ## Which parts vote for which digit
#
# For each position of the capsule maps: the coupling to a class × the length of the child, summed
# over the maps. Discs stand at the centres of the receptive fields; the frame is the receptive
# field of the strongest one. At the first iteration all classes get the same; at the last, some
# positions have turned to the true class, and away from others.

# %%
maps = [
    inspection.vote_map(u[number], trace.c[iteration, number], parent, model.config)
    for parent in (7, 3)
    for iteration in (0, 2)
]
titles = [f"for {parent}, iteration {iteration}" for parent in (7, 3) for iteration in (1, 3)]
figures.vote_maps(images[number], maps, titles)

# %% [markdown]
# ## Two digits, one upon the other
#
# The net was trained on single digits only. Laid over each other, two of them compete; the decoder
# can still be asked for either class by its label.

# %%
first, second = int((digits.labels == 0).nonzero()[0]), int((digits.labels == 1).nonzero()[0])
overlap = torch.maximum(images[first], images[second])[None]
with torch.no_grad():
    both = [model(overlap, torch.tensor([k])) for k in (0, 1)]
print({k: round(length, 2) for k, length in enumerate(both[0].lengths[0].tolist())})
figures.reconstructions(
    overlap.expand(2, -1, -1, -1),
    torch.cat([one.reconstruction for one in both]),
    torch.tensor([0, 1]),
    both[0].lengths.argmax(dim=1).expand(2),
)

# %% [markdown]
# It reads the 0 alone: the capsule of the 1 stays short, and what the decoder draws from it is no
# digit.

# %% [markdown]
# ## Does routing know when it is wrong?
#
# For right and for wrong answers: the entropy of the coupling at the last iteration, averaged over
# the children, each weighted by its length; and the lead of the longest class capsule over the
# next.

# %%
with torch.no_grad():
    wrong_u = model.primary(model.conv(wrong_images))
right = output.lengths.argmax(dim=1) == digits.labels
for name, kept, seen, poses, said in (
    ("right", right, trace, u, output),
    ("wrong", slice(None), wrong_trace, wrong_u, wrong_output),
):
    weight = gc.length(poses[kept])
    entropy = (seen.entropy()[-1][kept] * weight).sum(dim=1) / weight.sum(dim=1)
    longest, next_longest = said.lengths[kept].topk(2, dim=1).values.unbind(dim=1)
    print(
        f"{name} answers ({len(entropy)}): "
        f"entropy {entropy.mean():.4f} ± {entropy.std():.4f} nats, "
        f"lead {(longest - next_longest).mean():.2f} ± {(longest - next_longest).std():.2f}"
    )

# %% [markdown]
# Both tell right from wrong, on average: children are less decided where the net errs, and two
# class capsules are long at once. The differences in entropy are small, because most children
# never decide.
