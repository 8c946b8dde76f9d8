"""The data and the HTML of the live demo; tests/test_demo_page.py uses it in a browser."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reports import HOSTILE, lively_model, random_data

import graphcaps as gc
from graphcaps import demo
from graphcaps.data.datasets import load_dataset
from graphcaps.nets.verdict import Verdict, judge, judge_images

DIGITS = Path(__file__).parent / "digits"
CLASSES = tuple("0123456789")
LARGEST = 7_000_000  # bytes of the page of the net that ships


def gallery(model, count=30):
    return demo.gallery_of(model, random_data(model, count))


def test_the_page_of_the_shipped_net_is_one_file_of_less_than_7_mb():
    model = gc.CapsNet.from_pretrained()
    page = demo.render(model, CLASSES, demo.shipped_gallery(), "mnist-small")
    assert 5_600_000 < len(page.encode()) < LARGEST  # 5.6 are the weights
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", page
    )
    assert set(re.findall(r"https?://[^\s\"'<]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_weights_are_packed_in_half_precision_under_their_names():
    model = lively_model()
    packed = demo.page_data(model, CLASSES, gallery(model))
    state = model.state_dict()
    net = packed["net"]
    texts = dict(net["weights"])
    for name, layer in {"conv.0": net["encoder"][0], "primary.conv": net["primary"]}.items():
        texts |= {f"{name}.{part}": layer[part] for part in ("weight", "bias")}
    for name, text in texts.items():
        there = np.frombuffer(base64.b64decode(text), "<f2")
        assert np.array_equal(there, state[name].half().flatten().numpy())
    assert len(texts) == 5
    assert packed["config"]["iterations"] == 3


@pytest.mark.parametrize("changes", [{}, {"image_channels": 3, "image_size": 20}])
def test_the_sheet_of_images_holds_each_as_it_is(changes):
    model = lively_model(**changes)
    images = gallery(model)
    packed = demo.page_data(model, CLASSES, images)["gallery"]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(packed["sheet"]))))
    size = model.config.image_size
    for n, image in enumerate(images.images):
        row, column = divmod(n, packed["columns"])
        tile = sheet[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert np.array_equal(tile.reshape(size, size, -1), image.permute(1, 2, 0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": (28, 32)}, "differs in image_size"),
        ({"hidden": (gc.CapsuleMaps(2, 3),), "shared": True}, "differs in hidden, shared"),
        ({"routing": None}, "this net has none"),
    ],
)
def test_nets_that_the_page_cannot_compute_are_refused_in_one_sentence(changes, told):
    model = gc.CapsNet(gc.CapsNetConfig(conv_channels=4, capsule_maps=2, **changes))
    with pytest.raises(ValueError, match=told) as error:
        demo.check_routed(model)
    assert "\n" not in str(error.value)


def test_a_gallery_has_the_first_images_and_the_mistakes_of_all(monkeypatch):
    monkeypatch.setattr(demo, "MISTAKES", 4)
    torch.manual_seed(0)
    model = lively_model()
    data = random_data(model, 60)
    predicted = model(data.test.images / 255).lengths.argmax(dim=1)
    wrong = [n for n in range(60) if predicted[n] != data.test.labels[n]]
    assert len(wrong) > 6
    found = demo.gallery_of(model, data, 10)
    expected = sorted({*range(10), *wrong[:4]})
    assert found.numbers.tolist() == expected
    assert [n for n, is_wrong in zip(expected, found.mistakes, strict=True) if is_wrong] == [
        n for n in wrong if n in expected
    ]
    assert torch.equal(found.images, data.test.images[expected])


def test_the_shipped_gallery_holds_what_the_card_calls_mistakes():
    found = demo.shipped_gallery()
    assert found.numbers[:1000].tolist() == list(range(1000))
    model = gc.CapsNet.from_pretrained()
    wrong = found.mistakes
    with torch.no_grad():
        read = model(found.images[wrong] / 255).lengths.argmax(dim=1)
    assert int(wrong.sum()) == 38
    assert int((read != found.labels[wrong]).sum()) >= 37  # one may stand at the edge


def test_a_net_with_a_routing_of_ones_own_is_refused_in_one_sentence(tmp_path, monkeypatch):
    class Mean(gc.Routing):
        def steps(self, edges):
            sums = edges.couple()
            yield gc.Iteration(sums, sums.S / sums.N)

    monkeypatch.setitem(gc.ROUTINGS, "mean", Mean)
    model = lively_model(routing="mean")
    with pytest.raises(
        ValueError, match=r"knows the routings dynamic, .*trained with mean:"
    ) as error:
        demo.write_demo(model, CLASSES, gallery(model), tmp_path / "demo.html", "net")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_every_routing_of_the_library_is_known_to_the_page():
    assert set(demo.ROUTED) == set(gc.ROUTINGS)


@pytest.mark.parametrize("routing", ["em", "attention", "self_routing"])
def test_the_page_offers_the_routing_of_the_net_and_the_two_that_fit_every_net(routing):
    page = demo.render(model := lively_model(routing=routing), CLASSES, gallery(model), "net")
    offered = re.findall(r'name="routing" value="(\w+)"', page)
    assert offered == [routing, "dynamic", "uniform"]


def test_names_of_classes_and_nets_are_text_in_the_page():
    model = lively_model()
    page = demo.render(model, (HOSTILE, *CLASSES[1:]), gallery(model), HOSTILE)
    assert HOSTILE not in page
    data = json.loads(re.search(r'id="net">(.*?)</script>', page)[1])
    assert data["classes"][0] == HOSTILE


def test_the_demo_needs_no_matplotlib():
    program = "import sys; sys.modules['matplotlib'] = None; import graphcaps.demo"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_two_long_capsules_are_two_digits_and_none_is_no_digit():
    lengths = torch.tensor([0.1, 0.6, 0.2, 0.9, 0.55])
    image = torch.rand(1, 4, 4)
    halves = {3: image * (torch.arange(4) < 2), 1: image * (torch.arange(4) >= 2)}

    def draw(classes):
        return torch.stack([halves[k] for k in classes])

    assert judge(lengths, image, draw) == Verdict((1, 3), 0.0)
    assert judge(lengths, image, None).classes == (1, 3)
    assert judge(lengths.clamp(max=0.49), image, None).classes == ()
    assert judge(lengths.clamp(max=0.58), image, None).classes == (1, 3)  # of equals, the first
    one = torch.tensor([0.1, 0.2, 0.2, 0.9, 0.4])
    lost = float((halves[1] ** 2).sum() / (image**2).sum())
    assert judge(one, image, draw).error == pytest.approx(lost, rel=1e-6)


def test_the_shipped_net_doubts_noise_and_nothing_but_hardly_a_digit():
    model = gc.CapsNet.from_pretrained()
    torch.manual_seed(0)
    noise = torch.rand(20, 1, 28, 28)
    digits = load_dataset(str(DIGITS)).test
    images = digits.images / 255
    with torch.no_grad():
        of_noise = judge_images(model, model(noise), noise)
        of_digits = judge_images(model, model(images), images)
    assert {verdict.classes for verdict in of_noise} == {()}
    right = [v.classes == (k,) for v, k in zip(of_digits, digits.labels.tolist(), strict=True)]
    assert sum(right) >= 97  # of 100
