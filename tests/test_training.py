import errno
import gzip
import io
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import fake_cuda_graph
import pytest
import torch
from run_records import step_metrics
from torch.testing import assert_close

from graphcaps import cli
from graphcaps.data.datasets import load_dataset
from graphcaps.nets.model import PRESETS, CapsNet
from graphcaps.training import loop
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.evaluation import Score, evaluate
from graphcaps.training.loop import Trainer, TrainingDivergedError, TrainingInterrupt, train
from graphcaps.training.settings import (
    RECIPES,
    Recipe,
    RunSettings,
    TrainSettings,
    choose_preset,
    make_recipe,
    make_schedule,
    resume_settings,
    with_absolute_paths,
)
from graphcaps.training.workers import Workers

DIGITS = Path(__file__).parent / "digits"
NOWHERE = ("hpu", "mtia", "privateuseone", "mps", "opengl", "cuda:77")  # devices that torch knows
CPU = Workers(rank=0, size=1, device=torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch):
    sizes = dict(conv_channels=8, capsule_maps=2, decoder_hidden=(8,))
    monkeypatch.setitem(PRESETS, "small", replace(PRESETS["small"], **sizes))


def settings(run, **changes):
    asked = TrainSettings(dataset=str(DIGITS), run_dir=run, epochs=2, batch_size=49, device="cpu")
    return replace(asked, **changes)


def trainer(run, **changes):
    asked = settings(run, **changes)
    data = load_dataset(asked.dataset)
    recipe = make_recipe(asked, "small", len(data.train.labels))
    run_folder = RunFolder(run)
    run.mkdir()
    return Trainer(asked, recipe, data, CPU, run_folder)


def weights(run):
    return RunFolder(run).last_checkpoint().joinpath("model.safetensors").read_bytes()


def interrupt_at(step, monkeypatch, *signals):
    """Send Ctrl-C or another signal once, during a step."""
    take_step, to_come = Trainer._take_step, [*(signals or [signal.SIGINT])]

    def interrupted(self, *args):
        if self.step == step:
            while to_come:
                os.kill(os.getpid(), to_come.pop())
        return take_step(self, *args)

    monkeypatch.setattr(Trainer, "_take_step", interrupted)


@pytest.mark.parametrize("step", [0, 3, 5, 7])  # of 6 in an epoch: first, middle, last, second's
def test_a_resumed_run_ends_with_the_very_weights_of_one_never_stopped(
    step, tmp_path, monkeypatch, capsys
):
    unbroken = train(settings(tmp_path / "unbroken"))
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(KeyboardInterrupt, match=f"stopped; saved as .*step-{step + 1:08d}"):
            train(settings(tmp_path / "stopped"))
    torch.rand(7)  # whatever happens in between
    resumed = train(TrainSettings(run_dir=tmp_path / "stopped", resume=True))
    assert weights(tmp_path / "stopped") == weights(tmp_path / "unbroken")
    timeless = {"seconds", "run"}
    assert {k: v for k, v in resumed.items() if k not in timeless} == {
        k: v for k, v in unbroken.items() if k not in timeless
    }
    logs = [RunFolder(tmp_path / name).metrics() for name in ("unbroken", "stopped")]
    for record in logs[0] + logs[1]:
        del record["seconds"]
    assert logs[0] == logs[1]


def test_what_a_killed_run_wrote_after_its_checkpoint_is_forgotten(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for step in (1, 2, 3):
        run.log(step_metrics(step))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # killed while writing
    (tmp_path / "run" / "best").mkdir()
    (tmp_path / "run" / "best" / ".model.safetensors.77.unfinished").touch()
    (tmp_path / "run" / "checkpoints" / ".step-00000003.unfinished").mkdir(parents=True)
    run.forget_after(2)
    assert [record["step"] for record in run.metrics()] == [1, 2]
    assert not list((tmp_path / "run").rglob("*unfinished"))


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own(tmp_path):
    here = trainer(tmp_path / "run")
    (first, shifts), (again, _), (second, moved) = here._plan(0), here._plan(0), here._plan(1)
    assert sorted(first.tolist()) == list(range(294))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert set(shifts.flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert not torch.equal(shifts, moved)


def test_the_seed_draws_weights_order_and_shifts(tmp_path):
    one, same, other = (trainer(tmp_path / str(n), seed=s) for n, s in enumerate((1, 1, 2)))
    for get in (
        lambda t: t.model.capsules.weight,
        lambda t: t._plan(0)[0],
        lambda t: t._plan(0)[1],
    ):
        assert torch.equal(get(one), get(same))
        assert not torch.equal(get(one), get(other))


def test_a_resumed_run_goes_on_with_the_random_numbers_of_the_stopped_one(tmp_path):
    stopped = trainer(tmp_path / "run")
    torch.rand(3)
    stopped._save_checkpoint()
    expected = torch.rand(5)
    resumed = Trainer(stopped.settings, stopped.recipe, stopped.data, CPU, stopped.run)
    resumed.resume()
    assert torch.equal(torch.rand(5), expected)


def test_a_resumed_optimizer_keeps_the_options_of_this_device(tmp_path):
    stopped = trainer(tmp_path / "run")
    order, shifts = stopped._plan(0)
    stopped._take_step(order[:5], shifts[:5])
    stopped.step = 1
    stopped._save_checkpoint()
    resumed = Trainer(stopped.settings, stopped.recipe, stopped.data, CPU, stopped.run)
    weights = resumed.model.parameters()
    resumed.optimizer = torch.optim.Adam(weights, lr=stopped.recipe.learning_rate, fused=True)
    resumed.schedule = make_schedule(resumed.optimizer, stopped.recipe, stopped.steps_per_epoch)
    resumed.resume()
    (here,), (there,) = resumed.optimizer.param_groups, stopped.optimizer.param_groups
    assert (here["fused"], here["lr"], here["betas"]) == (True, there["lr"], there["betas"])


def test_a_run_of_an_older_version_resumes_with_the_strides_of_this_one(tmp_path):
    stopped = trainer(tmp_path / "run")
    for module in stopped.model.modules():  # as version 0.1.0
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.contiguous()
    order, shifts = stopped._plan(0)
    stopped._take_step(order[:5], shifts[:5])
    stopped.step = 1
    stopped._save_checkpoint()
    resumed = Trainer(stopped.settings, stopped.recipe, stopped.data, CPU, stopped.run)
    resumed.resume()
    for one in (stopped, resumed):
        one._take_step(order[5:10], shifts[5:10])
    differ = 0
    for there, here in zip(stopped.model.parameters(), resumed.model.parameters(), strict=True):
        differ += there.stride() != here.stride()
        assert resumed.optimizer.state[here]["exp_avg"].stride() == here.stride()
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)
    assert differ


def test_processes_that_see_other_checkpoints_do_not_go_on_together(tmp_path, monkeypatch):
    stopped = trainer(tmp_path / "run")
    stopped._save_checkpoint()
    monkeypatch.setattr(Workers, "agree", lambda *_: 7)
    with pytest.raises(RuntimeError, match="do not see the same checkpoints"):
        stopped.resume()


def test_the_rate_of_each_step_is_the_schedules(tmp_path):
    here = trainer(tmp_path / "run", learning_rate=0.002)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(optimizer, here.recipe, here.steps_per_epoch)
    order, shifts = here._plan(0)
    for _ in range(3):
        assert here.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        here._take_step(order[:5], shifts[:5])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("flip", [False, True])
def test_a_step_sees_the_planned_images_shifted_and_mirrored(flip, tmp_path, monkeypatch):
    here = trainer(tmp_path / "run", flip=flip)
    seen = []
    monkeypatch.setattr(
        here, "parallel", lambda images, labels: seen.append((images, labels)) or here.model(images)
    )
    order, moves = here._plan(0)
    assert moves.shape == (294, 3 if flip else 2)
    here._take_step(order[:9], moves[:9])
    images, labels = seen[0]
    assert torch.equal(labels, here.data.train.labels[order[:9]])
    mirrored_ones = set()
    for image, number, move in zip(images, order[:9], moves[:9].tolist(), strict=True):
        down, right, *mirrored = move
        mirrored_ones.update(mirrored)
        pixels = here.data.train.images[number].float() / 255
        expected = torch.zeros(1, 32, 32)
        expected[:, 2 + down : 30 + down, 2 + right : 30 + right] = pixels
        expected = expected[:, 2:30, 2:30]
        assert torch.equal(image, expected.flip(2) if mirrored == [1] else expected)
    assert mirrored_ones == ({0, 1} if flip else set())


def test_a_flipped_epoch_has_the_order_and_shifts_of_one_that_is_not(tmp_path):
    plain, flipped = (trainer(tmp_path / str(flip), flip=flip) for flip in (False, True))
    (order, shifts), (same, moves) = plain._plan(3), flipped._plan(3)
    assert torch.equal(order, same) and torch.equal(shifts, moves[:, :2])
    assert 100 < int(moves[:, 2].sum()) < 194


def test_training_names_the_engine_that_it_takes(tmp_path):
    assert "engine fused on cpu" in trainer(tmp_path / "auto").describe()
    assert "engine udf on cpu" in trainer(tmp_path / "udf", engine="udf").describe()


def test_the_holdout_selects_the_best_epoch_and_the_test_set_is_used_once(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.25])
    evaluated, saved = [], []

    def scripted(model, split, **_):
        evaluated.append(len(split.labels))
        if len(split.labels) == 26:  # the validation set
            saved.append(model.capsules.weight.detach().clone())
            wrong = torch.arange(100) < round(100 * (1 - next(accuracies)))
            lengths = torch.stack([wrong, ~wrong], dim=1).float()
            return Score(lengths, labels=torch.ones(100), loss=1.0)
        assert torch.equal(model.capsules.weight, saved[1])
        return evaluate(model, split)

    monkeypatch.setattr(loop, "evaluate", scripted)
    result = train(settings(tmp_path / "run", epochs=3))
    assert evaluated == [26, 26, 26, 100]
    assert (result["best_epoch"], result["holdout_accuracy"]) == (2, 0.75)
    assert torch.equal(CapsNet.load(tmp_path / "run" / "best").capsules.weight, saved[1])


def test_training_reduces_the_loss(tmp_path):
    train(settings(tmp_path / "run", epochs=20))
    epochs = [r for r in RunFolder(tmp_path / "run").metrics() if r["kind"] == "epoch"]
    assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    assert epochs[-1]["holdout_accuracy"] > 0.5


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_last_good_checkpoint(
    tmp_path, monkeypatch
):
    loss = loop.capsnet_loss
    calls = []

    def spoiled(*args, **options):
        calls.append(1)
        return loss(*args, **options) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(loop, "capsnet_loss", spoiled)
    with pytest.raises(TrainingDivergedError) as caught:
        train(settings(tmp_path / "run", checkpoint_every=2, learning_rate=0.002))
    said = str(caught.value)
    assert "the loss is not finite at step 5" in said
    assert "learning rate 0.00" in said
    assert str(tmp_path / "run" / "checkpoints" / "step-00000004") in said


@pytest.fixture
def looks_seldom(monkeypatch):
    """Synchronise rarely, as on a GPU."""
    build = Trainer.__init__

    def seldom(self, *args):
        build(self, *args)
        self._look_every = loop.STEPS_PER_RECORD

    monkeypatch.setattr(Trainer, "__init__", seldom)


def test_looking_seldom_changes_no_weight_and_no_record(tmp_path, request):
    asked = dict(epochs=4, checkpoint_every=7)  # 24 steps: records, checkpoints and ends apart
    often = train(settings(tmp_path / "often", **asked))
    request.getfixturevalue("looks_seldom")
    seldom = train(settings(tmp_path / "seldom", **asked))
    assert weights(tmp_path / "seldom") == weights(tmp_path / "often")
    assert seldom["test_loss"] == often["test_loss"]
    for one, other in zip(
        RunFolder(tmp_path / "seldom").metrics(),
        RunFolder(tmp_path / "often").metrics(),
        strict=True,
    ):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.usefixtures("looks_seldom")
def test_looking_seldom_still_tells_the_step_that_diverged_and_saves_nothing_after_it(
    tmp_path, monkeypatch
):
    loss, calls = loop.capsnet_loss, []

    def spoiled(*args, **options):
        calls.append(1)
        return loss(*args, **options) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(loop, "capsnet_loss", spoiled)
    monkeypatch.setattr("graphcaps.layers._check_finite", lambda *_: None)  # as on a GPU
    with pytest.raises(TrainingDivergedError, match="the loss is not finite at step 5"):
        train(settings(tmp_path / "run", checkpoint_every=4))
    assert RunFolder(tmp_path / "run").last_checkpoint().name == "step-00000004"


@pytest.mark.usefixtures("looks_seldom")
def test_an_interrupt_is_heeded_at_the_next_look(tmp_path, monkeypatch):
    interrupt_at(2, monkeypatch)
    with pytest.raises(TrainingInterrupt):
        train(settings(tmp_path / "run", checkpoint_every=4))
    assert RunFolder(tmp_path / "run").last_checkpoint().name == "step-00000004"


@pytest.fixture
def captures(monkeypatch):
    """Use a stand-in for CUDA graphs, without checks that read values, as on a GPU."""

    def multi_hot(labels, batch, classes):
        return torch.zeros(batch, classes, dtype=torch.int64).scatter(1, labels[:, None], 1)

    monkeypatch.setattr(loop, "_check_capture", lambda *_: None)
    monkeypatch.setattr("graphcaps.layers._check_finite", lambda *_: None)
    for module in ("losses", "model"):
        monkeypatch.setattr(f"graphcaps.nets.{module}.multi_hot", multi_hot)
    return fake_cuda_graph.install(monkeypatch)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_captured_run_ends_with_the_very_weights_of_a_plain_one(tmp_path, request, amp):
    asked = dict(engine="scatter", checkpoint_every=4, amp=amp)
    plain = train(settings(tmp_path / "plain", **asked))
    graphs = request.getfixturevalue("captures")
    captured = train(settings(tmp_path / "captured", **asked, cuda_graph=True))
    assert len(graphs) == 1
    assert weights(tmp_path / "captured") == weights(tmp_path / "plain")
    assert captured["test_loss"] == plain["test_loss"]


def test_a_run_is_resumed_with_a_cuda_graph_or_without(tmp_path, request, monkeypatch):
    plain = train(settings(tmp_path / "plain", engine="scatter"))
    graphs = request.getfixturevalue("captures")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings(tmp_path / "run", engine="scatter", cuda_graph=True))
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(TrainSettings(run_dir=tmp_path / "run", resume=True))
    assert len(graphs) == 1
    again = train(TrainSettings(run_dir=tmp_path / "run", resume=True, cuda_graph=True))
    assert len(graphs) == 2
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    assert again["test_loss"] == plain["test_loss"]


@pytest.mark.parametrize(
    ("device", "processes", "engine", "said"),
    [
        ("cpu", 1, "auto", "this is trained on cpu"),
        ("cuda", 2, "fused", "2 processes train together"),
        ("cuda", 1, "scatter", "the engine is scatter"),
    ],
)
def test_a_cuda_graph_that_cannot_be_recorded_is_refused(
    device, processes, engine, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "choose_engine", lambda *_: engine)
    workers = Workers(rank=0, size=processes, device=torch.device(device))
    with pytest.raises(ValueError, match=f"--cuda-graph is for one process.*{said}"):
        loop._check_capture(settings(tmp_path, engine=engine, cuda_graph=True), workers)


def test_a_rate_far_too_high_diverges_and_never_saves_what_is_not_finite(tmp_path):
    with pytest.raises(TrainingDivergedError, match="is not finite at step"):
        train(settings(tmp_path / "run", checkpoint_every=1, learning_rate=1e30))
    checkpoint = RunFolder(tmp_path / "run").last_checkpoint()
    if checkpoint is not None:
        model = CapsNet.load(checkpoint)
        assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    here = trainer(tmp_path / "run")
    here._save_checkpoint()
    with torch.no_grad():
        here.model.capsules.weight[0, 0, 0] = torch.inf
    here.step = 1
    with pytest.raises(TrainingDivergedError, match="a weight is not finite"):
        here._save_checkpoint()
    assert RunFolder(tmp_path / "run").last_checkpoint().name == "step-00000000"


@pytest.mark.parametrize("routing", ["dynamic", "uniform"])
@pytest.mark.parametrize("engine", ["udf", "builtin", "scatter", "fused"])
def test_every_engine_and_routing_trains(engine, routing, tmp_path):
    result = train(settings(tmp_path / "run", epochs=1, engine=engine, routing=routing))
    assert result["test_images"] == 100


def test_bfloat16_trains_close_to_float32(tmp_path):
    plain, amp = trainer(tmp_path / "plain"), trainer(tmp_path / "amp", amp="bf16")
    order, shifts = plain._plan(0)
    for here in (plain, amp):
        here._take_step(order[:49], shifts[:49])
    here, there = (t.model.capsules.weight.grad for t in (plain, amp))
    assert not torch.equal(here, there)
    assert_close(there, here, rtol=0.05, atol=0.05 * float(here.abs().max()))


def test_tensorboard_gets_what_metrics_jsonl_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(tmp_path / "run", tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [r for r in RunFolder(tmp_path / "run").metrics() if r["kind"] == "epoch"]
    shown = events.Scalars("epoch/train_loss")
    assert [event.step for event in shown] == [record["step"] for record in logged]
    assert_close([event.value for event in shown], [record["train_loss"] for record in logged])


def test_the_papers_rate_decays_by_0_96_every_2000_steps():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = make_schedule(optimizer, RECIPES["paper"], steps_per_epoch=429)
    rates = []
    for _ in range(4001):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert_close([rates[0], rates[2000], rates[4000]], [1e-3, 0.96e-3, 0.96**2 * 1e-3])
    assert_close(rates[1000], 0.96**0.5 * 1e-3)  # without steps, as in the authors' code


@pytest.mark.parametrize("preset", RECIPES)
def test_a_schedule_that_starts_in_the_middle_goes_on_as_one_that_came_there(preset):
    came, starts = (torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]) for _ in range(2))
    schedules = [make_schedule(optimizer, RECIPES[preset], 100) for optimizer in (came, starts)]
    for _ in range(37):
        came.step()
        schedules[0].step()
    schedules[1] = make_schedule(starts, RECIPES[preset], 100, step=37)
    for _ in range(3):
        assert starts.param_groups == came.param_groups
        for optimizer, schedule in zip((came, starts), schedules, strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_one_cycle_goes_up_to_the_rate_and_down_to_nothing(steps):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    recipe = Recipe("small", epochs=1, batch_size=1, learning_rate=0.1, schedule="one-cycle")
    schedule = make_schedule(optimizer, recipe, steps_per_epoch=steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert len(rates) == steps
    assert max(rates) <= 0.1 + 1e-12
    if steps == 50:
        assert max(rates) > 0.099
        assert rates[0] < 0.01
        assert rates[-1] < 0.001


def test_auto_trains_the_papers_net_on_cuda_and_the_small_one_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choose_preset(TrainSettings(), torch.device("cuda"))[0] == "paper"
    preset, why = choose_preset(TrainSettings(), torch.device("cpu"))
    assert preset == "small"
    assert "for CUDA" in why
    assert choose_preset(TrainSettings(preset="paper"), torch.device("cpu"))[0] == "paper"


def test_small_data_sets_are_passed_over_until_400_steps_unless_epochs_are_given():
    assert make_recipe(TrainSettings(), "small", 55_000).epochs == 4
    assert make_recipe(TrainSettings(), "small", 4_000).epochs == 10
    assert make_recipe(TrainSettings(epochs=3), "small", 4_000).epochs == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(dataset="mnits"), "mnist, fashion-mnist"),
        (dict(batch_size=295), "--batch-size from 1 to the 294"),
        (dict(resume=True), "no run at"),
        (dict(resume=True, run_dir=None), "add --run-dir FOLDER"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_and_leave_nothing(changes, said, tmp_path):
    asked = replace(settings(tmp_path / "run"), **changes)
    with pytest.raises((ValueError, OSError, RuntimeError), match=said):
        train(asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(epochs=0), "epochs must be at least 1; got 0"),
        (dict(epochs=10**400), "epochs must be at most 1000000; got 1000"),
        (dict(batch_size=0), "batch_size must be at least 1; got 0"),
        (dict(batch_size=10**400), "batch_size must be at most"),
        (dict(iterations=0), "iterations must be at least 1"),
        (dict(iterations=10**12), "iterations must be at most 1000; got 1000000000000"),
        (dict(shift=-1), "shift must be at least 0"),
        (dict(shift=2**63), "shift must be at most 1000"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(seed=2**64), "seed must be at most"),
        (dict(checkpoint_every=0), "checkpoint_every must be at least 1"),
        (dict(checkpoint_every=10**400), "checkpoint_every must be at most"),
        (dict(learning_rate=0.0), "must be above 0"),
        (dict(learning_rate=float("nan")), "must be above 0"),
        (dict(learning_rate=1e308), r"at most 3.4e\+38; got 1e\+308"),
        (dict(device="meta"), "unknown device 'meta'"),
        (dict(device="gpu"), "unknown device 'gpu'"),
        *((dict(device=name), f"device '{name}' is not there: ") for name in NOWHERE),
        (dict(run_dir=Path("r" * 256)), "File name too long"),
        (dict(run_dir=Path("/".join(["r" * 200] * 20), "r" * 50)), "File name too long"),
        (dict(run_dir=Path(__file__) / "run"), "Not a directory"),
        (dict(run_dir=Path("/proc/run")), "could not be written"),
        (dict(run_dir=Path("caf\udce9")), r"path in UTF-8 as run_dir.* got b'caf\\xe9'"),
        (dict(data_dir=Path("caf\udce9")), "path in UTF-8 as data_dir"),
    ],
)
def test_settings_that_no_data_allow_are_refused_in_a_sentence_before_any_work(
    changes, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "load_dataset", lambda *_: pytest.fail("data are loaded"))
    asked = replace(settings(tmp_path / "run"), **changes)
    with pytest.raises((ValueError, OSError, RuntimeError), match=said) as caught:
        train(asked)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(asked.run_dir))
    assert not list(tmp_path.iterdir())


def test_few_images_make_one_batch():
    assert make_recipe(TrainSettings(), "small", 55).batch_size == 55
    assert make_recipe(TrainSettings(), "small", 101).batch_size == 100


def test_a_run_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        train(settings(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["diary.txt"]


def test_a_start_that_was_killed_before_there_was_a_run_can_be_made_again(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".settings.json.77.unfinished").write_text('{"sett')
    with pytest.raises(FileNotFoundError, match="no run at"):
        train(TrainSettings(run_dir=run, resume=True))
    train(settings(run, epochs=1))
    assert not list(run.glob(".*"))


def test_nothing_is_left_behind_but_the_files_of_the_run(tmp_path):
    train(settings(tmp_path / "run", checkpoint_every=2))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    parts = ("model.json", "model.safetensors")
    assert files == {
        *(f"run/{name}" for name in ("settings.json", "metrics.jsonl", "result.json")),
        *(f"run/best/{name}" for name in parts),
        *(
            f"run/checkpoints/step-{step:08d}/{name}"
            for step in (10, 12)
            for name in (*parts, "training.pt", "SHA256SUMS")
        ),
    }


def test_a_second_start_while_the_first_loads_its_data_is_refused(tmp_path, monkeypatch):
    load, refusals = loop.load_dataset, []

    def slow(*args, **options):
        if not refusals:
            refusals.append("another process is training in")
            with pytest.raises(RuntimeError, match=refusals[0]):
                train(settings(tmp_path / "run"))
        return load(*args)

    monkeypatch.setattr(loop, "load_dataset", slow)
    train(settings(tmp_path / "run", epochs=1))
    assert refusals


def test_a_second_start_sees_what_the_first_wrote_until_it_had_the_lock(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(TrainingInterrupt):
            train(settings(run.path))
    asked = TrainSettings(run_dir=run.path, resume=True)
    lock, first = RunFolder.locked, []

    def late(self):
        if not first:
            first.append(None)
            first[0] = train(asked), run.metrics(), weights(run.path)
        return lock(self)

    monkeypatch.setattr(RunFolder, "locked", late)
    assert train(asked) == first[0][0]
    assert (run.metrics(), weights(run.path)) == first[0][1:]


def test_a_resumed_run_cannot_change_its_settings(tmp_path):
    settled = replace(settings(tmp_path / "run"), epochs=5, seed=3)
    started = RunSettings(settled, make_recipe(settled, "small", 294), {})
    asked = TrainSettings(run_dir=tmp_path / "moved", resume=True, engine="udf")
    resumed = with_absolute_paths(
        replace(settled, run_dir=tmp_path / "moved", resume=True, engine="udf")
    )
    assert resume_settings(asked, started) == resumed
    with pytest.raises(ValueError, match="epochs is 5, not 6"):
        resume_settings(replace(asked, epochs=6), started)


def test_a_flag_that_is_given_counts_on_resume_though_it_is_the_default(tmp_path):
    settled = replace(settings(tmp_path / "run"), engine="udf", seed=3)
    started = RunSettings(settled, make_recipe(settled, "small", 294), {})
    asked = TrainSettings(run_dir=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="seed is 3, not 0"):
        resume_settings(asked, started, given={"run_dir", "resume", "seed"})
    with pytest.raises(ValueError, match=r"dataset is .*digits, not 'mnist'"):
        resume_settings(asked, started, given={"run_dir", "resume", "dataset"})
    assert resume_settings(asked, started, {"run_dir", "resume"}).engine == "udf"
    assert resume_settings(asked, started, {"run_dir", "resume", "engine"}).engine == "auto"


@pytest.mark.parametrize(
    "again", [dict(batch_size=49), dict(preset="small"), dict(preset="auto"), dict(epochs=9)]
)
def test_a_flag_that_repeats_what_the_run_has_is_accepted_on_resume(again, tmp_path):
    settled = replace(settings(tmp_path / "run"), epochs=None)
    started = RunSettings(settled, replace(make_recipe(settled, "small", 294), epochs=9), {})
    asked = TrainSettings(run_dir=tmp_path / "run", resume=True, **again)
    assert resume_settings(asked, started, again).epochs is None


def test_the_program_refuses_a_given_flag_that_differs_from_the_run(tmp_path, monkeypatch, capsys):
    started = settings(tmp_path / "run", seed=3)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(TrainingInterrupt):
            train(started)
    resume = ["graphcaps", "train", "--run-dir", str(tmp_path / "run"), "--resume"]
    for seed in (["--seed", "0"], ["--seed=0"]):
        monkeypatch.setattr("sys.argv", [*resume, *seed])
        assert cli.main() == 1
        assert "seed is 3, not 0" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*resume, "--seed", "3"])
    assert cli.main() == 0


def test_a_run_resumes_from_another_working_folder_on_the_device_it_was_started_on(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(DIGITS)
    asked = settings(tmp_path / "run", dataset="digits", data_dir=Path("here"))
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(asked)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    started = RunFolder(tmp_path / "run").settings()
    resumed = resume_settings(TrainSettings(run_dir=tmp_path / "run", resume=True), started)
    assert (resumed.device, resumed.data_dir) == ("cpu", tmp_path / "here")
    assert train(resumed)["test_images"] == 100


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of twelve steps, interrupted after the fourth, with checkpoints of the last two."""
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(TrainingInterrupt):
            train(settings(tmp_path / "stopped", checkpoint_every=1))
    return RunFolder(tmp_path / "stopped")


def resume(run):
    return train(TrainSettings(run_dir=run.path, resume=True))


@pytest.fixture
def digits(tmp_path):
    """A copy of the digits that a test may change."""
    return Path(shutil.copytree(DIGITS, tmp_path / "digits"))


def change_a_pixel(folder):
    file = folder / "train-images-idx3-ubyte"
    pixels = bytearray(gzip.decompress((folder / f"{file.name}.gz").read_bytes()))
    pixels[-1] ^= 1
    file.write_bytes(pixels)


def drop_images(folder):
    for name, size, header in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):
        file = folder / f"train-{name}-ubyte"
        content = gzip.decompress((folder / f"{file.name}.gz").read_bytes())
        count = (100).to_bytes(4, "big")
        file.write_bytes(content[:4] + count + content[8 : header + 100 * size])


@pytest.mark.parametrize("change", [change_a_pixel, drop_images])
def test_a_run_is_not_resumed_on_other_data(digits, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(TrainingInterrupt):
            train(settings(tmp_path / "run", dataset=str(digits)))
    before = weights(tmp_path / "run")
    change(digits)
    with pytest.raises(ValueError, match=r"expected the data .* 294 training images with SHA-256"):
        train(TrainSettings(run_dir=tmp_path / "run", resume=True))
    assert weights(tmp_path / "run") == before
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (digits / name).unlink(missing_ok=True)
    train(TrainSettings(run_dir=tmp_path / "run", resume=True))


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "SHA256SUMS"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(
    name, stopped, tmp_path, capsys
):
    train(settings(tmp_path / "unbroken", checkpoint_every=1))
    damaged = stopped.last_checkpoint() / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    resume(stopped)
    said = capsys.readouterr().out
    assert f"A damaged checkpoint is skipped: {damaged.parent}" in said
    assert "Resuming the small net after 3 steps" in said
    assert weights(stopped.path) == weights(tmp_path / "unbroken")


def test_a_checkpoint_with_a_missing_file_is_a_damaged_one(stopped, capsys):
    (stopped.last_checkpoint() / "model.safetensors").unlink()
    resume(stopped)
    assert "after 3 steps" in capsys.readouterr().out


def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_removed(stopped):
    for checkpoint in stopped.checkpoints():
        (checkpoint / "training.pt").write_bytes(b"GIF89a")
    before = sorted(stopped.path.rglob("*"))
    with pytest.raises(ValueError, match=f"{stopped.last_checkpoint() / 'training.pt'} is damaged"):
        resume(stopped)
    assert sorted(stopped.path.rglob("*")) == before


WRONG = [None, "a", -1, 10**9, 0.5, [], {}, torch.zeros(3)]


def places(state):
    """Every place of a training state where something wrong can stand."""
    yield ()
    yield from ((name,) for name in state)
    yield ("optimizer", "state")
    yield from (("optimizer", "state", number) for number in (0, 3))
    yield from (("optimizer", "state", 3, name) for name in state["optimizer"]["state"][3])


def with_wrong(state, place, wrong):
    if not place:
        return wrong
    name, *rest = place
    return {**state, name: with_wrong(state[name], rest, wrong)}


def test_a_training_state_of_any_wrong_type_is_refused_in_a_sentence_or_of_no_matter(stopped):
    """Without a checksum, as graphcaps 0.1.0 wrote it."""
    checkpoint, other = stopped.checkpoints()
    shutil.rmtree(other)
    (checkpoint / "SHA256SUMS").unlink()
    file = checkpoint / "training.pt"
    whole, refusals = torch.load(file), []
    started = stopped.settings()
    data = load_dataset(str(DIGITS))
    for place in places(whole):
        for wrong in WRONG:
            torch.save(with_wrong(whole, place, wrong), file)
            resumed = Trainer(started.settings, started.recipe, data, CPU, stopped)
            try:
                resumed.resume()
            except ValueError as error:
                refusals.append(str(error))
            else:
                assert resumed.step == 4, place
                resumed._take_step(*(part[:2] for part in resumed._plan(0)))
    assert len(refusals) > 85
    assert all(str(file) in told and "\n" not in told for told in refusals)


def test_a_checkpoint_of_another_version_is_named(stopped):
    for checkpoint in stopped.checkpoints():
        torch.save({"step": 4}, checkpoint / "training.pt")
        (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(
        ValueError, match=r"step-00000004/training.pt was not written by this.*lacks"
    ):
        resume(stopped)


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    first = train(settings(tmp_path / "run", epochs=1))
    before = weights(tmp_path / "run")
    again = train(TrainSettings(run_dir=tmp_path / "run", resume=True))
    assert again == first
    assert weights(tmp_path / "run") == before
    assert "nothing is left to do" in capsys.readouterr().out


class Dead(io.StringIO):
    """A stream that nobody reads."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = fileno = write


def dead_streams():
    closed = io.StringIO()
    closed.close()
    yield "broken pipe", Dead(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    yield "full disk", Dead(OSError(errno.ENOSPC, "No space left on device"))
    yield "hung up", Dead(OSError(errno.EIO, "Input/output error"))
    yield "reentrant call", Dead(RuntimeError("reentrant call"))
    yield "closed", closed
    yield "none", None
    yield "ASCII", io.TextIOWrapper(io.BytesIO(), "ascii")
    yield "KOI8-R", io.TextIOWrapper(io.BytesIO(), "koi8-r")


@pytest.mark.parametrize("stream", [pytest.param(s, id=name) for name, s in dead_streams()])
def test_streams_that_cannot_be_written_change_nothing(stream, tmp_path, monkeypatch, digits):
    folder = digits.rename(tmp_path / "Ziffern – 数字")
    asked = dict(dataset=str(folder), epochs=1)
    train(settings(tmp_path / "told", **asked))
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    untold = train(settings(tmp_path / "untold", **asked))
    assert untold["test_images"] == 100
    assert weights(tmp_path / "untold") == weights(tmp_path / "told")


@pytest.mark.parametrize("stream", [pytest.param(s, id=name) for name, s in dead_streams()])
def test_ctrl_c_saves_though_nobody_can_be_told(stream, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    interrupt_at(3, monkeypatch)
    with pytest.raises(TrainingInterrupt, match=r"saved as .*step-00000004"):
        train(settings(tmp_path / "run"))


def test_an_epochs_checkpoint_is_there_before_its_words(tmp_path, monkeypatch):
    run, told = RunFolder(tmp_path / "run"), []
    monkeypatch.setattr(loop, "say", lambda text: told.append((text, run.last_checkpoint())))
    train(settings(tmp_path / "run"))
    news = [(text[:9], checkpoint.name) for text, checkpoint in told if text.startswith("epoch")]
    assert news == [("epoch 1/2", "step-00000006"), ("epoch 2/2", "step-00000012")]


def test_what_is_told_at_the_start_is_in_characters_that_every_terminal_has(tmp_path):
    assert trainer(tmp_path / "run").describe().isascii()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_saves_as_ctrl_c_does(name, tmp_path, monkeypatch):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    interrupt_at(3, monkeypatch, number)
    with pytest.raises(TrainingInterrupt, match=r"saved as .*step-00000004"):
        train(settings(tmp_path / "run"))
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_remains_so(tmp_path, monkeypatch):
    """As nohup ignores SIGHUP, and a shell SIGINT for what runs in the background."""
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGINT)}
    try:
        interrupt_at(3, monkeypatch, signal.SIGHUP, signal.SIGINT)
        assert train(settings(tmp_path / "run", epochs=1))["epochs"] == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_can_be_trained_off_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(settings(tmp_path / "thread", epochs=1)))
    )
    thread.start()
    thread.join()
    assert results and results[0]["epochs"] == 1
    train(settings(tmp_path / "main", epochs=1))
    assert weights(tmp_path / "thread") == weights(tmp_path / "main")
