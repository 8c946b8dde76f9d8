import contextlib
import errno
import json
import os
import random
import signal
from dataclasses import asdict

import pytest
import torch

import graphcaps as gc
from graphcaps import checkpoints
from graphcaps.checkpoints import RunFolder
from graphcaps.files import write_whole
from graphcaps.weights import load_weights

CONFIG_WITH_WORDS = json.dumps(asdict(gc.CapsNetConfig()) | {"classes": "ten"})


def tiny(**changes):
    sizes = dict(conv_channels=4, capsule_maps=1, decoder_hidden=(8,))
    return gc.CapsNet.from_preset("small", **(sizes | changes))


@pytest.fixture
def saved(tmp_path):
    tiny().save(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_comes_back_with_its_configuration_and_every_bit(tmp_path):
    for model in (tiny(), tiny(decoder_hidden=None, routing="uniform", classes=3)):
        model.save(tmp_path / "model")
        loaded = gc.CapsNet.load(tmp_path / "model")
        assert loaded.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_the_configuration_lies_beside_the_weights_in_json(saved):
    assert sorted(os.listdir(saved)) == ["model.json", "model.safetensors"]
    assert json.loads((saved / "model.json").read_text())["conv_channels"] == 4


def test_a_checkpoint_loads_with_weights_only_and_replaces_the_one_before(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({})
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters())
    for step in (5, 12):
        run.save_checkpoint(step, model, {"step": step, "optimizer": optimizer.state_dict()})
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000012"]
    loaded = torch.load(run.last_checkpoint() / "training.pt", weights_only=True)
    assert loaded["step"] == 12
    other = tiny()
    assert run.load_checkpoint(run.last_checkpoint(), other)["step"] == 12
    assert torch.equal(other.conv[0].weight, model.conv[0].weight)


@pytest.mark.parametrize("length", [0, 4, 100, 2000])
@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_truncated_file_is_named(saved, name, length):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: min(length, len(content) - 3)])
    with pytest.raises(ValueError, match=name):
        gc.CapsNet.load(saved)


def test_a_foreign_file_is_named(saved):
    (saved / "model.safetensors").write_bytes(b"GIF89a" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors"):
        gc.CapsNet.load(saved)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "GIF89a", CONFIG_WITH_WORDS])
def test_a_foreign_configuration_is_named(saved, content):
    (saved / "model.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.json"):
        gc.CapsNet.load(saved)


def test_weights_of_another_model_are_refused_and_change_nothing(saved):
    model = tiny(capsule_maps=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another model: for .* the model has .*, the file"):
        load_weights(saved / "model.safetensors", model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        gc.CapsNet.load(tmp_path)


def test_a_training_state_with_damaged_bytes_is_named_or_loads(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({})
    state = run.save_checkpoint(1, tiny(), {"step": 1}) / "training.pt"
    content, damaging = state.read_bytes(), random.Random(0)
    model, loaded = tiny(), 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[damaging.randrange(len(damaged))] = damaging.randrange(256)
        state.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            run.load_checkpoint(state.parent, model)
            loaded += 1
    assert loaded < 50


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 50, None])
def test_a_broken_training_state_is_named(tmp_path, content):
    run = RunFolder(tmp_path / "run")
    run.create({})
    checkpoint = run.save_checkpoint(1, tiny(), {"step": 1})
    state = checkpoint / "training.pt"
    state.write_bytes(state.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"training\.pt is missing, truncated or not a checkpoint"):
        run.load_checkpoint(checkpoint, tiny())


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.create({})
    model = tiny()
    first = run.save_checkpoint(1, model, {"step": 1})
    content = (first / "model.safetensors").read_bytes()
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 5:  # in the middle of the checkpoint's files
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"could not be written \(No space left.*there before is untouched"
    ):
        run.save_checkpoint(2, model, {"step": 2})
    monkeypatch.undo()
    assert run.last_checkpoint() == first
    assert (first / "model.safetensors").read_bytes() == content
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000001"]


def test_a_file_that_cannot_be_written_keeps_its_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"could not be written.*{path}"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def checkpoint_and_die(run, model, fatal):
    """In a process of its own: save step 2, killed at its n-th flush, rename or removal."""
    child = os.fork()
    if not child:
        calls = []

        def deadly(function):
            def call(*args, **kwargs):
                calls.append(function)
                if len(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        checkpoints.shutil.rmtree = deadly(checkpoints.shutil.rmtree)
        run.save_checkpoint(2, model, {"step": 2})
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_kill_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path):
    model, other = tiny(), tiny()
    found, fatal = [], 1
    while True:
        run = RunFolder(tmp_path / f"run{fatal}")
        run.create({})
        run.save_checkpoint(1, model, {"step": 1})
        killed = checkpoint_and_die(run, model, fatal)
        found.append(run.load_checkpoint(run.last_checkpoint(), other)["step"])
        assert torch.equal(other.capsules.weight, model.capsules.weight)
        # what the killed one left is no hindrance to going on, and is cleared
        run.forget_after(found[-1])
        for step in (2, 3):
            run.save_checkpoint(step, model, {"step": step})
            assert os.listdir(run.path / "checkpoints") == [f"step-{step:08d}"]
        if not killed:
            break
        fatal += 1
    assert found == sorted(found)
    assert found.count(1) > 5  # three files, each flushed, renamed and flushed again
    assert found.count(2) > 2  # after the renaming: its flush, the removal of the old, the end


def test_a_checkpoint_of_a_later_step_is_never_removed(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({})
    for step in (9, 4):
        run.save_checkpoint(step, tiny(), {"step": step})
    assert run.last_checkpoint().name == "step-00000009"


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({})
    with run.locked(), pytest.raises(RuntimeError, match="another process is training in"):
        RunFolder(tmp_path / "run").locked().__enter__()
    with run.locked():  # free again
        pass


@pytest.mark.parametrize(
    "damage", [b"\0" * 40, b'{"kind": "st', b'{"kind": "step"}\n', b"\xff\xfe\n"]
)
def test_damaged_metrics_do_not_keep_a_run_from_going_on(damage, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({})
    for step in (1, 2, 3):
        run.log({"kind": "step", "step": step})
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    run.forget_after(2)
    run.log({"kind": "step", "step": 3})
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]


def test_an_empty_folder_is_free_for_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").create({"settings": {}})
    assert RunFolder(tmp_path / "run").settings() == {"settings": {}}
