"""The page of a report in a real browser, used with the keyboard."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from browser import Page, find_chromium
from matplotlib.figure import Figure
from reports import HOSTILE, filled_with, lively_model, random_data, write_run

import graphcaps as gc
from graphcaps import report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no chromium on PATH: the report's page is not looked at"
)

GREY_LEVELS = 1  # by how much the page's decoder may differ from torch's, of 255


@pytest.fixture(scope="module")
def browser():
    page = Page(find_chromium())
    yield page
    page.close()


class Shown:
    """A report in the browser, with the records and the net that it was made from."""

    def __init__(self, browser, folder, model, sections=(), images=40, **changes):
        torch.manual_seed(0)
        self.model = model
        run = write_run(folder / "run", model)
        records = report.collect(run, model, random_data(model, images))
        self.records = dataclasses.replace(records, **changes)
        self.path = folder / "report.html"
        self.path.write_text(report.render(self.records, sections), encoding="utf-8")
        self.browser = browser
        self.run, self.press = browser.run, browser.press
        browser.open(self.path)

    def focus(self, selector):
        self.run(f"document.querySelector('{selector}').focus()")

    def text(self, name):
        return self.run(f"document.getElementById('{name}').textContent")

    def said(self):
        """The text of the live region once it has stopped changing."""
        self.run("new Promise(done => setTimeout(done, 450))")
        return self.text("said")

    def pixels(self, name):
        """What a canvas shows of colours, 0 to 255."""
        return self.content(name)[:, :, :3]

    def greys(self, name):
        """Grey levels of an image, from the canvas that shows it dark on light."""
        content = self.content(name)
        assert (content[:, :, :3] == 0).all()
        return content[:, :, 3]

    def content(self, name):
        _, height, width = self.model.config.image_shape
        values = self.run(
            f"Array.from(document.getElementById('{name}').getContext('2d')"
            f".getImageData(0, 0, {width}, {height}).data)"
        )
        return np.array(values).reshape(height, width, 4)

    def drawn_by_torch(self, example, iteration, parent, moved=()):
        """The reconstruction, 0 to 255, after adding to dimensions of the pose."""
        v = example.poses[iteration].clone()
        for dimension, by in moved:
            v[parent, dimension] += by
        mask = torch.eye(len(v))[parent]
        return 255 * self.model.decoder(v[None], mask[None])[0].numpy()

    def lengths(self):
        return [
            float(x)
            for x in self.run(
                "[...document.querySelectorAll('#lengths .number')].map(e => e.textContent)"
            )
        ]

    def check_drawing(self, example, iteration, parent):
        """Compare lengths, coupling and amounts on the page with the records."""
        assert self.lengths() == pytest.approx(example.lengths[iteration].tolist(), abs=6e-4)
        edges = self.run(
            "[...document.querySelectorAll('#coupling .edge')]"
            ".sort((a, b) => a.dataset.map - b.dataset.map || a.dataset.parent - b.dataset.parent)"
            ".map(e => [+e.getAttribute('stroke-width'), e.classList.contains('chosen')])"
        )
        config = self.model.config
        classes = config.classes
        of_maps = example.coupling[iteration].unflatten(0, (config.capsule_maps, -1)).mean(dim=1)
        for (width, chosen), mean in zip(edges, of_maps.flatten().tolist(), strict=True):
            expected = (2 if chosen else 0.7) * mean * classes
            assert width == pytest.approx(min(max(expected, 0.2), 8), abs=0.01)
        chosen = [number % classes for number, e in enumerate(edges) if e[1]]
        assert chosen == [parent] * config.capsule_maps
        amounts = example.amounts[:, :, parent]
        for showing, numbers, most in (
            ("coupling", example.coupling[:, :, parent], max(example.coupling.max(), 2 / classes)),
            ("amount", amounts, amounts.abs().max()),
        ):
            self.run(f"document.querySelector('[name=squares][value={showing}]').click()")
            areas = self.areas()
            expected = (numbers[iteration] / most).tolist()
            assert [area * (-1 if below else 1) for area, below in zip(*areas, strict=True)] == (
                pytest.approx(expected, abs=0.01)
            )
        circles = self.run(
            "[...document.querySelectorAll('#carriers circle')]"
            ".map(e => [+e.dataset.amount, +e.getAttribute('cx'), +e.getAttribute('cy')])"
        )
        expected = amounts[iteration].unflatten(0, (config.capsule_maps, -1)).sum(dim=0)
        assert [circle[0] for circle in circles] == pytest.approx(expected.tolist(), abs=2e-3)
        _, columns = config.grid_size()
        middle = config.kernel_size - 0.5  # of the first receptive field
        for number, (_, x, y) in enumerate(circles):
            assert (x, y) == (middle + 2 * (number % columns), middle + 2 * (number // columns))

    def areas(self):
        """The area of every child's square, relative to a full one, and whether it is hollow."""
        side = self.run("+document.querySelector('#coupling .mark').getAttribute('width')") - 1
        paths = self.run(
            "[...document.querySelectorAll('#coupling .cell')]"
            ".map(e => [e.getAttribute('d') ?? '', e.classList.contains('against')])"
        )
        squares = []
        blocks = self.run(
            "[...document.querySelectorAll('#coupling .block')]"
            ".map(e => ['x', 'y', 'width', 'height'].map(name => +e.getAttribute(name)))"
        )
        rows, columns = self.model.config.grid_size()
        for path, hollow in paths:
            for x, y, width in re.findall(r"M([-\d.]+) ([-\d.]+)h([\d.]+)", path):
                middle = float(x) + float(width) / 2, float(y) + float(width) / 2
                for number, (left, top, wide, high) in enumerate(blocks):
                    if 0 < middle[0] - left < wide and 0 < middle[1] - top < high:
                        row = int((middle[1] - top) / high * rows)
                        column = int((middle[0] - left) / wide * columns)
                        child = (number * rows + row) * columns + column
                        squares.append((child, float(width) / side, hollow))
        squares.sort()
        assert [square[0] for square in squares] == list(range(len(blocks) * rows * columns))
        return [width**2 for _, width, _ in squares], [hollow for *_, hollow in squares]


def stand_ins():
    figure = Figure(figsize=(6, 3))
    figure.subplots().plot([3, 1, 2])
    return [report.Section("A figure", "What is seen.", "A curve that falls and rises.", figure)]


@pytest.fixture(scope="module")
def made(browser, tmp_path_factory):
    return Shown(browser, tmp_path_factory.mktemp("page"), lively_model(), stand_ins())


@pytest.fixture
def shown(made):
    made.browser.open(made.path)
    return made


def assert_quiet(shown):
    assert shown.browser.complaints == []
    loaded = [url for url in shown.browser.requests if not url.startswith("data:")]
    assert loaded == [shown.path.as_uri()]


def test_the_page_opens_from_disk_without_a_complaint_or_a_request(shown):
    assert_quiet(shown)
    first = shown.records.examples[0]
    assert np.array_equal(shown.greys("input"), first.image[0])
    shown.check_drawing(first, 2, first.main)
    assert shown.run("document.querySelector('#figures img').naturalWidth") > 100


def test_another_image_is_picked_with_keys(shown):
    said = shown.said()
    for _ in range(20):
        shown.press("Tab")
        if shown.run("document.activeElement.name") == "example":
            break
    outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert shown.run(outline) == "solid"
    shown.press("ArrowRight", times=14)
    example = shown.records.examples[14]
    assert example.labels[0] != example.main
    assert np.array_equal(shown.greys("input"), example.image[0])
    shown.check_drawing(example, 2, example.main)
    now = shown.said()
    assert now != said
    assert f"Test image {example.number}, true class {example.labels[0]}." in now
    assert f"the longest capsule is {example.main}" in now
    assert "wrong ✗" in now
    shown.press("ArrowLeft")
    assert f"Test image {shown.records.examples[13].number}," in shown.said()
    assert_quiet(shown)


def test_misclassified_images_are_marked_by_more_than_colour(shown):
    labels = shown.run("[...document.querySelectorAll('.pick')].map(e => e.textContent)")
    styles = shown.run(
        "[...document.querySelectorAll('.pick .face')].map(e => getComputedStyle(e).borderStyle)"
    )
    assert len(labels) == 20
    shown.press("Tab")
    for example, label, style in zip(shown.records.examples, labels, styles, strict=True):
        right = example.labels[0] == example.main
        wrong_name = f"✗ {example.labels[0]} → {example.main}"
        assert label == (str(example.labels[0]) if right else wrong_name)
        # the first one is picked, and then drawn solid
        assert style == ("solid" if right else "dashed")


def test_stepping_shows_every_iteration_of_the_records(shown):
    example = shown.records.examples[0]
    drawn = []
    shown.focus("#iteration")
    for iteration in (2, 1, 0):
        shown.check_drawing(example, iteration, example.main)
        expected = shown.drawn_by_torch(example, iteration, example.main)
        assert np.abs(shown.greys("reconstruction") - expected[0]).max() <= GREY_LEVELS
        entropy = torch.special.entr(example.coupling[iteration]).sum(dim=-1).mean()
        written = re.search(r"entropy of c: ([\d.]+) nats", shown.text("coupling-caption"))[1]
        assert float(written) == pytest.approx(float(entropy), abs=1e-3)
        assert f"Iteration {iteration + 1}:" in shown.said()
        longest = float(example.lengths[iteration].max())
        said = float(re.search(r"\|v\| = ([\d.]+):", shown.said())[1])
        assert said == pytest.approx(longest, abs=0.0051)
        assert shown.text("iteration-number") == f"{iteration + 1} of 3"
        drawn.append(shown.run("document.getElementById('coupling').innerHTML"))
        shown.press("ArrowLeft")
    assert len(set(drawn)) == 3
    shown.focus("#next")
    shown.press("Enter")
    assert shown.text("iteration-number") == "2 of 3"
    assert "1 of 3" not in shown.run("document.getElementById('coupling').ariaLabel")
    assert_quiet(shown)


def test_another_class_shows_its_votes_and_reconstruction(shown):
    example = shown.records.examples[0]
    other = (example.main + 3) % 10
    shown.run(f"document.querySelector('#lengths input[value=\"{other}\"]').click()")
    shown.check_drawing(example, 2, other)
    expected = shown.drawn_by_torch(example, 2, other)
    assert np.abs(shown.greys("reconstruction") - expected[0]).max() <= GREY_LEVELS


def test_sliders_move_the_reconstruction_as_torch_would_and_reset_restores_it(shown):
    example = shown.records.examples[1]
    shown.focus("#right input")
    shown.press("ArrowRight")
    before = shown.greys("reconstruction")
    assert np.ptp(before) > 100  # there is something to compare
    shown.focus("#sliders label:nth-child(3) input")
    shown.press("ArrowRight", times=25)
    shown.focus("#sliders label:nth-child(16) input")
    shown.press("ArrowLeft", times=30)  # no further than its end
    after = shown.greys("reconstruction")
    moved = [(2, 0.25), (15, -0.25)]
    expected = shown.drawn_by_torch(example, 2, example.main, moved)
    assert np.abs(after - expected[0]).max() <= GREY_LEVELS
    assert np.abs(after - before).max() > 10
    assert "2 dimensions moved" in shown.text("reconstruction-caption")
    text = shown.run("document.querySelectorAll('#sliders input')[15].ariaValueText")
    assert text.endswith("moved by −0.25")
    shown.focus("#reset")
    shown.press("Enter")
    assert np.array_equal(shown.greys("reconstruction"), before)
    values = shown.run("[...document.querySelectorAll('#sliders input')].map(e => +e.value)")
    assert values == [0] * 16
    assert_quiet(shown)


def test_every_picture_and_control_has_a_name(shown):
    nameless = shown.run(
        "[...document.querySelectorAll('img, canvas, svg')]"
        ".filter(e => !e.alt && !e.ariaLabel && !e.ariaHidden)"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []
    tree = shown.browser.call("Accessibility.getFullAXTree")["nodes"]
    named = 0
    for node in tree:
        role = node.get("role", {}).get("value")
        if not node["ignored"] and role in ("slider", "radio", "button", "image", "link"):
            assert node["name"]["value"], node
            assert role != "slider" or node["name"]["value"].startswith(
                ("Dimension", "Iteration", "Child")
            )
            named += 1
    assert named > 60
    live = "[...document.querySelectorAll('output, [aria-live], [role=status]')].map(e => e.id)"
    assert shown.run(live) == ["said"]
    assert shown.run("document.documentElement.lang") == "en"


def overlapping_names(shown):
    """Pairs of neighbouring names in the coupling graph that lie over each other."""
    boxes = shown.run(
        "[...document.querySelectorAll('#coupling text')].filter(e => e.checkVisibility())"
        ".map(e => [e.textContent, e.getBoundingClientRect()])"
        ".map(([name, box]) => [name, box.left, box.right, box.top, box.bottom])"
    )
    return [
        (one[0], other[0])
        for number, one in enumerate(boxes)
        for other in boxes[:number]
        if one[1] < other[2] and other[1] < one[2] and one[3] < other[4] and other[3] < one[4]
    ]


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_no_width_scrolls_sideways(made, width):
    made.browser.open(made.path, width=width)
    assert made.run("document.documentElement.scrollWidth") == width
    assert made.run("document.querySelector('#coupling').clientWidth") > min(340, width / 2)
    assert made.run("document.querySelectorAll('#sliders input')[0].clientWidth") > 60
    assert overlapping_names(made) == []
    assert_quiet(made)


def test_the_coupling_is_drawn_anew_when_the_window_changes(made):
    made.browser.open(made.path)
    wide = made.run("document.querySelector('#coupling').viewBox.baseVal.width")
    made.browser.resize(390, 800)
    made.run("dispatchEvent(new Event('resize'))")
    assert made.run("document.querySelector('#coupling').viewBox.baseVal.width") < wide
    first = made.records.examples[0]
    made.check_drawing(first, 2, first.main)


def test_a_net_without_a_decoder_has_a_page_without_sliders(browser, tmp_path):
    shown = Shown(browser, tmp_path, lively_model(decoder_hidden=None))
    assert_quiet(shown)
    assert shown.run("document.getElementById('decoding').checkVisibility()") is False
    assert shown.run("document.getElementById('no-decoder').checkVisibility()") is True
    shown.focus("#right input")
    shown.press("ArrowRight")
    example = shown.records.examples[1]
    shown.check_drawing(example, 2, example.main)
    assert_quiet(shown)


def test_uniform_routing_has_one_iteration_and_nothing_to_step(browser, tmp_path):
    shown = Shown(browser, tmp_path, lively_model(routing="uniform", classes=3))
    assert_quiet(shown)
    assert shown.text("iteration-number") == "1 of 1"
    for name in ("iteration", "previous", "next", "play"):
        assert shown.run(f"document.getElementById('{name}').disabled")
    widths = shown.run(
        "[...document.querySelectorAll('#coupling .edge.chosen')]"
        ".map(e => +e.getAttribute('stroke-width'))"
    )
    assert len(set(widths)) == 1


@pytest.mark.parametrize(
    ("routing", "title", "sure"),
    [
        ("em", "Activations aj of the class capsules", "the most active capsule is"),
        ("attention", "Confidence pj of the class capsules", "the net is surest of"),
        ("self_attention", "Lengths |vj| of the class capsules", "the longest capsule is"),
    ],
)
def test_a_report_says_what_the_net_of_another_routing_is_sure_by(
    browser, tmp_path, routing, title, sure
):
    sizes = {"child_dim": 16, "rows": 4} if routing == "em" else {}
    shown = Shown(browser, tmp_path, lively_model(routing=routing, **sizes))
    example = shown.records.examples[0]
    last = len(example.coupling) - 1
    shown.check_drawing(example, last, example.main)
    assert shown.text("lengths-title") == title
    assert sure in shown.said()
    lines = shown.run("[...document.querySelectorAll('#formulas .number')].map(e => e.textContent)")
    child = int(shown.text("child-number"))
    assert float(lines[0]) == pytest.approx(
        float(example.coupling[-1, child, example.main]), abs=1e-3
    )
    assert f"{float(example.lengths[-1, example.main]):.3f}" in lines
    if routing != "attention":
        share = float(example.amounts[-1, child, example.main])
        assert float(lines[-1].replace("−", "-")) == pytest.approx(share, abs=2e-3)
    assert_quiet(shown)


def test_colours_other_sizes_and_long_names_of_classes_are_drawn(browser, tmp_path):
    names = ("T-shirt/top", "</script><i>", "Ankle boot", "&amp;")
    model = lively_model(image_channels=3, image_size=(20, 26), classes=4)
    shown = Shown(browser, tmp_path, model, classes=names)
    first = shown.records.examples[0]
    assert np.array_equal(shown.pixels("input"), first.image.permute(1, 2, 0))
    expected = shown.drawn_by_torch(first, 2, first.main).transpose(1, 2, 0)
    assert np.abs(shown.pixels("reconstruction") - expected).max() <= GREY_LEVELS
    assert names[first.labels[0]] in shown.said()
    shown.check_drawing(first, 2, first.main)
    starts = shown.run("[...document.querySelectorAll('.bar')].map(e => e.offsetLeft)")
    assert len(set(starts)) == 1
    for width in (390, 1280):
        browser.open(shown.path, width=width)
        assert shown.run("document.documentElement.scrollWidth") == width
    assert_quiet(shown)


def test_images_of_several_classes_are_told_with_all_of_them(browser, tmp_path):
    model = lively_model(labels_per_image=2, classes=4)
    model.capsules.weight.mul_(0.1)  # lengths that differ when they are rounded
    shown = Shown(browser, tmp_path, model, images=12)
    examples = shown.records.examples
    told = [
        [" + ".join(map(str, sorted(numbers))) for numbers in (example.labels, example.predicted)]
        for example in examples
    ]
    picks = shown.run("[...document.querySelectorAll('.pick .name')].map(e => e.textContent)")
    assert picks == [a if a == b else f"✗ {a} → {b}" for a, b in told]
    assert 0 < sum(a != b for a, b in told) < len(told)
    for number, verdict in ((0, "right"), (len(told) - 1, "wrong ✗")):
        shown.run(f"document.querySelectorAll('.pick input')[{number}].click()")
        labels, predicted = told[number]
        said = shown.said()
        assert f"true class {labels}. Iteration 3: {predicted};" in said and f": {verdict}." in said
        assert shown.text("verdict") == predicted
        true = shown.run("[...document.querySelectorAll('#lengths .true input')].map(e => e.value)")
        assert " + ".join(true) == labels
    assert_quiet(shown)


def test_many_classes_and_many_capsule_maps_are_drawn_without_overlaps(browser, tmp_path):
    shown = Shown(browser, tmp_path, lively_model(classes=27, capsule_maps=32), images=9)
    for width in (390, 1280):
        browser.open(shown.path, width=width)
        assert shown.run("document.documentElement.scrollWidth") == width
        assert overlapping_names(shown) == []
        blocks = shown.run(
            "[...document.querySelectorAll('#coupling .block')]"
            ".map(e => ['x', 'y', 'width'].map(name => +e.getAttribute(name)))"
        )
        assert len(blocks) == 32
        sides = {(round(x, 3), round(y, 3)) for x, y, _ in blocks}
        assert len(sides) == 32
        assert all(side >= 26 for _, _, side in blocks)
    first = shown.records.examples[0]
    shown.check_drawing(first, 2, first.main)
    assert_quiet(shown)


@pytest.mark.parametrize("finished", [True, False])
def test_whatever_comes_from_a_file_is_text_and_runs_nothing(made, tmp_path, finished, monkeypatch):
    section = report.Section(HOSTILE, HOSTILE, HOSTILE, Figure(figsize=(2, 2)))
    path = tmp_path / "hostile.html"
    monkeypatch.setitem(gc.ROUTINGS, HOSTILE, gc.DynamicRouting)
    page = report.render(filled_with(HOSTILE, made.records, finished), [section])
    path.write_text(page, encoding="utf-8")
    made.browser.open(path)
    assert made.run("window.attacked") is None
    assert made.browser.complaints == []  # as of an image that is asked for
    assert made.run("document.title") == f"{HOSTILE} – graphcaps report"
    shown = made.run(
        "[...document.querySelectorAll('h1, caption, #figures h3')].map(e => e.textContent)"
    )
    assert shown.count(HOSTILE) == 3
