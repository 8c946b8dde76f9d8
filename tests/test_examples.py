import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc

GRAPHS = 24


@pytest.fixture(scope="module")
def example():
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    import graph_classification

    yield graph_classification
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rings of 3 to 6 nodes in the format of GINDataset, whose class is the tag of their nodes."""
    lines = [str(GRAPHS)]
    for graph in range(GRAPHS):
        nodes, label = 3 + graph % 4, graph // 2 % 2
        lines.append(f"{nodes} {label}")
        lines += [f"{label} 2 {(n + 1) % nodes} {(n - 1) % nodes}" for n in range(nodes)]
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "RINGS").mkdir()
    (folder / "RINGS" / "RINGS.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_the_graph_classifier_prints_and_writes_a_table(example, folder, monkeypatch, capsys):
    output = folder / "rings.json"
    asked = ["RINGS", "--data", str(folder), "--epochs", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["graph_classification.py", *asked])
    example.main()
    readouts = json.loads(output.read_text())
    assert list(readouts) == ["dynamic", "uniform", "mean"]
    assert {len(measured["folds"]) for measured in readouts.values()} == {10}
    assert capsys.readouterr().out.splitlines()[2:] == rows_of(readouts)
    sizes = [measured["folds"][0]["parameters"] for measured in readouts.values()]
    assert max(sizes) - min(sizes) <= 0.01 * min(sizes)


def rows_of(readouts):
    """The table of a file of figures."""
    rows = []
    for name, measured in readouts.items():
        tests = [100 * fold["test"] for fold in measured["folds"]]
        accuracy = f"{statistics.mean(tests):.1f} ± {statistics.stdev(tests):.1f} %"
        size = measured["folds"][0]["parameters"]
        rows.append(f"| {name} | {size:,} | {accuracy} | {measured['seconds']:.0f} s |")
    return rows


def test_every_readout_learns_what_the_nodes_tags_tell(example, folder):
    data = example.load("RINGS", folder)
    parts = example.split(data.labels, 4)
    for readout in ("dynamic", "uniform", "mean"):
        assert example.run_fold(readout, data, parts, fold=1, epochs=12)["test"] == 1


def test_the_test_part_has_no_say_in_training_nor_in_the_choice_of_the_epoch(example, folder):
    data = example.load("RINGS", folder)
    parts = example.split(data.labels, 4)
    honest = example.run_fold("mean", data, parts, fold=2, epochs=3)
    data.labels[parts[2]] = 1 - data.labels[parts[2]]
    spoiled = example.run_fold("mean", data, parts, fold=2, epochs=3)
    assert spoiled == honest | {"test": 1 - honest["test"]}


def test_every_part_has_every_graph_once_and_classes_in_equal_shares(example):
    labels = torch.tensor([0, 0, 1] * 20)
    parts = example.split(labels, 5)
    assert sorted(torch.cat(parts).tolist()) == list(range(60))
    assert [labels[part].bincount().tolist() for part in parts] == [[8, 4]] * 5
    assert torch.equal(parts[0], example.split(labels, 5)[0])


def test_every_node_votes_for_the_capsules_of_its_own_graph(example):
    nodes, capsules = torch.tensor([3, 1]), example.GRAPH_CAPSULES
    graph = example.pooling_graph(nodes)
    layer = gc.CapsuleLayer(kinds=capsules, child_dim=2, parent_dim=5)
    u = torch.randn(4, 2)
    v = layer(u, graph=graph).unflatten(0, (2, capsules))
    for own, found in zip(u.split(nodes.tolist()), v, strict=True):
        u_hat = torch.einsum("ik,jkd->ijd", own, layer.weight).unsqueeze(0)
        expected, _ = gc.reference.dynamic_routing(u_hat, iterations=3)
        assert_close(found, expected.squeeze(0))
    assert graph.batch_num_edges().tolist() == [3 * capsules, capsules]


def test_the_tables_in_the_folders_readme_are_those_of_the_measured_files():
    root = Path(__file__).parents[1]
    files = sorted((root / "benchmarks").glob("graphs-*.json"))
    rows = [row for file in files for row in rows_of(json.loads(file.read_text()))]
    assert rows
    lines = (root / "examples" / "README.md").read_text().splitlines()
    assert [line for line in lines if " ± " in line and "std" not in line] == rows
