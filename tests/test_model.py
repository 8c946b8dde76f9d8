import copy
import json
import pickle
import resource
from dataclasses import asdict

import numpy as np
import pytest
import torch
from routings import ENGINES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import graphcaps as gc


def tiny(engine="auto", **changes):
    sizes = dict(conv_channels=8, capsule_maps=2, decoder_hidden=(16, 16))
    return gc.CapsNet.from_preset("small", engine=engine, **(sizes | changes))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_papers_net_has_8215568_parameters_and_6_8_million_without_decoder():
    assert parameters(gc.CapsNet.from_preset("paper")) == 8_215_568
    without = gc.CapsNet.from_preset("paper", decoder_hidden=None)
    # Conv1 9·9·256 + 256, PrimaryCaps 9·9·256·256 + 256, DigitCaps 1152·10·8·16
    assert parameters(without) == 20_992 + 5_308_672 + 1_474_560


def test_the_papers_net_has_1152_children_and_10_parents():
    graph = gc.CapsNet.from_preset("paper").capsules.graph
    assert (graph.num_nodes("child"), graph.num_nodes("parent")) == (32 * 6 * 6, 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_gives_poses_lengths_and_reconstruction(engine):
    output = tiny(engine)(torch.rand(3, 1, 28, 28))
    assert output.poses.shape == (3, 10, 16)
    assert_close(output.lengths, output.poses.norm(dim=-1))
    assert output.lengths.lt(1).all()
    assert output.reconstruction.shape == (3, 1, 28, 28)
    assert output.reconstruction.ge(0).all()
    assert output.reconstruction.le(1).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_is_classified_alike_alone_and_in_a_batch(engine):
    model = tiny(engine).double()
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    together = model(images)
    for number in range(4):
        alone = model(images[number : number + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            assert_close(one[0], all_of_them[number])


def test_the_reconstruction_is_masked_by_the_label_in_training_and_by_the_longest_without():
    model = tiny()
    images = torch.rand(2, 1, 28, 28)
    output = model(images)
    longest = output.lengths.argmax(dim=1)
    others = (longest + 1) % 10
    for labels in (longest, others):
        drawn = torch.zeros_like(output.poses)
        drawn[[0, 1], labels] = output.poses[[0, 1], labels]
        expected = model.decoder.layers(drawn.flatten(1)).view(2, 1, 28, 28)
        assert_close(model(images, labels).reconstruction, expected)
    assert torch.equal(model(images, longest).reconstruction, output.reconstruction)
    assert not torch.equal(model(images, others).reconstruction, output.reconstruction)


def test_several_digits_are_drawn_from_several_capsules():
    model = tiny()
    images = torch.rand(1, 1, 28, 28)
    both = torch.zeros(1, 10)
    both[0, [2, 5]] = 1
    poses = model(images).poses * both.unsqueeze(-1)
    expected = model.decoder.layers(poses.flatten(1)).view(1, 1, 28, 28)
    assert_close(model(images, both).reconstruction, expected)


@pytest.mark.parametrize(
    ("labels_per_image", "shown"), [(2, [(2, 5), (0, 9)]), (0, [(), (3,), (1, 4, 8)])], ids=str
)
def test_a_net_of_several_classes_an_image_draws_each_by_itself(labels_per_image, shown):
    model = tiny(labels_per_image=labels_per_image)
    images = torch.rand(len(shown), 1, 28, 28)
    labels = torch.zeros(len(shown), 10, dtype=torch.long)
    for row, classes in enumerate(shown):
        labels[row, list(classes)] = 1
    output = model(images, labels)
    for row, classes in enumerate(shown):
        expected = torch.zeros(1, 28, 28)
        for k in classes:  # light where one of them is
            drawn = model.decoder(output.poses[[row]], torch.eye(10)[[k]])[0]
            expected = expected + drawn - expected * drawn
        assert_close(output.reconstruction[row], expected)


@pytest.mark.parametrize(
    ("channels", "size", "classes"), [(3, (32, 32), 5), (1, (17, 17), 2), (2, (40, 23), 11)]
)
def test_other_images_and_class_counts_work(channels, size, classes):
    model = tiny(image_channels=channels, image_size=size, classes=classes)
    output = model(torch.rand(2, channels, *size))
    assert output.lengths.shape == (2, classes)
    assert output.reconstruction.shape == (2, channels, *size)


def test_strides_and_padding_are_those_of_the_configuration():
    convolutions = (
        gc.Convolution(6, 5, stride=2, padding=2, batch_norm=True),
        gc.Convolution(4, 3),
    )
    model = tiny(
        image_size=(30, 41),
        convolutions=convolutions,
        primary_kernel=3,
        primary_stride=3,
        primary_padding=1,
    )
    images = torch.rand(2, 1, 30, 41)
    expected = torch.nn.functional.conv2d(images, model.conv[0].weight, None, 2, 2)
    expected = model.conv[2]((expected + model.conv[0].bias.view(-1, 1, 1)).relu())
    expected = torch.nn.functional.conv2d(expected, model.conv[3].weight, model.conv[3].bias).relu()
    assert_close(model.conv(images), expected)
    grouped = torch.nn.functional.conv2d(
        expected, model.primary.conv.weight, model.primary.conv.bias, 3, 1
    )
    assert grouped.shape == (2, 2 * 8, 5, 7)  # 30 → 15 → 13 → 5, 41 → 21 → 19 → 7
    assert model.config.grid_size() == (5, 7)
    capsule = grouped[1, 8:, 2, 4]
    assert_close(model.primary(expected)[1, (5 + 2) * 7 + 4], gc.squash(capsule))


class Halves(torch.nn.Module):
    """An encoder without parameters, which records whether it is in training mode."""

    def forward(self, images):
        self.trained = self.training
        return images.unflatten(1, (-1, 1)).flatten(1, 2)[..., ::2, ::2]


def test_an_encoder_of_ones_own_takes_the_place_of_the_convolutions():
    encoder = Halves()
    model = tiny(encoder=encoder, image_channels=3, image_size=(40, 48), kernel_size=5)
    assert not encoder.trained and encoder.training  # it was looked at in evaluation mode
    images = torch.rand(2, 3, 40, 48)
    assert model(images).reconstruction.shape == images.shape
    assert torch.equal(model.primary(images[..., ::2, ::2]), model.primary_capsules(images)[0])
    with pytest.raises(ValueError, match=r"gives feature maps \[batch, .*; got \[1, 12\] for one"):
        tiny(encoder=torch.nn.Flatten(), image_size=(3, 4), kernel_size=1)
    with pytest.raises(ValueError, match=r"feature maps of 4 × 14 are too small .* of 9 pixels"):
        tiny(encoder=encoder, image_size=(8, 28))


def test_images_file_and_classes_are_told_by_the_configuration(saved):
    net = gc.CapsNet.load(saved)
    assert net.config.names == tuple("0123456789") and net.config.image_kind == "digit"
    with pytest.raises(ValueError, match="expected names of 10 classes; got 2"):
        gc.CapsNetConfig(class_names=("cat", "dog"))


def test_a_net_for_other_classes_keeps_all_weights_that_belong_to_none(saved):
    before = gc.CapsNet.load(saved).state_dict()
    after = gc.CapsNet.load(saved, classes=10, class_names=tuple("abcdefghij"))
    kept = {name for name, w in after.state_dict().items() if torch.equal(w, before[name])}
    assert before.keys() - kept == {
        "capsules.weight",
        "decoder.layers.0.weight",
        "decoder.layers.0.bias",
    }
    assert after.config.class_names == tuple("abcdefghij")
    wider = gc.CapsNet.load(saved, image_size=(28, 32))
    kept = {n for n, w in wider.state_dict().items() if before[n].shape == w.shape}
    assert before.keys() - kept == {
        "capsules.weight",
        "decoder.layers.4.weight",
        "decoder.layers.4.bias",
    }
    assert all(torch.equal(wider.state_dict()[name], before[name]) for name in kept)
    assert gc.CapsNet.from_pretrained("mnist-small", classes=3).config.classes == 3


def test_images_too_small_for_the_convolutions_are_refused():
    with pytest.raises(ValueError, match="at least 17"):
        tiny(image_size=16)


def test_every_parameter_gets_a_gradient():
    model = tiny()
    images, labels = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    gc.capsnet_loss(model(images, labels), images, labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_net_learns_a_batch_by_heart():
    model = tiny()
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        gc.capsnet_loss(model(images, labels), images, labels).backward()
        optimizer.step()
    assert model(images).lengths.argmax(dim=1).eq(labels).all()


def test_a_net_survives_deepcopy_pickle_and_double():
    model = tiny()
    images = torch.rand(2, 1, 28, 28)
    expected = model(images).lengths
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images).lengths, expected)
    assert_close(model.double()(images.double()).lengths, expected.double())


def test_an_empty_batch_of_images_works():
    output = tiny()(torch.zeros(0, 1, 28, 28))
    assert output.lengths.shape == (0, 10)
    assert output.reconstruction.shape == (0, 1, 28, 28)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(1, 28, 28), r"\[batch, 1, 28, 28\]; got \[1, 28, 28\]"),
        (torch.zeros(2, 3, 28, 28), "expected images of shape"),
        (torch.zeros(2, 1, 32, 32), "expected images of shape"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "from 0 to 1"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.float64), "torch.float64 on cpu"),
        (torch.zeros(2, 1, 28, 28, device="meta"), "on meta"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, said):
    with pytest.raises(ValueError, match=said):
        tiny()(images)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="unknown preset 'large'; choose one of paper, small"):
        gc.CapsNet.from_preset("large")


def test_a_net_is_saved_and_loaded_by_a_name_in_text(tmp_path):
    model = tiny()
    model.save(str(tmp_path / "net"))
    again = gc.CapsNet.load(str(tmp_path / "net"))
    assert_close(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"decoder_hidden": None},
        {"decoder_hidden": (7, 5, 3), "classes": 4, "parent_dim": 6, "child_dim": 3},
        {"image_channels": 3, "image_size": 21, "kernel_size": 5, "capsule_maps": 3},
        {
            "image_size": (30, 40),
            "convolutions": (gc.Convolution(6, 5, 2, 2, batch_norm=True), gc.Convolution(4, 3)),
            "primary_kernel": 3,
            "primary_padding": 1,
        },
        {"routing": "em"},
        {"routing": "self_routing", "class_names": tuple("abcdefghij")},
    ],
)
def test_a_configuration_tells_the_shape_of_every_parameter(sizes):
    model = tiny(**({"decoder_hidden": (16, 16)} | sizes))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert model.config.parameter_shapes() == shapes


def replace_decoder(model):
    model.decoder = gc.CapsNet.from_preset("small", decoder_hidden=(5,)).decoder


def replace_capsules(model):
    graph = gc.complete_graph(model.capsules.graph.num_nodes("child"), 3)
    model.capsules = gc.CapsuleLayer(graph, 8, 16)


def turn_edges_round(model):
    child, parent = model.capsules.graph.edges()
    model.capsules = gc.CapsuleLayer(gc.routing_graph(child, 9 - parent), 8, 16)


def activate_otherwise(model):
    model.conv[1] = torch.nn.Tanh()


def put_an_encoder(model):
    model.conv = torch.nn.Sequential(*model.conv, torch.nn.Dropout())


def iterate_more(model):
    graph = model.capsules.graph
    model.capsules = gc.CapsuleLayer(graph, 8, 16, iterations=5)


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (replace_decoder, r"decoder.layers.0.bias expected \[16\], got \[5\]"),
        (replace_capsules, r"capsules.weight expected \[720, 8, 16\], got \[216, 8, 16\]"),
        (turn_edges_round, "not fully connected"),
        (iterate_more, r"the configuration has DynamicRouting\(iterations=3, g"),
        (lambda model: setattr(model, "decoder", None), "decoder.layers.0.bias"),
        (activate_otherwise, "for conv the configuration has"),
        (put_an_encoder, "for conv the configuration has"),
        (lambda model: model.conv[0].bias.data.fill_(torch.nan), "conv.0.bias holds numbers that"),
    ],
)
def test_a_net_with_a_swapped_layer_is_not_saved_as_another_one(tmp_path, swap, said):
    model = tiny()
    swap(model)
    with pytest.raises(ValueError, match=said):
        model.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": np.int64(10)}, "could not be read again"),
        ({"decoder_hidden": [16, 16]}, "model.json would say"),
        ({"kernel_size": 9.0}, "could not be read again: model.json: kernel_size"),
    ],
)
def test_a_configuration_that_could_not_be_read_again_is_not_saved(tmp_path, changes, said):
    model = tiny()
    for name, value in changes.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(ValueError, match=said):
        model.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float16, "not finite in torch.float16"),
        (torch.int8, "floating-point dtype; got torch.int8"),
    ],
)
def test_weights_that_a_dtype_cannot_hold_are_not_saved(tmp_path, dtype, said):
    model = tiny()
    model.conv[0].bias.data[0] = 1e6
    with pytest.raises(ValueError, match=said):
        model.save(tmp_path / "net", dtype)
    assert not (tmp_path / "net").exists()


def test_a_net_with_batch_normalisation_is_loaded_as_it_was_saved(tmp_path):
    model = tiny(convolutions=(gc.Convolution(6, 9, batch_norm=True),))
    images = torch.rand(4, 1, 28, 28)
    model(images)  # which moves the running means
    model.save(tmp_path / "net", torch.bfloat16)
    model.save(tmp_path / "net")
    again = gc.CapsNet.load(tmp_path / "net")
    assert torch.equal(again.eval()(images).lengths, model.eval()(images).lengths)


def test_a_swapped_layer_is_saved_with_a_configuration_that_tells_it(tmp_path):
    model = tiny()
    replace_capsules(model)
    model.decoder = None
    model.config = gc.CapsNetConfig(
        **(asdict(model.config) | {"classes": 3, "decoder_hidden": None})
    )
    model.save(tmp_path / "net")
    images = torch.rand(2, 1, 28, 28)
    assert_close(gc.CapsNet.load(tmp_path / "net")(images).lengths, model(images).lengths)


@pytest.fixture
def saved(tmp_path):
    tiny().save(tmp_path / "net")
    return tmp_path / "net"


def change_config(folder, **changes):
    content = json.loads((folder / "model.json").read_text())
    for name, value in changes.items():
        if value is ...:
            del content[name]
        else:
            content[name] = value
    (folder / "model.json").write_text(json.dumps(content))


def test_a_field_that_an_older_version_did_not_write_has_its_default(saved):
    change_config(saved, iterations=..., kernel_size=...)
    assert gc.CapsNet.load(saved).config == tiny().config


def test_a_field_of_a_newer_version_is_refused_by_its_name(saved):
    change_config(saved, temperature=2)
    with pytest.raises(ValueError, match=r"model\.json: temperature: unknown field"):
        gc.CapsNet.load(saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv_channels": 0}, "conv_channels must be at least 1; got 0"),
        ({"conv_channels": "8"}, "conv_channels: expected a valid integer, got '8'"),
        ({"conv_channels": 8.5}, "conv_channels: expected a valid integer, got 8.5"),
        ({"conv_channels": True}, "conv_channels: expected a valid integer, got True"),
        ({"kernel_size": 40}, "images of 28 pixels are too small"),
        ({"decoder_hidden": [16, -1]}, "decoder_hidden must be at least 1; got -1"),
        ({"decoder_hidden": 16}, "decoder_hidden: expected a valid array, got 16"),
        ({"routing": "magic"}, "unknown routing 'magic'; choose one of"),
        ({"iterations": 10**12}, "iterations must be at most 1000"),
    ],
)
def test_a_configuration_that_no_net_can_have_is_named(saved, changes, said):
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=rf"net/model\.json: {said}"):
        gc.CapsNet.load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_hidden": [20_000, 20_000]},
        {"classes": 10**9},
        {"capsule_maps": 10**30},
        {"image_size": 10**6},
    ],
)
def test_sizes_that_no_memory_holds_are_compared_with_the_file_first(saved, changes):
    gc.CapsNet.load(saved)  # what is loaded once and for all
    change_config(saved, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit model\.json"):
        gc.CapsNet.load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(saved, number):
    weights = load_file(saved / "model.safetensors")
    weights["capsules.weight"][3, 2, 1] = number
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: capsules.weight .* not finite"):
        gc.CapsNet.load(saved)


def test_weights_that_float32_cannot_hold_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    weights["conv.0.bias"] = weights["conv.0.bias"].double() + 1e300
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: conv.0.bias .* not finite"):
        gc.CapsNet.load(saved)


def test_weights_that_are_no_floats_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    weights["conv.0.weight"] = weights["conv.0.weight"].to(torch.int8)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"safetensors: expected conv.0.weight in torch.float32"):
        gc.CapsNet.load(saved)


def test_weights_in_half_precision_are_loaded(tmp_path):
    model = tiny()
    model.save(tmp_path / "net", torch.bfloat16)
    loaded = gc.CapsNet.load(tmp_path / "net")
    rounded = model.conv[0].weight.bfloat16().float()
    assert torch.equal(loaded.conv[0].weight, rounded)
