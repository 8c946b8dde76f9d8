"""Presets: published numbers of parameters, and nets of several layers of capsules."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import report
from graphcaps.data.datasets import load_dataset
from graphcaps.nets.model import PRESETS, CapsuleMaps
from graphcaps.pictures.inspection import dense_form, differences_from_dense
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.settings import RECIPES, Preset

DIGITS = Path(__file__).parent / "digits"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "coordinates")
HINTON = dict(image_channels=2, image_size=32, classes=5)  # smallNORB, as the paper counts


def learned(config):
    """Number of parameters, without building the net."""
    shapes = config.parameter_shapes().items()
    return sum(prod(shape) for name, shape in shapes if not name.endswith(BUFFERS))


def em_parameters(a, b, c, d, *, channels, classes):
    """Hinton et al. 2018, section 4, layer by layer: 4×4 matrices, two costs per type of parent."""
    conv = a * (5 * 5 * channels) + a
    primary = (b * 16 + b) * a + b * 16 + b  # poses and activations, by a 1×1 convolution
    first, second = (3 * 3 * i * j * 16 for i, j in ((b, c), (c, d)))
    return conv + primary + first + second + d * classes * 16 + 2 * (c + d + classes)


@pytest.mark.parametrize(
    ("preset", "changes", "exact", "published"),
    [
        ("paper", {}, 8_215_568, 8.2e6),
        ("small", {}, 2_117_072, None),
        # Mazzia et al. 2021, table 1
        ("efficient", {"decoder_hidden": None}, 161_824, 161e3),
        # the same, table 4, where images have the size for which one position remains
        ("efficient-multi", {"decoder_hidden": None, "image_size": 32}, 154_656, 154e3),
        # Hinton et al. 2018, section 5: 68K and 310K on smallNORB
        ("em-small", HINTON, em_parameters(64, 8, 16, 16, channels=2, classes=5), 68e3),
        ("em", HINTON, em_parameters(32, 32, 32, 32, channels=2, classes=5), 310e3),
        ("em-small", {}, em_parameters(64, 8, 16, 16, channels=1, classes=10), None),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(preset, changes, exact, published):
    count = learned(replace(PRESETS[preset], **changes))
    assert count == exact
    assert published is None or abs(count - published) < 0.03 * published


@pytest.mark.parametrize(("control", "of"), [("cnn", "small"), ("cnn-paper", "paper")])
def test_a_control_has_as_many_parameters_as_the_net_that_it_is_compared_with(control, of):
    ours, theirs = learned(PRESETS[control]), learned(PRESETS[of])
    assert abs(ours - theirs) < 0.005 * theirs
    for name, shape in PRESETS[of].parameter_shapes().items():
        if not name.startswith("capsules."):
            assert PRESETS[control].parameter_shapes()[name] == shape


def test_every_preset_has_a_recipe_and_can_be_asked_for():
    assert list(PRESETS) == list(RECIPES) == list(get_args(Preset))
    assert all(recipe.preset == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    "preset", ["efficient", "efficient-multi", "em-small", "deep", "photo", "cnn"]
)
def test_a_preset_is_loaded_as_it_was_saved_and_takes_images_of_any_size(preset, tmp_path):
    size = (61, 44) if preset == "photo" else (31, 40)
    model = gc.CapsNet.from_preset(preset, engine="scatter", image_size=size, classes=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert model.config.parameter_shapes() == shapes
    images = torch.rand(2, *model.config.image_shape)
    model.save(tmp_path)
    again = gc.CapsNet.load(tmp_path, engine="scatter")
    assert torch.equal(again.eval()(images).lengths, model.eval()(images).lengths)
    output = model.train()(images)
    gc.capsnet_loss(output, images, torch.tensor([0, 3]), kind=model.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_deep_net_learns_within_an_epoch():
    digits = load_dataset(str(DIGITS)).train
    model = gc.CapsNet.from_preset("deep", engine="scatter", decoder_hidden=None)
    assert len([m for m in model.modules() if isinstance(m, gc.CapsuleLayer)]) == 3
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for images, labels in zip(digits.images.split(14), digits.labels.split(14), strict=True):
        images = images / 255
        loss = gc.capsnet_loss(model(images, labels), images, labels, kind=model.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


MATRICES = dict(
    conv_channels=6,
    kernel_size=5,
    capsule_maps=2,
    child_dim=4,
    parent_dim=4,
    rows=2,
    routing="em",
    decoder_hidden=None,
    hidden=(CapsuleMaps(3, 3, stride=2), CapsuleMaps(2, 2)),
    shared=True,
    image_size=(20, 24),
    classes=3,
)


def test_poses_stay_of_a_size_through_layers_of_em():
    model = gc.CapsNet.from_preset("em-small", engine="scatter", image_size=20)
    poses, activations = model.primary(model.conv(torch.rand(4, 1, 20, 20)))
    before = poses.std()
    given = gc.Capsules(*(x.unflatten(1, (8, 8, 8)) for x in (poses, activations)))
    for layer in model.hidden:
        given = layer(given)
        assert 0.2 < given.poses.std() / before < 2
        before = given.poses.std()


def test_hidden_capsules_are_routed_layer_by_layer_with_activations():
    model = gc.CapsNet(gc.CapsNetConfig(**MATRICES), engine="scatter").double()
    images = torch.rand(2, 1, 20, 24, dtype=torch.float64)
    poses, activations = model.primary(model.conv(images))
    # 20 × 24 pixels → 16 × 20 → 6 × 8 → 2 × 3 → 1 × 2
    for layer, (maps, rows, columns) in zip(model.hidden, ((2, 6, 8), (3, 2, 3)), strict=True):
        grid = (
            poses.unflatten(1, (maps, rows, columns)),
            activations.unflatten(1, (maps, rows, columns)),
        )
        poses, activations = (x.flatten(1, 3) for x in layer(gc.Capsules(*grid)))
    assert model.config.grid_size() == (1, 2) and model.config.child_maps == 2
    given = model.primary_capsules(images)
    assert torch.equal(given[0], poses) and torch.equal(given[1], activations)
    expected_poses, _, expected_activations = dense_form(model.capsules)(*given)
    output = model(images)
    assert_close(output.poses, expected_poses)
    assert_close(output.lengths, expected_activations)


def test_shared_matrices_see_where_a_child_stands_by_its_coordinates():
    model = gc.CapsNet(gc.CapsNetConfig(**MATRICES), engine="scatter")
    layer = model.capsules
    assert layer.weight.shape[0] == 2 * 3  # maps times classes
    assert layer.coordinates.tolist() == [[0.5, 0.25], [0.5, 0.75]] * 2
    kinds = layer.graph.edata["weight_index"].view(2, 2, 3)  # map, position, class
    assert torch.equal(kinds[:, 0], kinds[:, 1])
    assert kinds[:, 0].flatten().tolist() == list(range(6))
    differences = differences_from_dense(layer, *model.primary_capsules(torch.rand(2, 1, 20, 24)))
    assert max(max(units.values()) for units in differences.values()) < 200


def test_depthwise_primary_capsules_see_one_channel_each():
    model = gc.CapsNet.from_preset("efficient", engine="scatter")
    features = torch.rand(1, 128, 9, 9, requires_grad=True)
    model.primary.conv(features)[0, 5].sum().backward()
    assert features.grad.flatten(2).any(dim=2).nonzero().tolist() == [[0, 5]]
    with pytest.raises(ValueError, match="a multiple of the encoder's 128 channels; got 120"):
        replace(PRESETS["efficient"], capsule_maps=15)


def test_a_control_is_a_plain_net_with_softmax_and_cross_entropy():
    model = gc.CapsNet.from_preset("cnn", conv_channels=4, capsule_maps=2)
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([1, 0, 9])
    features = model.primary.conv(model.conv(images))
    # as grouped: map, row, column, and then the channels of the map
    flat = features.unflatten(1, (2, 8)).permute(0, 1, 3, 4, 2).flatten(1).relu()
    between = (flat @ model.capsules.hidden.weight.T + model.capsules.hidden.bias).relu()
    logits = between @ model.capsules.classes.weight.T + model.capsules.classes.bias
    output = model(images, labels)
    assert_close(output.lengths, logits.softmax(dim=1))
    assert_close(output.poses, between.view(3, 10, 16))
    found = gc.capsnet_loss(output._replace(reconstruction=None), images, labels, kind=model.loss)
    assert_close(found, torch.nn.functional.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="no capsules whose routing could be traced"):
        model(images, return_trace=True)
    with pytest.raises(ValueError, match="it is a control"):
        report.collect(RunFolder(Path("nowhere")), model, load_dataset(str(DIGITS)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": (CapsuleMaps(2, 9),)}, "too small for the convolutions of this net"),
        ({"routing": None, "hidden": (CapsuleMaps(2, 3),)}, "without routing has no hidden"),
        ({"routing": None, "shared": True}, "without routing has no hidden"),
    ],
)
def test_layers_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        gc.CapsNet.from_preset("small", **changes)
