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
# This notebook examines the pretrained net of the library on MNIST's test digits: the lengths of
# its class capsules, the meaning of their poses, which parts of an image vote for which digit, and
# whether the coupling differs between right and wrong predictions.

# %%
# %matplotlib inline
import math

import torch
from torchvision.transforms.functional import rotate

import graphcaps as gc
from graphcaps.data import load_dataset
from graphcaps.demo import shipped_gallery
from graphcaps.pictures import figures, inspection
from graphcaps.training import as_input, evaluate

model = gc.CapsNet.from_pretrained("mnist-small")
digits = load_dataset("../tests/digits").test  # ten digits of each class, from the test set
shipped = shipped_gallery("mnist-small")
mistakes, true_classes = shipped.images[shipped.mistakes], shipped.labels[shipped.mistakes]
print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(digits.labels)} digits;")
print(f"{len(mistakes)} of the 10,000 test images are read wrongly")

# %% [markdown]
# ## Class capsules: the length is the confidence
#
# The length of a class capsule is the net's confidence that its digit is present. The training loss
# pushes the capsule of the true class above 0.9 and the others below 0.1.

# %%
score = evaluate(model, digits)
print(f"{score.errors} errors in {score.images} digits")
figures.class_lengths(score.lengths, score.labels)

# %% [markdown]
# ## Poses: the decoder reconstructs the digit
#
# From the 16 numbers of the longest capsule, the decoder reconstructs the image, including the
# style of the digit. The net misclassifies the last three digits; it reconstructs them as the
# predicted digit.

# %%
images = as_input(digits.images, model)
wrong_images = as_input(mistakes, model)
with torch.no_grad():
    output, trace = model(images, return_trace=True)
    wrong_output, wrong_trace = model(wrong_images, return_trace=True)

# %%
shown = [int((digits.labels == k).nonzero()[0]) for k in range(7)]
figures.reconstructions(
    torch.cat([images[shown], wrong_images[:3]]),
    torch.cat([output.reconstruction[shown], wrong_output.reconstruction[:3]]),
    torch.cat([digits.labels[shown], true_classes[:3]]),
    torch.cat([output.lengths[shown], wrong_output.lengths[:3]]).argmax(dim=1),
)

# %% [markdown]
# ## Tweaked poses: the meaning of each dimension
#
# One number of the pose at a time is changed by −0.25 to 0.25 (figure 4 of the paper). Dimensions
# of the pose have come to represent properties such as stroke width or slant, without labels for
# them.

# %%
three = int((digits.labels == 3).nonzero()[0])
drawn = inspection.tweak_pose(model, output.poses[three], parent=3)
figures.tweaked_poses(drawn, inspection.TWEAKS)

# %% [markdown]
# ## Routing: most children couple equally, a few do not
#
# After three iterations the mean entropy is still close to $\ln 10$. Nearly all primary capsules
# are long, but most of their votes are still as short as at initialisation, so that their logits
# stay near zero and they couple equally to all classes. Only a few votes have become long, and
# their children couple mostly to one class. This limits the common statement that a trained CapsNet
# routes parts to wholes.

# %%
with torch.no_grad():
    u = model.primary(model.conv(images))
votes = trace.u_hat.norm(dim=-1)
print(f"length of the children: median {gc.length(u).median():.2f}, least {gc.length(u).min():.2f}")
print(f"length of the votes: median {votes.median():.2f}, largest {votes.max():.2f}")

# %%
for number, entropy in enumerate(trace.entropy(), start=1):
    print(
        f"iteration {number}: mean entropy {entropy.mean():.3f} nats of {math.log(10):.3f}, "
        f"most decided child {entropy.min():.2f}"
    )

# %%
figures.coupling_histogram(trace.c, model.config.classes)

# %%
number = int((digits.labels == 7).nonzero()[0])
strongest = trace.strongest_children(number, iteration=2, count=20)
order = trace.children_by_parent(number, 2, children=strongest)
figures.coupling_graph(
    trace.networkx(number, iteration=2, children=order),
    title="A 7 at the last iteration: the 20 children that couple most, of 288",
)

# %% [markdown]
# ## Which parts vote for which digit
#
# The maps show, for each position of the capsule maps, the coupling to a class × the length of the
# child, summed over the maps. Discs are at the centres of the receptive fields; the frame is the
# receptive field of the strongest position. At the first iteration the maps of all classes are
# equal; at the last, the coupling at some positions has moved from other classes to the true one.

# %%
maps = [
    inspection.vote_map(u[number], trace.c[iteration, number], parent, model.config)
    for parent in (7, 3)
    for iteration in (0, 2)
]
titles = [f"for {parent}, iteration {iteration}" for parent in (7, 3) for iteration in (1, 3)]
figures.vote_maps(images[number], maps, titles)

# %% [markdown]
# ## Which children carry the digit
#
# The length of a class capsule is determined by the length of its weighted sum, $|s_j| = \sum_i
# c_{ij}\, \hat u_{j|i} \cdot s_j / |s_j|$, in which each child has one term, its contribution. Most
# children contribute almost nothing, and some have negative contributions (hollow discs).

# %%
contributions = trace.contributions()[:, number].unflatten(1, (-1, model.config.classes))
of_seven = contributions[-1, :, 7].sort(descending=True).values
print(f"|s| of the 7: {of_seven.sum():.2f}; of it, the 8 largest of {len(of_seven)} children carry")
print(f"{of_seven[:8].sum() / of_seven.sum():.0%}; against it vote {(of_seven < 0).sum()} children")
maps = [
    inspection.contribution_map(contributions[iteration].flatten(), parent, model.config)
    for parent in (7, 3)
    for iteration in (0, 2)
]
figures.vote_maps(images[number], maps, titles, label="contribution to |s|")

# %% [markdown]
# ## What does routing do? Errors by number of iterations
#
# The net was trained with three iterations. At test time the number can be chosen freely:

# %%
try:
    test = load_dataset("mnist", "../data").test
    said = "of the 10,000 test images"
except OSError as error:  # no network: the digits that come with the repository
    print(f"MNIST cannot be fetched ({type(error).__name__})")
    test, said = digits, f"of {len(digits.labels)} test images"
children = []
with torch.no_grad():
    for batch in test.images.split(500):
        children.append(model.primary(model.conv(as_input(batch, model))))
    for iterations in (1, 2, 3, 5, 10):
        model.capsules.routing.iterations = iterations
        lengths = [gc.length(model.capsules(u)) for u in children]
        errors = (torch.cat(lengths).argmax(dim=1) != test.labels).sum()
        print(f"{iterations:2} iterations: {errors:3} errors {said}")
model.capsules.routing.iterations = 3

# %% [markdown]
# One iteration is equal coupling, which means no routing at all. The net is nearly as accurate
# without routing; with more iterations than in training it makes more errors.

# %% [markdown]
# ## Is the pose equivariant?
#
# Capsules are meant to be *equivariant*: while a digit moves, the length of its capsule should stay
# constant and its pose should change smoothly. Here a 4 is shifted, then rotated. In training, the
# net saw shifts of up to two pixels, and no rotations except those in the handwriting itself.

# %%
four = int((digits.labels == 4).nonzero()[0])
shifts, angles = list(range(-6, 7)), list(range(-60, 61, 10))
shifted = torch.stack([images[four].roll(pixels, dims=2) for pixels in shifts])
rotated = torch.stack([rotate(images[four], -angle, fill=0.0) for angle in angles])
with torch.no_grad():
    of_shifted, of_rotated = (model(x, torch.full((len(x),), 4)) for x in (shifted, rotated))

# %%
figures.pose_by_change(
    shifted,
    of_shifted.reconstruction,
    of_shifted.poses[:, 4],
    of_shifted.lengths,
    changes=shifts,
    label="shift to the right (pixels)",
)

# %%
figures.pose_by_change(
    rotated,
    of_rotated.reconstruction,
    of_rotated.poses[:, 4],
    of_rotated.lengths,
    changes=angles,
    label="rotation (degrees, clockwise)",
)

# %% [markdown]
# Up to about four pixels to either side and twenty degrees of rotation the length hardly changes,
# while some dimensions of the pose change steadily. Beyond that, the capsule becomes short.

# %% [markdown]
# ## Two overlapping digits
#
# The net was trained on single digits only. With two overlapping digits, their capsules compete;
# the decoder can still reconstruct either class if given its label.

# %%
first, second = int((digits.labels == 0).nonzero()[0]), int((digits.labels == 1).nonzero()[0])
overlap = torch.maximum(images[first], images[second])[None]
with torch.no_grad():
    both = [model(overlap, torch.tensor([k])) for k in (0, 1)]
figures.drawn_capsules(
    overlap[0],
    torch.cat([one.reconstruction for one in both]),
    [float(both[0].lengths[0, k]) for k in (0, 1)],
    names=["0", "1"],
)

# %% [markdown]
# The net recognises only the 0: the capsule of the 1 is short, and the decoder's reconstruction
# from it is not a digit.

# %% [markdown]
# ## Does the coupling indicate errors?
#
# For right and for wrong predictions, the cell prints the entropy of the coupling at the last
# iteration, averaged over the children and weighted by their lengths, and the difference between
# the lengths of the longest class capsule and the next.

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
# On average, both differ between right and wrong predictions: if the net is wrong, the coupling has
# a higher entropy, and two class capsules are long. The differences in entropy are small, because
# most children couple almost equally in both cases.
