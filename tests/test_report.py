"""The records and the HTML of a report; tests/test_report_page.py opens it in a browser."""

import base64
import dataclasses
import errno
import html.parser
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from reports import HOSTILE, filled_with, lively_model, random_data, write_run
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import report
from graphcaps.data.datasets import load_dataset
from graphcaps.report import page
from graphcaps.report.records import decoder_layers
from graphcaps.training.evaluation import Score

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def data(model):
    torch.manual_seed(0)
    return random_data(model)


@pytest.fixture(scope="module")
def records(model, data, tmp_path_factory):
    predicted = model(data.test.images / 255).lengths.argmax(dim=1)
    errors = int((predicted != data.test.labels).sum())
    run = write_run(tmp_path_factory.mktemp("report") / "run <one>", model, errors=errors)
    return report.collect(run, model, data)


def test_examples_are_those_of_the_net_in_every_iteration(model, data, records):
    for example in records.examples:
        image = data.test.images[example.number]
        assert torch.equal(example.image, image)
        output, trace = model(image[None] / 255, return_trace=True)
        assert_close(example.poses, trace.v[:, 0], rtol=1e-4, atol=1e-5)
        assert_close(example.lengths[-1], output.lengths[0], rtol=1e-4, atol=1e-5)
        assert example.predicted == (int(output.lengths.argmax()),)
        assert example.labels == (int(data.test.labels[example.number]),)


def test_coupling_sums_to_one_over_the_classes(records):
    for example in records.examples:
        assert example.coupling.shape == (3, 108, 10)
        assert_close(example.coupling.sum(dim=-1), torch.ones(3, 108))
        assert_close(example.coupling[0], torch.full((108, 10), 0.1))
        assert example.coupling[-1].max() > 0.5  # these nets' routing decides


def test_amounts_are_shares_of_the_length_of_each_class_by_a_loop(model, records):
    example = records.examples[3]
    with torch.no_grad():
        u = model.primary(model.conv(example.image[None] / 255))[0]
        for child, parent in ((0, 0), (17, 4), (107, 9)):
            vote = model.capsules.weight[child * 10 + parent].T @ u[child]
            for iteration in range(3):
                v = example.poses[iteration, parent]
                c = example.coupling[iteration, child, parent]
                expected = float(c * (vote @ v) / v.norm())
                found = float(example.amounts[iteration, child, parent])
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # v = squash(s), so that |s|² / (1 + |s|²) = |v|
    s = example.amounts.sum(dim=1)
    assert_close(s.square() / (1 + s.square()), example.lengths, rtol=1e-4, atol=1e-5)
    assert example.amounts.min() < 0


@pytest.mark.parametrize("routing", ["em", "variational_bayes", "self_routing", "self_attention"])
def test_amounts_of_other_routings_are_shares_of_their_poses_by_a_loop(routing):
    model = lively_model(routing=routing, classes=4)
    data = random_data(model, 3).test
    (example,) = report.look_inside(model, data, [1])
    with torch.no_grad():
        given = model.primary_capsules(data.images[1:2] / 255)
    u, a = given[0][0], given[1][0] if len(given) == 2 else torch.ones(108)
    prior = float(routing == "variational_bayes")  # the mass of the prior mean, 0
    for parent in range(4):
        weights, votes = [], []
        for child in range(108):
            edge = child * 4 + parent
            votes.append((model.capsules.weight[edge].T @ u[child])[:16])
            weight = a[child] * example.coupling[-1, child, parent]
            if routing == "self_attention":
                weight = weight + model.capsules.routing.beta[edge]
            weights.append(float(weight))
        mass = 1 if routing == "self_attention" else sum(weights) + prior
        pose = sum(w * vote for w, vote in zip(weights, votes, strict=True)) / mass
        unit = pose / pose.norm()
        expected = [w * float(vote @ unit) / mass for w, vote in zip(weights, votes, strict=True)]
        found = example.amounts[-1, :, parent]
        assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-4 * float(pose.norm()))
        whole = pose if routing == "self_attention" else example.poses[-1, parent]
        assert float(found.sum()) == pytest.approx(float(whole.norm()), rel=1e-3)


def test_where_poses_are_no_sums_of_votes_amounts_are_coupling_times_length():
    model = lively_model(routing="attention")
    data = random_data(model, 3).test
    (example,) = report.look_inside(model, data, [1])
    with torch.no_grad():
        (u,) = model.primary_capsules(data.images[1:2] / 255)
    assert_close(example.amounts, example.coupling * u[0].norm(dim=-1)[:, None])


def test_examples_are_right_ones_of_every_class_then_the_surest_mistakes():
    lengths = torch.rand(300, 5)
    labels = torch.where(torch.arange(300) % 3 == 0, lengths.argmin(dim=1), lengths.argmax(dim=1))
    chosen = report.choose_examples(lengths, labels)
    assert chosen == report.choose_examples(lengths.clone(), labels.clone())
    assert len(set(chosen)) == 20
    right, wrong = chosen[:12], chosen[12:]
    assert all(number % 3 for number in right)
    classes = [int(labels[number]) for number in right]
    assert classes == sorted(classes)
    assert all(classes.count(j) in (2, 3) for j in range(5))
    longest = lengths.amax(dim=1)
    surest = sorted((n for n in range(300) if n % 3 == 0), key=lambda n: -float(longest[n]))
    assert wrong == surest[:8]


@pytest.mark.parametrize(("right", "wrong", "expected"), [(30, 0, 20), (3, 2, 5), (0, 30, 8)])
def test_examples_are_as_many_as_there_are(right, wrong, expected):
    lengths = torch.eye(2)[torch.zeros(right + wrong, dtype=torch.long)]
    labels = torch.tensor([0] * right + [1] * wrong)
    assert len(report.choose_examples(lengths, labels)) == expected


def test_the_confusion_counts_every_image_once(records, model, data):
    predicted = model(data.test.images / 255).lengths.argmax(dim=1)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for true, told in zip(data.test.labels.tolist(), predicted.tolist(), strict=True):
        expected[true, told] += 1
    assert torch.equal(records.score.confusion(), expected)


def test_the_report_has_every_figure_with_its_words(records):
    found = report.sections(records)
    assert [section.title for section in found] == [
        "Learning curves",
        "Lengths of the class capsules",
        "Entropy of the coupling",
        "Coupling coefficients",
        "The strongest children",
        "Reconstructions",
        "Tweaked poses",
        "Engines against dense routing",
    ]
    assert all(section.alt and section.caption for section in found)
    drawn = found[5].figure.axes[10].images[0].get_array()
    assert_close(torch.tensor(drawn), records.drawn[0, 0].double())


def test_figures_that_a_net_cannot_have_are_left_out(tmp_path):
    net = lively_model(decoder_hidden=None, routing="uniform")
    run = write_run(tmp_path / "run", net)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    found = report.sections(report.collect(run, net, random_data(net)))
    titles = {section.title for section in found}
    assert not titles & {"Learning curves", "Reconstructions", "Tweaked poses"}
    assert "Reconstructions" not in titles


@pytest.mark.parametrize("changes", [{"routing": "uniform"}, {"iterations": 1}])
def test_equal_coupling_is_told_in_words_and_not_drawn(changes, tmp_path):
    net = lively_model(decoder_hidden=None, **changes)
    run = write_run(tmp_path / "run", net)
    records = report.collect(run, net, random_data(net))
    found = {section.title: section for section in report.sections(records)}
    assert not {"Entropy of the coupling", "Coupling coefficients"} & set(found)
    assert "couples to all 10 classes alike" in found["Coupling"].caption
    text = Reader(report.render(records, [found["Coupling"]])).text
    assert "couples to all 10 classes alike" in text


def test_long_arrays_come_out_of_the_page_as_they_went_in(records):
    packed = page.explorer_data(records)
    for example, there in zip(records.examples, packed["examples"], strict=True):
        image = np.frombuffer(base64.b64decode(there["image"]), np.uint8)
        assert np.array_equal(image, example.image.flatten())
        coupling = np.frombuffer(base64.b64decode(there["coupling"]), "<f2")
        assert np.allclose(coupling, example.coupling.flatten(), rtol=5e-4, atol=1e-6)
        assert np.allclose(there["poses"], example.poses, atol=5.1e-5)
        amounts = np.frombuffer(base64.b64decode(there["amounts"]), "<f2")
        assert np.allclose(amounts, example.amounts.flatten(), rtol=5e-4, atol=1e-6)
    for (weight, _), there in zip(records.decoder, packed["decoder"], strict=True):
        halves = np.frombuffer(base64.b64decode(there["weight"]), "<f2")
        assert np.allclose(halves, weight.flatten(), rtol=5e-4, atol=1e-6)


def test_rounding_changes_pictures_by_less_than_a_grey_level(records):
    assert 0 < page.rounding_error(records) < 1


class Reader(html.parser.HTMLParser):
    """Records unclosed elements, resources that are loaded, and the text."""

    VOID = ("meta", "input", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.ids, self.images, self.text = [], [], [], [], ""
        self.elements = []  # tags with the names of their attributes
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, [name for name, _ in attributes]))
        attributes = dict(attributes)
        self.loaded += [v for k, v in attributes.items() if k in ("src", "href", "data", "action")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.images += [attributes] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


def test_the_page_is_well_formed_and_loads_nothing(records):
    figure = Figure()
    figure.subplots().plot([1, 3, 2])
    cloud = Figure()
    cloud.subplots().scatter(*torch.rand(2, 9000).numpy())
    stand_ins = [
        report.Section("Loss <by> step", "It falls & rises.", 'A "curve".', figure),
        report.Section("Second", "Another.", "Another curve.", figure),
        report.Section("Points", "Many.", "A cloud.", cloud),
    ]
    text = report.render(records, stand_ins)
    reader = Reader(text)
    assert len(set(reader.ids)) == len(reader.ids)
    data = ("data:image/svg+xml;base64,", "data:image/png;base64,")
    assert all(loaded.startswith(("#", *data)) for loaded in reader.loaded)
    assert {loaded[1:] for loaded in reader.loaded if loaded.startswith("#")} <= set(reader.ids)
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", text)
    assert "default-src 'none'" in text
    assert [image["alt"] for image in reader.images] == [
        'A "curve".',
        "Another curve.",
        "A cloud.",
    ]
    assert reader.images[2]["src"].startswith(data[1])
    assert len(reader.images[2]["src"]) < 400_000  # points are drawn as pixels
    svg = base64.b64decode(reader.images[0]["src"].partition(",")[2])
    assert b"<svg" in svg
    assert "Loss <by> step" in reader.text
    assert "It falls & rises." in reader.text


def test_the_page_says_how_the_run_ended_and_how_it_was_made(records):
    text = Reader(report.render(records, [])).text
    assert "run <one>" in text
    errors = records.score.errors
    assert f"{1 - errors / 40:.2%} of 40 test images of random classified correctly" in text
    assert f"{errors} errors" in text
    assert "weights of epoch 1, the best on the validation set" in text
    assert "own test" not in text
    assert "not finished" not in text
    assert "best" in text
    for word in ("test_errors", "conv_channels", "epochs", "versions", "0.1.0"):
        assert word in text


def test_mistakes_are_told_apart_by_their_shade(records):
    labels, read = (
        torch.tensor([1] * 5 + [3] * 2 + [5, 7, 7]),
        torch.tensor([2] * 5 + [4] * 2 + [6, 7, 7]),
    )
    score = Score(torch.eye(10)[read], labels, 0.0)
    text = report.render(dataclasses.replace(records, score=score), [])
    cells = re.findall(r'"mistakes" style="--share:([\d.]+)">(\d+)<', text)
    assert cells == [("1.000", "5"), ("0.400", "2"), ("0.200", "1")]
    assert "the most frequent was made 5 times" in text
    right = Score(torch.eye(10)[labels], labels, 0.0)
    assert "There is no mistake." in report.render(dataclasses.replace(records, score=right), [])


def test_a_run_that_is_not_finished_says_so(model, data, tmp_path):
    run = write_run(tmp_path / "run", model, finished=False)
    text = Reader(report.render(report.collect(run, model, data), [])).text
    assert "This run is not finished: 2 of 2 epochs are done" in text
    assert "classified correctly" in text


def test_a_result_that_is_not_found_again_is_told(records):
    result = {**records.result, "test_errors": 39}
    text = Reader(report.render(dataclasses.replace(records, result=result), [])).text
    assert "The run's own test, in result.json, found 39 errors." in text


def test_names_of_classes_cannot_break_the_page(model, data, tmp_path):
    names = ("</script><b>", '"quoted"', "&amp;", *"3456789")
    run = write_run(tmp_path / "run", model)
    records = report.collect(run, model, random_data(model, classes=names))
    reader = Reader(report.render(records, []))
    assert "</script><b>" in reader.text


@pytest.mark.parametrize("finished", [True, False])
def test_whatever_comes_from_a_file_is_text_in_the_page(records, finished, monkeypatch):
    pages = []
    for text in (HOSTILE, "PLAIN"):
        section = report.Section(text, text, text, Figure())
        monkeypatch.setitem(gc.ROUTINGS, text, gc.DynamicRouting)
        pages.append(report.render(filled_with(text, records, finished), [section]))
    hostile, plain = map(Reader, pages)
    assert hostile.elements == plain.elements
    assert hostile.text.count(HOSTILE) == plain.text.count("PLAIN")
    data = json.loads(re.search(r'id="records">(.*?)</script>', pages[0])[1])
    assert data["classes"] == [HOSTILE] * 10


def test_the_decoders_layers_are_those_of_torch(model):
    layers = decoder_layers(model)
    assert [tuple(weight.shape) for weight, _ in layers] == [(512, 160), (1024, 512), (784, 1024)]
    assert decoder_layers(lively_model(decoder_hidden=None)) == ()


def test_a_page_stays_within_a_few_megabytes(records):
    assert 3e6 < len(report.render(records, [])) < 5e6  # of which 3.8 are the decoder


def test_the_papers_net_makes_a_page_within_a_few_megabytes(tmp_path):
    model = gc.CapsNet.from_preset("paper").eval()
    run = write_run(tmp_path / "run", model)
    records = report.collect(run, model, random_data(model, images=24))
    assert len(report.render(records, [])) < 8e6


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_hidden": None},
        {"routing": "uniform"},
        {"classes": 3},
        {"image_channels": 3, "image_size": 20},
        {"iterations": 1, "classes": 2},
        {"routing": "em", "child_dim": 16, "rows": 4},
        {"routing": "attention"},
        {"routing": "self_routing"},
    ],
)
def test_every_kind_of_net_has_a_report(changes, tmp_path):
    model = lively_model(**changes)
    run = write_run(tmp_path / "run", model)
    output = tmp_path / "new" / "report.html"
    report.write_report(run, model, random_data(model), output)
    Reader(output.read_text(encoding="utf-8"))
    assert os.listdir(output.parent) == ["report.html"]


def test_a_data_set_with_other_classes_or_images_is_refused(model, tmp_path):
    run = write_run(tmp_path / "run", model)
    other = random_data(lively_model(classes=3))
    with pytest.raises(ValueError, match=r"has 10 classes, but random has 3.*--dataset"):
        report.collect(run, model, other)
    with pytest.raises(ValueError, match=r"expects images of shape \[1, 20, 20\]"):
        report.collect(run, lively_model(image_size=20), load_dataset(str(DIGITS)))


def test_a_file_that_cannot_be_written_is_named_before_any_work(model, data, tmp_path):
    run = write_run(tmp_path / "run", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got the folder"):
        report.write_report(run, model, None, tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        report.write_report(run, model, None, tmp_path / "file" / "report.html")


@pytest.fixture
def quick(monkeypatch):
    """Make reports fast."""
    monkeypatch.setattr(report, "collect", lambda *_: None)
    monkeypatch.setattr(report, "sections", lambda *_: [])
    monkeypatch.setattr(report, "render", lambda *_: "page")


@pytest.mark.usefixtures("quick")
def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path):
    link = tmp_path / "link.html"
    for target in ("new/report.html", "other.html"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        report.write_report(None, None, None, link)
        assert os.readlink(link) == target
        assert (tmp_path / target).read_text() == "page"
        assert not (tmp_path / target).is_symlink()


@pytest.mark.usefixtures("quick")
def test_what_is_no_regular_file_is_written_into_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(pipe.read_text)
        report.write_report(None, None, None, pipe)
        assert read.result(timeout=10) == "page"
    assert pipe.is_fifo()
    report.write_report(None, None, None, Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.usefixtures("quick")
def test_what_a_killed_report_left_is_removed_by_the_next(tmp_path, monkeypatch):
    if (process := os.fork()) == 0:
        try:
            monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            report.write_report(None, None, None, tmp_path / "report.html")
        finally:
            os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert os.listdir(tmp_path) == [f".report.html.{process}.unfinished"]
    report.write_report(None, None, None, tmp_path / "report.html")
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_run_whose_name_is_no_text_has_a_report(tmp_path, monkeypatch, records):
    name = os.fsdecode(b"run \xff")
    monkeypatch.setattr(report, "collect", lambda *_: dataclasses.replace(records, name=name))
    monkeypatch.setattr(report, "sections", lambda *_: [])
    report.write_report(None, None, None, tmp_path / "report.html")
    assert r"<h1>run \udcff</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_full_disk_leaves_the_report_that_was_there(model, data, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", model)
    output = tmp_path / "report.html"
    output.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left"):
        report.write_report(run, model, data, output)
    assert output.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run"]
