import copy
import pickle

import pytest
import torch
from routings import ENGINES
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


@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 5), (1, 17, 2), (2, 40, 11)])
def test_other_images_and_class_counts_work(channels, size, classes):
    model = tiny(image_channels=channels, image_size=size, classes=classes)
    output = model(torch.rand(2, channels, size, size))
    assert output.lengths.shape == (2, classes)
    assert output.reconstruction.shape == (2, channels, size, size)


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
