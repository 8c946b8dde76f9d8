"""The numbers behind the figures, compared with loops."""

import pytest
import torch
from reports import lively_model
from torch.testing import assert_close

import graphcaps as gc
from graphcaps.pictures.inspection import TWEAKS, differences_from_dense, tweak_pose, vote_map


@pytest.fixture
def net():
    return gc.CapsNet.from_preset("small", conv_channels=4, capsule_maps=2, classes=3).eval()


def test_a_vote_map_is_coupling_times_length_summed_over_the_maps(net):
    with torch.no_grad():
        images = torch.rand(2, 1, 28, 28)
        _, trace = net(images, return_trace=True)
        u = net.primary(net.conv(images))
    votes = vote_map(u[1], trace.c[2, 1], parent=2, config=net.config)
    for row in range(6):
        for column in range(6):
            children = [m * 36 + row * 6 + column for m in range(2)]
            expected = sum(
                float(trace.c[2, 1, i * 3 + 2]) * float(u[1, i].norm()) for i in children
            )
            assert float(votes.amount[row, column]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel_size": 5, "image_size": (20, 27)},
        {
            "convolutions": (gc.Convolution(6, 3, stride=2, padding=1), gc.Convolution(5, 3)),
            "primary_kernel": 4,
            "primary_stride": 3,
            "primary_padding": 2,
        },
    ],
)
def test_a_child_sees_the_pixels_of_its_receptive_field_and_no_others(changes):
    model = lively_model(**changes)
    config = model.config
    side, step, start = config.receptive_field(), config.field_stride(), config.field_start()
    (rows, columns), (_, height, width) = config.grid_size(), config.image_shape
    assert model.primary(model.conv(torch.rand(1, 1, height, width))).shape[1] == 3 * rows * columns
    for row, column in ((0, 0), (1, 3), (rows - 1, columns - 1)):
        image = torch.rand(1, 1, height, width, requires_grad=True)
        child = (2 * rows + row) * columns + column  # of the third map
        model.primary(model.conv(image))[0, child].sum().backward()
        for seen, place, size in zip(
            image.grad[0, 0].nonzero().T, (row, column), (height, width), strict=True
        ):
            first = start + step * place
            assert int(seen.min()) == max(0, first)
            assert int(seen.max()) == min(size, first + side) - 1


def test_votes_stand_at_the_centres_of_receptive_fields(net):
    votes = vote_map(torch.ones(72, 8), torch.ones(216), 0, net.config)
    row, column = (int(centre[6 * 1 + 4]) for centre in votes.centres())
    assert (row, column) == (2 * 1 + 8, 2 * 4 + 8)  # the middles of 17 pixels


def test_a_tweaked_pose_moves_one_dimension_of_one_capsule(net):
    poses = torch.randn(3, 16)
    drawn = tweak_pose(net, poses, parent=1)
    assert drawn.shape == (16, 11, 1, 28, 28)
    moved = poses.clone()
    moved[1, 7] += TWEAKS[2]
    mask = torch.tensor([[0.0, 1.0, 0.0]])
    assert_close(drawn[7, 2], net.decoder(moved[None], mask)[0])
    assert TWEAKS == (-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25)


def test_a_net_without_a_decoder_cannot_draw():
    net = gc.CapsNet.from_preset("small", conv_channels=4, capsule_maps=1, decoder_hidden=None)
    with pytest.raises(ValueError, match="expected a model with a decoder"):
        tweak_pose(net, torch.zeros(10, 16), 0)


def test_differences_from_dense_are_small_and_see_an_engine_that_errs(monkeypatch):
    layer = gc.CapsuleLayer(gc.complete_graph(12, 3), 4, 5)
    u = gc.squash(torch.randn(2, 12, 4))
    units = differences_from_dense(layer, u)
    assert {"dense", "udf", "builtin", "scatter", "fused"} <= set(units)
    assert all(0 <= unit < 32 for form in units.values() for unit in form.values())
    from graphcaps.passing import ENGINES

    right = ENGINES["scatter"].softmax_over_parents
    monkeypatch.setattr(
        ENGINES["scatter"],
        "softmax_over_parents",
        lambda self, b, leak=False: right(self, b, leak) * 1.0001,
    )
    assert differences_from_dense(layer, u)["scatter"]["poses"] > 100
    assert layer.engine == "auto"
    assert layer.weight.grad is None


@pytest.mark.parametrize("routing", gc.ROUTINGS)
def test_every_routing_is_compared_with_its_dense_form(routing):
    graph = gc.routing_graph([0, 1, 1, 3], [0, 1, 0, 2], weight_index=[1, 0, 2, 0])
    layer = gc.CapsuleLayer(graph, 4, 5, routing=routing)
    a = torch.rand(2, 4) if layer.routing.activations else None
    units = differences_from_dense(layer, torch.rand(2, 4, 4), a)
    assert set(units) == {"dense", "udf", "builtin", "scatter", "fused"}
    for form in units.values():
        assert all(0 <= unit <= 4 * units["dense"][name] + 64 for name, unit in form.items())


def test_layers_in_another_dtype_are_refused():
    layer = gc.CapsuleLayer(gc.complete_graph(2, 2), 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layer and poses in float32; got torch\.float64"):
        differences_from_dense(layer, torch.rand(2, 2, 4))
