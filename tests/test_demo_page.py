"""The live demo in a real browser, used with mouse and keyboard."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from browser import Page, find_chromium
from reports import lively_model, random_data

import graphcaps as gc
from graphcaps import demo
from graphcaps.nets.verdict import judge
from graphcaps.routing import Trace

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no chromium on PATH: the demo's page is not looked at"
)

CLOSE = 1e-3  # of the page's numbers to torch's
ROUTINGS_A_SECOND = 30
CLASSES = tuple("0123456789")
FOUR = (
    [(170, 40), (140, 80), (105, 120), (75, 160), (70, 168), (110, 166), (160, 164), (220, 160)],
    [(172, 100), (170, 150), (168, 200), (166, 245)],
)


@pytest.fixture(scope="module")
def browser():
    page = Page(find_chromium())
    yield page
    page.close()


class Demo:
    """A demo in the browser, with the net and the images that it was made from."""

    def __init__(self, browser, path, model, classes=CLASSES, gallery=None):
        self.model = model
        torch.manual_seed(0)
        self.gallery = gallery or demo.gallery_of(model, random_data(model, 30))
        self.path = path
        demo.write_demo(model, classes, self.gallery, path, "net")
        self.browser, self.press, self.run = browser, browser.press, browser.run

    def open(self, hash="", **size):
        self.browser.open(self.path, hash=hash, **size)
        self.run(
            "new Promise(done => { const look = () => 'ready' in document.documentElement.dataset"
            " ? done() : setTimeout(look, 10); look() })"
        )
        return self

    def frame(self):
        """Wait until the page is drawn again."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def focus(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def click(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        self.frame()

    def text(self, name):
        return self.run(f"document.getElementById('{name}').textContent")

    def drag(self, points):
        """Drag on the sheet, in its coordinates."""
        left, top, width = self.run(
            "(() => { const box = document.getElementById('sheet').getBoundingClientRect();"
            " return [box.left, box.top, box.width] })()"
        )
        self.browser.drag([(left + x * width / 280, top + y * width / 280) for x, y in points])
        self.frame()

    def draw(self, strokes=FOUR):
        for stroke in strokes:
            self.drag(stroke)

    def image(self):
        """The input of the net, [1, C, H, W]."""
        config = self.model.config
        pixels = self.run("Array.from(graphcaps.state.seen.pixels)")
        size = config.image_size
        return torch.tensor(pixels).view(1, config.image_channels, size, size)

    def numbers(self, expression):
        return torch.tensor(self.run(f"Array.from({expression})"))

    def ink(self, name):
        """The pixels of a canvas, 0 to 1."""
        size = self.model.config.image_size
        values = self.run(
            f"Array.from(document.getElementById('{name}').getContext('2d')"
            f".getImageData(0, 0, {size}, {size}).data)"
        )
        return torch.tensor(values).view(size, size, 4)[..., 3] / 255

    def check(self, routing=None):
        """Compare lengths, coupling, shares and reconstruction of every iteration with torch's."""
        config = dataclasses.replace(self.model.config, iterations=10)
        model = gc.CapsNet(config, engine="scatter").eval()
        model.load_state_dict(in_the_page(self.model))
        model = model.double()  # float32 has too few digits for logits in the thousands
        own = routing in (None, config.routing)
        with torch.no_grad():
            children = model.primary_capsules(self.image().double())
            _, trace = model.capsules(*children, return_trace=True)
            if not own:
                trace = routed_by(routing, trace)
            lengths = model.confidence(trace.v, trace.a) if own else trace.a
        classes = config.classes
        parent = int(lengths[min(2, len(lengths) - 1), 0].argmax())
        self.run("graphcaps.explorer.chooseIteration(2)")
        for r in range(10):
            t = min(r, len(trace.c) - 1)  # of a routing without iterations there is one
            here = f"graphcaps.explorer.look.rounds[{r}]"
            v, c = trace.v[t, 0], trace.c[t, 0]
            assert close(self.numbers(f"{here}.lengths"), lengths[t, 0])
            assert close(self.numbers(f"{here}.c"), c)
            found = self.numbers(f"{here}.v").view(classes, -1)
            assert close(found, v, atol=CLOSE * max(1, float(v.norm(dim=1).max())))
            found = self.numbers(f"{here}.amounts({parent})")
            amounts, total = amounts_of(model, trace, children, t, parent, own)
            assert close(found, amounts, atol=CLOSE * max(1, total))
            if config.routing != "attention" or not own:
                assert float(found.sum()) == pytest.approx(total, rel=CLOSE)
        third = min(2, len(trace.v) - 1)
        shown = [
            float(x)
            for x in self.run(
                "[...document.querySelectorAll('#lengths .number')].map(e => e.textContent)"
            )
        ]
        assert shown == pytest.approx(lengths[third, 0].tolist(), abs=CLOSE + 5e-4)
        if model.decoder is not None:
            with torch.no_grad():
                mask = torch.eye(classes, dtype=torch.float64)[[parent]]
                drawn = model.decoder(trace.v[third], mask)[0]
            self.run(f"graphcaps.explorer.chooseParent({parent})")
            found = self.numbers(f"graphcaps.explorer.drawnOf({parent})")
            assert close(found, drawn.flatten())
            if config.image_channels == 1:
                assert close(self.ink("reconstruction"), drawn[0], atol=CLOSE + 0.5 / 255)
        return trace


def in_the_page(model):
    """The weights as the page has them, rounded but for those of batch normalisation."""
    normal = {
        f"conv.{n}." for n, part in enumerate(model.conv) if isinstance(part, torch.nn.BatchNorm2d)
    }
    return {
        name: tensor if name.startswith(tuple(normal)) else tensor.half().float()
        for name, tensor in model.state_dict().items()
    }


def close(found, expected, atol=CLOSE):
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=atol)


def routed_by(name, trace):
    """What another routing, dynamic or uniform, makes of the votes of a trace."""
    passing, votes = gc.bind(trace.structure), trace.u_hat[0]
    found = gc.uniform_routing(passing, votes)
    if name == "dynamic":
        found = gc.dynamic_routing(passing, votes, iterations=10)
    return Trace.of(trace.structure, 1, votes, list(found))


def amounts_of(model, trace, children, t, parent, own):
    """What each child adds to the sum of votes, or coupling × size, and what they add up to."""
    classes = model.config.classes
    c, v = trace.c[t, 0].view(-1, classes)[:, parent], trace.v[t, 0, parent]
    u_hat = trace.u_hat[0].view(-1, classes, v.shape[0])[:, parent]
    routing = model.config.routing if own else "dynamic"
    if routing == "attention":
        amounts = c * children[0][0].norm(dim=-1)
        return amounts, float(amounts.sum())
    weights = c
    if routing == "self_attention":
        weights = c + model.capsules.routing.beta.detach().view(-1, classes)[:, parent]
    if routing in ("em", "self_routing", "variational_bayes"):
        weights = c * children[1][0]
        weights = weights / (weights.sum() + (routing == "variational_bayes"))
    amounts = weights * (u_hat @ v) / v.norm()
    total = (weights[:, None] * u_hat).sum(dim=0).norm()
    return amounts, float(total)


@pytest.fixture(scope="module")
def made(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    return Demo(browser, path, gc.CapsNet.from_pretrained(), gallery=demo.shipped_gallery())


@pytest.fixture
def shown(made):
    return made.open()


@pytest.fixture(scope="module")
def lively(browser, tmp_path_factory):
    return Demo(browser, tmp_path_factory.mktemp("lively") / "demo.html", lively_model())


def assert_quiet(shown):
    assert shown.browser.complaints == []
    loaded = [url for url in shown.browser.requests if not url.startswith("data:")]
    assert [url.partition("#")[0] for url in loaded] == [shown.path.as_uri()]


def test_what_is_drawn_is_routed_as_torch_routes_it(shown):
    shown.draw()
    assert shown.text("verdict") == "4"
    trace = shown.check()
    assert float(trace.c.max()) > 0.5  # there is something to compare
    assert 0.2 < float(shown.ink("reconstruction").std()) < 0.5
    assert_quiet(shown)


def test_uniform_routing_is_torchs_too(shown):
    shown.draw()
    shown.click("[name=routing][value=uniform]")
    shown.check("uniform")
    assert_quiet(shown)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": 4, "child_dim": 8, "parent_dim": 12},
        {"image_channels": 3, "image_size": 20, "classes": 4, "kernel_size": 5},
        {"routing": "uniform", "decoder_hidden": None},
        {"routing": "attention"},
        {"routing": "self_attention", "classes": 4},
        {"routing": "em", "child_dim": 16, "rows": 4},
        {"routing": "variational_bayes", "child_dim": 16, "rows": 4},
        {"routing": "self_routing"},
        {
            "convolutions": (gc.Convolution(4, 5, 2, 1, True), gc.Convolution(6, 3, 1, 2)),
            "primary_kernel": 5,
            "primary_padding": 1,
            "primary_stride": 3,
        },
        {  # as the preset efficient
            "convolutions": (gc.Convolution(4, 5, 1, 0, True), gc.Convolution(12, 3, 2, 0, True)),
            "capsule_maps": 3,
            "primary_kernel": 9,
            "primary_stride": 1,
            "depthwise": True,
            "primary_squash": "exponential_squash",
            "routing": "self_attention",
        },
        {"capsule_maps": 4, "depthwise": True, "conv_channels": 8},  # four channels for one
    ],
    ids=str,
)
def test_nets_of_other_sizes_are_routed_as_torch_routes_them(browser, tmp_path, changes):
    model = lively_model(**changes)
    names = ("cat", "dog", "</script><i>", "&amp;", *"456789")[: model.config.classes]
    shown = Demo(browser, tmp_path / "demo.html", model, names).open()
    shown.draw(FOUR[:1])
    trace = shown.check()
    assert float(trace.c.max()) > 1.1 / model.config.classes or model.config.routing == "uniform"
    shown.click("[name=routing][value=dynamic]")
    shown.check("dynamic")
    assert shown.run("document.getElementById('untrained').checkVisibility()") is (
        model.config.routing != "dynamic"
    )
    assert shown.run("document.getElementById('decoding').checkVisibility()") is bool(model.decoder)
    assert_quiet(shown)


def test_a_net_of_colour_pictures_speaks_of_images_and_shows_their_colours(browser, tmp_path):
    model = lively_model(image_channels=3, image_size=20, classes=3, kernel_size=5)
    shown = Demo(browser, tmp_path / "demo.html", model, ("cat", "dog", "sports car")).open()
    assert shown.run("document.title").startswith("Draw an image")
    assert "digit" not in shown.run("document.querySelector('.board').innerText")
    pixel = shown.run(
        "Array.from(document.getElementById('sheet').getContext('2d')"
        ".getImageData(14, 14, 1, 1).data)"  # in the middle of the first of 20 pixels
    )
    assert pixel == [*shown.gallery.images[0, :, 0, 0].tolist(), 255]
    assert len(set(pixel)) > 1
    assert_quiet(shown)


def test_a_net_of_two_digits_an_image_names_both_and_draws_both_halves(browser, tmp_path):
    model = lively_model(labels_per_image=2, image_size=36)
    shown = Demo(browser, tmp_path / "demo.html", model).open()
    assert shown.run("document.title").startswith("Draw two digits")
    assert not shown.run("document.getElementById('mode').checkVisibility()")
    truth = shown.gallery.labels
    predicted = model.classify(model(shown.gallery.images / 255).lengths)
    assert shown.text("verdict") == names_of(predicted[0])
    assert shown.run("document.querySelectorAll('#lengths .true').length") == 2
    wrong = shown.gallery.mistakes.nonzero().flatten().tolist()
    told = shown.run("[...document.querySelectorAll('#wrong .name')].map(e => e.textContent)")
    assert told == [f"✗ {names_of(truth[n])} → {names_of(predicted[n])}" for n in wrong]
    assert told
    shown.draw()
    shown.check()
    two = shown.numbers("graphcaps.explorer.round.lengths").topk(2).indices.tolist()
    for which in (0, 1):
        shown.click(f"#halves button:nth-of-type({which + 1})")
        assert shown.run("graphcaps.explorer.parent") == two[which]
    # an address of the page of another net
    shown.open("two=0,0,0,1,0,0")
    assert shown.run("graphcaps.state.mode") == "one"
    assert_quiet(shown)


def test_a_net_of_any_number_of_classes_an_image_names_them(browser, tmp_path):
    model = lively_model(labels_per_image=0, classes=4)
    model.capsules.weight.mul_(0.1)  # so that not all are longer than 0.5
    shown = Demo(browser, tmp_path / "demo.html", model, ("cat", "dog", "bird", "cow")).open()
    names = ("cat", "dog", "bird", "cow")
    predicted = model.classify(model(shown.gallery.images / 255).lengths)
    assert len(set(predicted.sum(dim=1).tolist())) > 1
    for n in range(4):
        shown.click(f"[data-n='{n}']")
        expected = " + ".join(name for name, k in zip(names, predicted[n], strict=True) if k)
        assert shown.text("verdict") == (expected or "none")
    assert not shown.run("document.getElementById('halves').checkVisibility()")
    assert_quiet(shown)


def names_of(row):
    return " + ".join(str(k) for k in row.nonzero().flatten().tolist())


# its mass is not in the middle
ANGLE = ([*((80, y) for y in range(50, 231, 6)), *((x, 230) for x in range(86, 201, 6))],)
SMALL = [[(x / 2.2 + 100, y / 2.2 + 20) for x, y in stroke] for stroke in FOUR]


def test_a_digit_is_centred_and_scaled_as_those_of_mnist_are(shown):
    for strokes in (FOUR, SMALL, ANGLE):
        shown.click("#clear")
        shown.draw(strokes)
        image = shown.image()[0, 0]
        rows, columns = (image > 0.1).nonzero().unbind(1)
        longer = max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) + 1
        assert longer in (19, 20, 21)
        places = torch.arange(28) + 0.5
        assert float((image.sum(1) * places).sum() / image.sum()) == pytest.approx(14, abs=0.3)
        assert float((image.sum(0) * places).sum() / image.sum()) == pytest.approx(14, abs=0.3)
        # where the middle of the image lies on the sheet, there is the middle of the ink
        seen = shown.run("(({ left, top, side }) => [left, top, side])(graphcaps.state.seen)")
        if strokes is ANGLE:
            middle = [edge + seen[2] / 2 for edge in seen[:2]]
            assert middle == pytest.approx(
                [(180 * 80 + 120 * 140) / 300, (180 * 140 + 120 * 230) / 300], abs=4
            )
        else:
            assert shown.text("verdict") == "4"


def test_a_drawn_item_fills_the_image(browser, tmp_path):
    shown = Demo(browser, tmp_path / "demo.html", lively_model(image_kind="item")).open()
    shown.draw(ANGLE)
    rows, columns = (shown.image()[0, 0] > 0.1).nonzero().unbind(1)
    assert {int(rows.min()), int(rows.max())} == {0, 27}  # it is taller than wide
    assert int(columns.min() + columns.max()) in (26, 27, 28)
    assert_quiet(shown)


def test_a_digit_is_drawn_and_taken_back_with_keys_alone(shown):
    for _ in range(5):
        shown.press("Tab")
        if shown.run("document.activeElement.id") == "sheet":
            break
    shown.press("ArrowUp", times=14)
    shown.press(" ")
    shown.press("ArrowDown", times=28)
    shown.press(" ")
    shown.frame()
    assert shown.text("verdict") == "1"
    assert shown.run("graphcaps.state.drawing.strokes.length") == 1
    shown.press("Backspace")
    shown.frame()
    assert shown.text("verdict") == "no digit"
    assert shown.run("graphcaps.state.drawing.empty")
    assert_quiet(shown)


def test_image_number_n_is_shown_as_it_is_in_the_test_set(shown):
    numbers = shown.gallery.numbers.tolist()
    for n in (17, len(numbers) - 1):  # the last is an error from far beyond the thousandth
        shown.run(f"document.getElementById('number').value = {numbers[n]}")
        shown.focus("#number")
        shown.press("Enter")
        shown.frame()
        assert torch.allclose(255 * shown.image()[0], shown.gallery.images[n].float(), atol=1e-3)
        label = int(shown.gallery.labels[n])
        shown.run("new Promise(done => setTimeout(done, 500))")
        assert f"Test image {numbers[n]}, true class {label}." in shown.text("said")
        assert (": wrong ✗" in shown.text("said")) is bool(shown.gallery.mistakes[n])
    shown.run("document.getElementById('number').value = 5000")
    shown.click("#take")
    assert "numbers 0 to 999" in shown.text("not-there")


def test_the_nets_errors_say_what_was_taken_for_what(shown):
    wrong = shown.gallery.mistakes
    with torch.no_grad():
        read = shown.model(shown.gallery.images[wrong] / 255).lengths.argmax(dim=1)
    names = shown.run("[...document.querySelectorAll('#wrong .name')].map(e => e.textContent)")
    pairs = zip(shown.gallery.labels[wrong].tolist(), read.tolist(), strict=True)
    assert names == [f"✗ {label} → {longest}" for label, longest in pairs]


def moved(image, right, down):
    rolled = torch.zeros_like(image)
    size = image.shape[-1]
    for y in range(size):
        for x in range(size):
            if 0 <= y - down < size and 0 <= x - right < size:
                rolled[..., y, x] = image[..., y - down, x - right]
    return rolled


def test_two_digits_are_laid_over_each_other_and_dragged(shown):
    shown.click("[name=mode][value=two]")
    pair = shown.run("graphcaps.state.layers.map(layer => layer.image)")
    first, second = shown.gallery.images[pair] / 255
    both = sorted(int(k) for k in shown.gallery.labels[pair])
    assert shown.text("verdict") == f"two digits, {both[0]} and {both[1]}"
    expected = torch.maximum(moved(first, -4, -1), moved(second, 4, 1))
    assert torch.allclose(shown.image()[0], expected, atol=1e-5)
    shown.click("[name=layer][value='1']")
    empty = (2, 2)  # no ink of either there: the chosen one is moved
    shown.drag([empty, (empty[0] + 15, empty[1] + 15), (empty[0] + 30, empty[1] + 20)])
    expected = torch.maximum(moved(first, -4, -1), moved(second, 7, 3))
    assert torch.allclose(shown.image()[0], expected, atol=1e-5)
    shown.click("[name=layer][value='0']")
    shown.focus("#sheet")
    shown.press("ArrowLeft")
    shown.frame()
    expected = torch.maximum(moved(first, -5, -1), moved(second, 7, 3))
    assert torch.allclose(shown.image()[0], expected, atol=1e-5)
    shown.check()
    # either of the two longest is chosen, and its half is drawn
    lengths = shown.numbers("graphcaps.explorer.round.lengths")
    two = lengths.topk(2).indices.tolist()
    for which in (0, 1):
        shown.click(f"#halves button:nth-of-type({which + 1})")
        assert shown.run("graphcaps.explorer.parent") == two[which]
    shown.click("#right .pick:nth-child(6)")
    assert shown.run("graphcaps.state.layers[0].image") == 5
    assert_quiet(shown)


def test_the_address_keeps_what_is_shown(shown):
    shown.draw()
    shown.click("[name=routing][value=uniform]")
    shown.focus("#iteration")
    shown.press("ArrowRight", times=2)
    shown.run("graphcaps.explorer.chooseParent(7)")
    shown.run("graphcaps.explorer.chooseChild(100)")
    shown.focus("#sliders label:nth-child(4) input")
    shown.press("ArrowRight", times=5)
    said = (
        "[graphcaps.state.seen.pixels.join(), graphcaps.state.routing, graphcaps.explorer.parent,"
    )
    said += " graphcaps.explorer.iteration, graphcaps.explorer.child, graphcaps.explorer.offsets]"
    before = shown.run(said)
    shown.run("new Promise(done => setTimeout(done, 400))")
    address = shown.run("location.hash")
    assert len(address) < 2000
    shown.browser.open(shown.path, hash="#show=3")
    shown.open(hash=address[1:])
    assert shown.run(said) == before
    assert before[1:5] == ["uniform", 7, 4, 100]
    assert before[5][3] == pytest.approx(0.05)
    for nonsense in ("drawing=%%%&two=1,2&iteration=-4&class=99&pose=x,9", "two=a,b,c,d,e,f"):
        shown.open(hash=nonsense)
        assert shown.browser.complaints == []


def test_iterations_are_played_and_stepped(shown):
    shown.focus("#previous")
    shown.press("Enter")
    assert shown.text("iteration-number") == "2 of 10"
    shown.focus("#iteration")
    shown.press("ArrowRight", times=6)
    assert shown.text("iteration-number") == "8 of 10"
    shown.focus("#play")
    shown.press("Enter")
    assert shown.text("play") == "Pause"
    shown.run("new Promise(done => setTimeout(done, 1900))")
    assert shown.text("iteration-number") == "10 of 10"
    assert shown.text("play") == "Play"


def test_the_equations_hold_the_numbers_of_the_edge_that_is_pointed_at(shown):
    shown.draw()
    shown.run("graphcaps.explorer.chooseIteration(2)")
    box = shown.run(
        "(() => { const block = document.querySelectorAll('#coupling .block')[2];"
        " block.scrollIntoView({block: 'center'});"
        " const box = block.getBoundingClientRect(); return [box.left, box.top, box.width] })()"
    )
    row, column = 3, 4
    at = [edge + box[2] * (n + 0.5) / 6 for edge, n in zip(box[:2], (column, row), strict=True)]
    shown.browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    child = 2 * 36 + row * 6 + column
    assert shown.text("child-number") == str(child)
    terms = shown.run("[...document.querySelectorAll('#formulas .number')].map(e => e.textContent)")
    b, c, s, v, share, following = (float(x.replace("−", "-")) for x in terms)
    with torch.no_grad():
        _, trace = shown.model(shown.image(), return_trace=True)
    edge = child * 10 + 4
    u_hat, out = trace.u_hat[0, edge], trace.v[2, 0, 4]
    assert b == pytest.approx(float(trace.b[2, 0, edge]), abs=2e-3)
    assert c == pytest.approx(float(trace.c[2, 0, edge]), abs=CLOSE)
    assert s == pytest.approx(float(trace.s[2, 0, 4].norm()), abs=5e-3)
    assert v == pytest.approx(float(out.norm()), abs=CLOSE)
    assert share == pytest.approx(float(c * (u_hat @ out) / out.norm()), abs=2e-3)
    assert following == pytest.approx(b + float(u_hat @ out), abs=3e-3)
    frame = shown.run("['x', 'y'].map(n => +document.querySelector('.field').getAttribute(n))")
    assert frame == [2 * column, 2 * row]


def test_who_carries_the_digit_is_said_and_drawn(shown):
    shown.draw()
    shares = shown.numbers("graphcaps.explorer.amounts")
    few, percent, total, against = re.match(
        r"(\d+) of 288 children carry (\d+) % of \|s\| = ([\d.]+) for 4; (\d+) vote against",
        shown.text("carriers-caption"),
    ).groups()
    falling = shares.sort(descending=True).values
    part = falling[: int(few)].sum() / shares.sum()
    assert int(percent) == round(100 * float(part))
    assert part >= 0.85 > falling[: int(few) - 1].sum() / shares.sum()
    assert float(total) == pytest.approx(float(shares.sum()), abs=0.006)
    assert int(against) == int((shares < 0).sum()) > 0
    circles = shown.run(
        "[...document.querySelectorAll('#carriers circle')]"
        ".map(e => [+e.dataset.amount, +e.getAttribute('r'), e.getAttribute('class')])"
    )
    by_place = shares.view(8, 36).sum(0)
    assert [c[0] for c in circles] == pytest.approx(by_place.tolist(), abs=1e-5)
    for amount, radius, kind in circles:
        assert kind == ("against" if amount < 0 else "for")
        assert radius**2 == pytest.approx(
            circles[0][1] ** 2 * abs(amount / circles[0][0]), rel=1e-3
        )


def test_sliders_move_the_reconstruction_as_torch_would(shown):
    shown.draw()
    shown.focus("#sliders label:nth-child(3) input")
    shown.press("ArrowRight", times=25)
    drawn = shown.ink("pose-drawn")
    with torch.no_grad():
        v = shown.model(shown.image()).poses
        v[0, 4, 2] += 0.25
        expected = shown.model.decoder(v, torch.eye(10)[[4]])[0, 0]
    assert torch.allclose(drawn, expected, atol=2 / 255)
    difference = shown.ink("pose-difference")
    assert torch.allclose(difference, (expected - shown.image()[0, 0]).abs(), atol=2 / 255)
    names = shown.run("[...document.querySelectorAll('#sliders input')].map(e => e.ariaLabel)")
    assert names == [f"Dimension {n} of the pose" for n in range(16)]  # as in the figures
    shown.click("#reset")
    assert float((shown.ink("pose-drawn") - drawn).abs().max()) > 0.02


def test_doubt_is_the_same_rule_in_the_page_and_in_python(made):
    made.open()
    torch.manual_seed(1)
    verdicts = set()
    for _ in range(60):
        lengths = torch.rand(10) ** 2
        image = torch.rand(1, 2, 2)
        drawn = (image + 0.9 * torch.randn(10, 1, 2, 2)).clamp(0, 1)
        ours = judge(lengths, image, lambda classes, drawn=drawn: drawn[classes])
        words = ours.text(CLASSES)
        there = made.run(
            f"(() => {{ const drawn = {drawn.flatten(1).tolist()};"
            f" const verdict = graphcaps.judge({lengths.tolist()}, {image.flatten().tolist()},"
            " j => drawn[j], graphcaps.explorer.page.thresholds);"
            f" return [graphcaps.told(verdict, {list(CLASSES)}), verdict.error] }})()"
        )
        assert there[0] == words
        assert there[1] == pytest.approx(ours.error, rel=1e-5)
        verdicts.add(words.split(",")[0] if "two" in words or "no" in words else "one")
    assert verdicts == {"no digit", "two digits", "one"}  # each was met
    nothing = (
        "graphcaps.judge([0.9, 0.1], [0, 0], () => [0, 0], graphcaps.explorer.page.thresholds)"
    )
    assert made.run(f"graphcaps.told({nothing}, ['cat', 'dog'])") == "no class"


def test_one_region_is_live_and_everything_has_a_name(shown):
    live = shown.run(
        "[...document.querySelectorAll('output, [aria-live], [role=status], [role=alert],"
        " [role=log]')].map(e => e.id)"
    )
    assert live == ["said"]
    nameless = shown.run(
        "[...document.querySelectorAll('canvas, svg')].filter(e => e.checkVisibility()"
        " && !e.ariaLabel && !e.ariaHidden && !e.closest('button')).map(e => e.outerHTML)"
    )
    assert nameless == []
    shown.run("document.getElementById('errors').open = true")
    shown.frame()
    named = 0
    for node in shown.browser.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if not node["ignored"] and role in ("slider", "radio", "button", "spinbutton", "image"):
            assert node["name"]["value"], node
            named += 1
    assert named > 100


DARK, FORCED = {"prefers_color_scheme": "dark"}, {"forced_colors": "active"}


@pytest.mark.parametrize(
    ("width", "preference"), [(390, {}), (390, DARK), (700, {}), (1280, DARK), (1280, FORCED)]
)
def test_no_width_scrolls_sideways_and_text_stands_out(made, width, preference):
    made.browser.prefer(**preference)
    try:
        made.open(width=width)
        assert made.run("document.documentElement.scrollWidth") == width
        assert made.run("document.getElementById('sheet').clientWidth") >= 270
        ground, *inks = made.run(
            "[getComputedStyle(document.body).backgroundColor,"
            " ...['body', '.caption', '.verdict', '.length.chosen', 'svg .quiet'].map(e => {"
            " const style = getComputedStyle(document.querySelector(e));"
            " return e.includes('svg') ? style.fill : style.color })]"
        )
        for ink in inks:
            assert contrast(ground, ink) >= 4.5
        assert (luminance(ground) < 0.2) is (preference is DARK)
    finally:
        made.browser.prefer()


def luminance(colour):
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one, other):
    """By WCAG 2.1."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_at_least_30_routings_a_second_are_shown(shown, capsys):
    shown.draw()
    # in the time of the page's thread, which other tests on the same cores do not lengthen
    shown.browser.call("Performance.enable", timeDomain="threadTicks")

    def used():
        metrics = shown.browser.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    before = used()
    frames, seconds = shown.run(
        "(async () => {"
        " const { drawing } = graphcaps.state; const start = performance.now(); let n = 0;"
        " for (; n < 200 && performance.now() - start < 1500; n++) {"
        "  await new Promise(requestAnimationFrame);"
        "  drawing.extend(140 + 60 * Math.sin(n / 5), 100 + 3 * (n % 40));"
        "  graphcaps.update({ keep: true }); }"
        " return [n, (performance.now() - start) / 1000] })()"
    )
    each = (used() - before) / frames
    with capsys.disabled():
        print(
            f"\ndemo: {frames / seconds:.0f} frames a second, each routed and drawn anew; "
            f"{1000 * each:.1f} ms of its thread for a frame"
        )
    assert each < 1 / ROUTINGS_A_SECOND
