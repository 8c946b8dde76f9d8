import json
import subprocess
import sys
from pathlib import Path

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
        *("--dataset", digits, "--preset", "small", "--epochs", "6", "--batch-size", "24"),
    )
    assert out.count("accuracy on the hold-out") == 6
    errors = int(out.splitlines()[-1].split(", ")[1].split()[0])
    assert errors < 50  # of 100; a net that learnt nothing has 90


def test_the_benchmark_measures_every_form_and_writes_what_it_measured(tmp_path):
    output = tmp_path / "routing.json"
    sizes = ("--layer.batch", "3", "--layer.children", "40", "--threads", "1", "--rounds", "3")
    out = script("bench_routing.py", *sizes, "--output", str(output))
    results = json.loads(output.read_text())
    for form in ("dense", "fused", "udf", "builtin", "scatter"):
        assert f"| {form} |" in out
        assert results["relative_error"][form] < 1e-4
        for mode in ("forward", "forward+backward"):
            assert len(results["seconds"][form][mode]) == 3
            assert results["peak_mib"][form][mode] >= 0
