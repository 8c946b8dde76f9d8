import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc
from graphcaps.passing import builtin

ROOT = Path(__file__).parents[1]


def script(name, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_papers_recipe_runs_from_images_to_test_accuracy():
    digits = str(ROOT / "tests" / "digits")
    out = script(
        "train_mnist.py",
        *("--dataset", digits, "--preset", "small", "--epochs", "3", "--batch-size", "24"),
    )
    assert out.count("validation accuracy") == 3
    errors = int(out.splitlines()[-1].split(", ")[1].split()[0])
    assert errors < 50  # of 100; a net that learnt nothing has 90


def test_the_benchmark_measures_every_form_and_writes_what_it_measured(tmp_path):
    output = tmp_path / "routing.json"
    sizes = ("--layer.batch", "3", "--layer.children", "40", "--threads", "1", "--rounds", "6")
    out = script("bench_routing.py", *sizes, "--short", "--output", str(output))
    results = json.loads(output.read_text())
    for form in ("dense", "udf", "builtin", "scatter", "fused"):
        assert f"| {form} |" in out
        assert results["relative_error"][form] < 1e-4
        for mode in ("inference", "forward", "forward+backward"):
            assert len(results["seconds"][mode][form]) == 2
            assert mode in results["peak_mib"][form]


def test_the_benchmark_times_no_form_that_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_routing

    layer = bench_routing.Layer(batch=2, children=12, parents=3)
    options = bench_routing.Options(layer=layer, rounds=2)
    monkeypatch.setattr(builtin.BuiltinEngine, "agreement", lambda self, u_hat, v: u_hat[:, :1] * 0)
    results = bench_routing.measure(layer, ("dense", "builtin", "scatter"), ("inference",), options)
    assert results["relative_error"]["builtin"] > 1e-3
    assert set(results["seconds"]["inference"]) == {"dense", "scatter"}


def test_a_training_step_is_timed_with_and_without_routing(tmp_path):
    output = tmp_path / "training.json"
    sizes = ("--preset", "small", "--batch", "2", "--threads", "1", "--rounds", "2")
    out = script("bench_training.py", *sizes, "--output", str(output))
    results = json.loads(output.read_text())
    assert "| without routing | " in out
    for form in ("dense", "udf", "builtin", "scatter", "fused", "fused, compiled"):
        assert f"| {form} | " in out
        assert results["relative_error"][form] < 1e-4
    assert {len(x) for x in results["seconds"].values()} == {2}


def test_no_training_step_is_timed_that_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_training

    options = bench_training.Options(preset="small", batch=2)
    monkeypatch.setattr(builtin.BuiltinEngine, "agreement", lambda self, u_hat, v: u_hat[:, :1] * 0)
    trainings = {form: bench_training.Training(form, options) for form in ("dense", "builtin")}
    wrong = bench_training.errors(trainings)
    assert wrong["dense"] == 0
    assert wrong["builtin"] > bench_training.ALLOWED_ERROR


def test_layers_that_the_training_benchmark_compares_compute_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_training

    graph = gc.complete_graph(6, 3)
    uniform = gc.CapsuleLayer(graph, 4, 5, routing="uniform")
    dynamic = gc.CapsuleLayer(graph, 4, 5)
    u = torch.randn(2, 6, 4)
    assert_close(bench_training.Unrouted(uniform)(u), uniform(u))
    assert_close(bench_training.Dense(dynamic)(u), dynamic(u))


def test_the_readmes_tables_are_those_of_the_measured_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import write_benchmarks

    readme = (ROOT / "README.md").read_text()
    assert write_benchmarks.with_tables(readme) == readme
    spoiled = readme.replace("| fused | ", "| fused | 1")
    assert spoiled != readme
    assert write_benchmarks.with_tables(spoiled) == readme


def test_what_was_not_measured_on_a_gpu_is_not_said(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import write_benchmarks

    monkeypatch.setattr(write_benchmarks, "BENCHMARKS", tmp_path)
    assert write_benchmarks._on_a_gpu().count("| not measured |") == 5
    times = {"dense": [8.0, 8.0], "compiled": [4.0, 4.0], "fused": [1.0, 1.0]}
    peaks = {form: {"forward+backward": mib} for form, mib in (("dense", 200.0), ("fused", 8.0))}
    layer = {"machine": {"gpu": "a GPU"}, "seconds": {"forward+backward": times}}
    (tmp_path / "routing-cuda-512.json").write_text(json.dumps(layer | {"peak_mib": peaks}))
    run = {"seconds": 45.0, "epochs": 30, "test_accuracy": 0.9962}
    (tmp_path / "train-cuda.json").write_text(json.dumps(run))
    table = write_benchmarks._on_a_gpu()
    assert table.count("| not measured |") == 1
    for said in ("| 0.12 of dense, 0.25 of compiled (a GPU) |", "| 0.04 of dense (batch 512) |"):
        assert said in table
    for said in ("| 1.5 s, with validation and files |", "| 99.62% in 45 s |"):
        assert said in table


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import release

    return release


NAMES_VERSION = ("graphcaps/__init__.py", "CITATION.cff", "CHANGELOG.md")


def test_the_files_that_name_the_version_agree():
    init, citation, changelog = ((ROOT / name).read_text() for name in NAMES_VERSION)
    assert f'__version__ = "{gc.__version__}"' in init
    released = re.search(r"^date-released: (.*)$", citation, re.MULTILINE)[1]
    assert f"\nversion: {gc.__version__}\n" in citation
    assert f"\n## [{gc.__version__}] - {released}\n" in changelog


def test_a_release_writes_its_version_where_the_old_one_stood(release):
    texts = {name: (ROOT / name).read_text() for name in NAMES_VERSION}
    texts["CHANGELOG.md"] = (
        "# Changelog\n\n## [Unreleased]\n\n- A thing.\n\n## [0.1.0] - 2026-11-22\n"
    )
    new = release.with_version(texts, "12.0.3", "2030-01-02")
    assert new.keys() == texts.keys()
    assert '__version__ = "12.0.3"' in new["graphcaps/__init__.py"]
    assert "\nversion: 12.0.3\ndate-released: 2030-01-02\n" in new["CITATION.cff"]
    assert new["CHANGELOG.md"].splitlines()[2:8] == [
        *("## [Unreleased]", "", "## [12.0.3] - 2030-01-02", "", "- A thing.", "")
    ]
    for version, said in (
        ("0.0.9", f"above {gc.__version__}"),
        ("next", "such as 0.2.0"),
        ("12.0.3", "nothing under Unreleased"),
    ):
        empty = texts | {"CHANGELOG.md": "## [Unreleased]\n\n## [0.1.0] - 2026-11-22\n"}
        with pytest.raises(ValueError, match=said):
            release.with_version(empty, version, "2030-01-02")
