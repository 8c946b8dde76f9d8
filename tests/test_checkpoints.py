import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
from run_records import STARTED, result, step_metrics

import graphcaps as gc
from graphcaps.files import write_whole
from graphcaps.nets.weights import load_weights
from graphcaps.training import checkpoints
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.settings import as_json

CONFIG_WITH_WORDS = json.dumps(asdict(gc.CapsNetConfig()) | {"classes": "ten"})


def tiny(**changes):
    sizes = dict(conv_channels=4, capsule_maps=1, decoder_hidden=(8,))
    return gc.CapsNet.from_preset("small", **(sizes | changes))


@pytest.fixture
def saved(tmp_path):
    tiny().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.create(STARTED)
    return folder


def checkpoints_of(run):
    return sorted(os.listdir(run.path / "checkpoints"))


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


def test_a_checkpoint_loads_with_weights_only_and_the_one_before_is_kept(run):
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters())
    for step in (5, 12, 23):
        run.save_checkpoint(step, model, {"step": step, "optimizer": optimizer.state_dict()})
    assert checkpoints_of(run) == ["step-00000012", "step-00000023"]
    loaded = torch.load(run.last_checkpoint() / "training.pt", weights_only=True)
    assert loaded["step"] == 23
    other = tiny()
    assert run.load_checkpoint(run.last_checkpoint(), other)["step"] == 23
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
    with pytest.raises(ValueError, match=r"another model: for .* expected .*, got"):
        load_weights(saved / "model.safetensors", model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        gc.CapsNet.load(tmp_path)


def test_a_checkpoints_checksums_are_those_that_sha256sum_checks(run):
    checkpoint = run.save_checkpoint(1, tiny(), {"step": 1})
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=checkpoint, check=True, capture_output=True, text=True)
    assert done.stdout == "model.json: OK\nmodel.safetensors: OK\ntraining.pt: OK\n"


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "training.pt"])
def test_a_flipped_bit_is_noticed_and_its_file_named(run, name):
    file = run.save_checkpoint(1, tiny(), {"step": 1}) / name
    content, flipping = file.read_bytes(), random.Random(0)
    for _ in range(20):
        flipped = bytearray(content)
        flipped[flipping.randrange(len(content))] ^= 1 << flipping.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{file} is damaged: its SHA-256"):
            run.load_checkpoint(file.parent, tiny())
    file.write_bytes(content)
    run.load_checkpoint(file.parent, tiny())


def test_damaged_checksums_are_a_damaged_checkpoint(run):
    checkpoint = run.save_checkpoint(1, tiny(), {"step": 1})
    for content in (b"", b"\xff" * 100, b"0" * 10_000):
        (checkpoint / "SHA256SUMS").write_bytes(content)
        with pytest.raises(ValueError, match=str(checkpoint)):
            run.load_checkpoint(checkpoint, tiny())


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 50, None])
def test_a_broken_training_state_without_a_checksum_is_named(run, content):
    """Checkpoints of graphcaps 0.1.0 have no checksums."""
    checkpoint = run.save_checkpoint(1, tiny(), {"step": 1})
    (checkpoint / "SHA256SUMS").unlink()
    state = checkpoint / "training.pt"
    state.write_bytes(state.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"training\.pt is missing, truncated or not a checkpoint"):
        run.load_checkpoint(checkpoint, tiny())


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(run, monkeypatch):
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
        OSError, match=r"could not be written \(No space left.*its old content is untouched"
    ):
        run.save_checkpoint(2, model, {"step": 2})
    monkeypatch.undo()
    assert run.last_checkpoint() == first
    assert (first / "model.safetensors").read_bytes() == content
    assert checkpoints_of(run) == ["step-00000001"]


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
    """In a subprocess: save step 2 and be killed at the n-th flush, rename or removal."""
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
        for step in (0, 1):
            run.save_checkpoint(step, model, {"step": step})
        killed = checkpoint_and_die(run, model, fatal)
        found.append(run.load_checkpoint(run.last_checkpoint(), other)["step"])
        assert torch.equal(other.capsules.weight, model.capsules.weight)
        # what the killed one left is no hindrance to going on, and is cleared
        run.forget_after(found[-1])
        for step in (2, 3):
            run.save_checkpoint(step, model, {"step": step})
            assert checkpoints_of(run) == [f"step-{step - 1:08d}", f"step-{step:08d}"]
        if not killed:
            break
        fatal += 1
    assert found == sorted(found)
    assert found.count(1) > 7  # four files, each flushed, renamed and flushed again
    assert found.count(2) > 2  # after the renaming: its flush, the removal of the old, the end


def test_a_checkpoint_of_a_later_step_is_never_removed(run):
    for step in (9, 4, 5, 6):
        run.save_checkpoint(step, tiny(), {"step": step})
    assert checkpoints_of(run) == ["step-00000005", "step-00000006", "step-00000009"]
    assert run.last_checkpoint().name == "step-00000009"


def test_a_run_that_goes_on_has_no_checkpoint_of_a_later_step_and_two_of_earlier_ones(run):
    saved = [run.save_checkpoint(step, tiny(), {"step": step}) for step in (1, 2, 3)]
    shutil.copytree(saved[2], run.path / "kept")
    run.save_checkpoint(4, tiny(), {"step": 4})
    shutil.copytree(
        run.path / "kept", saved[0].with_name("step-00000001")
    )  # half removed by a kill
    run.forget_after(3)
    assert checkpoints_of(run) == ["step-00000001", "step-00000003"]
    shutil.copytree(run.path / "kept", saved[1])
    run.forget_after(3)
    assert checkpoints_of(run) == ["step-00000002", "step-00000003"]


def test_steps_are_ordered_as_numbers(run):
    for step in (99_999_999, 100_000_000):
        run.save_checkpoint(step, tiny(), {"step": step})
    assert [path.name for path in run.checkpoints()] == ["step-100000000", "step-99999999"]


@pytest.fixture(params=["copy", "zeros", "other digits", "link", "file", "empty", "not ours"])
def by_hand(request, run):
    """A file or folder in the checkpoint folder that was not written by training."""
    last = run.save_checkpoint(15, tiny(), {"step": 15})
    names = {
        "copy": "step-00000015-good",
        "zeros": "step-000000099",
        "other digits": "step-００００００２０",
    }
    path = last.with_name(names.get(request.param, "step-00000020"))
    match request.param:
        case "link":
            shutil.copytree(last, run.path / "elsewhere")
            path.symlink_to(run.path / "elsewhere", target_is_directory=True)
        case "file":
            path.write_text("mine")
        case "empty":
            path.mkdir()
        case "not ours":
            path.mkdir()
            (path / "diary.txt").write_text("mine")
        case _:
            shutil.copytree(last, path)
    return path


def test_what_is_made_by_hand_is_neither_taken_for_a_checkpoint_nor_removed(run, by_hand):
    before = sorted(path.name for path in by_hand.rglob("*"))
    assert [path.name for path in run.checkpoints()] == ["step-00000015"]
    run.forget_after(15)
    for step in (30, 45, 60):
        run.save_checkpoint(step, tiny(), {"step": step})
    assert by_hand.name in checkpoints_of(run)
    assert sorted(path.name for path in by_hand.rglob("*")) == before


@pytest.mark.parametrize("by_hand", ["link", "file", "empty", "not ours"], indirect=True)
def test_what_stands_in_a_checkpoints_place_is_moved_aside(run, by_hand, caplog):
    before = sorted(path.name for path in by_hand.rglob("*"))
    saved = run.save_checkpoint(20, tiny(), {"step": 20})
    assert saved == by_hand == run.last_checkpoint()
    assert run.load_checkpoint(saved, tiny())["step"] == 20
    (aside,) = by_hand.parent.glob("step-00000020-*")
    assert f"moved to {aside}" in caplog.text
    assert sorted(path.name for path in aside.rglob("*")) == before


def test_two_processes_cannot_train_in_one_folder(run):
    with run.locked(), pytest.raises(RuntimeError, match="another process is training in"):
        RunFolder(run.path).locked().__enter__()
    with run.locked():  # free again
        pass


def test_the_lock_is_taken_where_only_files_open_for_writing_can_be_locked(
    run, monkeypatch, caplog
):
    """NFS and CIFS behave like this."""
    flock = fcntl.flock

    def networked(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", networked)
    with run.locked(), pytest.raises(RuntimeError, match="another process is training in"):
        run.locked().__enter__()
    assert not caplog.records


@pytest.mark.parametrize("error", [errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(run, monkeypatch, caplog, error):
    def refuse(file, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run.locked():
        pass
    (said,) = caplog.messages
    assert said.startswith(f"{run.path} cannot be locked ({os.strerror(error)}): make sure that")


def test_a_lock_that_was_removed_while_it_was_waited_for_is_no_lock(run, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(file, operation):
        flock(file, operation)
        if not removed:  # by the process that had it before
            removed.append((run.path / ".lock").unlink())

    monkeypatch.setattr(fcntl, "flock", late)
    with run.locked(), pytest.raises(RuntimeError, match="another process is training in"):
        run.locked().__enter__()
    assert removed


def test_a_lock_leaves_nothing_where_nothing_was(tmp_path):
    for inside in (tmp_path / "run", tmp_path / "runs" / "of today" / "run"):
        with RunFolder(inside).locked():
            assert os.listdir(inside) == [".lock"]
        assert os.listdir(tmp_path) == []


def test_a_lock_leaves_what_was_there_and_what_came(tmp_path):
    (tmp_path / "runs").mkdir()
    run = RunFolder(tmp_path / "runs" / "run")
    with run.locked():
        run.create(STARTED)
    assert os.listdir(run.path) == ["settings.json"]


def test_of_two_starts_in_one_folder_the_second_is_refused(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.check_free()
    second.check_free()
    with first.locked():
        with pytest.raises(RuntimeError, match="another process"):
            second.locked().__enter__()
        first.create(STARTED)
    with second.locked(), pytest.raises(FileExistsError, match="exists already; add --resume"):
        second.create(replace(STARTED, versions={}))
    assert first.settings() == STARTED


def test_what_a_killed_start_left_is_no_run(run):
    (run.path / "settings.json").rename(run.path / ".settings.json.77.unfinished")
    (run.path / ".lock").touch()
    with pytest.raises(FileNotFoundError, match="no run at"):
        run.settings()
    with run.locked():
        run.create(STARTED)
        run.forget_after(0)
    assert sorted(os.listdir(run.path)) == ["metrics.jsonl", "settings.json"]


def test_a_folder_with_something_else_in_it_is_not_free(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and is not a run; choose another"):
        RunFolder(tmp_path).check_free()
    with pytest.raises(FileExistsError, match="exists already and is not a run; choose another"):
        RunFolder(tmp_path / "diary.txt").check_free()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("r" * 256, "File name too long"),
        ("/".join(["r" * 200] * 20), "File name too long"),  # for the files in it, not for itself
        ("diary.txt/run", "Not a directory"),
        ("/proc/run", "could not be written"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_in_a_sentence(path, said, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(OSError, match=said) as caught:
        RunFolder(tmp_path / path).locked().__enter__()
    assert caught.value.filename == str(tmp_path / path)
    assert os.listdir(tmp_path) == ["diary.txt"]


@pytest.mark.parametrize(
    "damage", [b"\0" * 40, b'{"kind": "st', b'{"kind": "step"}\n', b"\xff\xfe\n"]
)
def test_damaged_metrics_do_not_keep_a_run_from_going_on(damage, run):
    for step in (1, 2, 3):
        run.log(step_metrics(step))
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    run.forget_after(2)
    run.log(step_metrics(3))
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]


def test_damaged_metrics_are_told_with_file_and_line(run, caplog):
    run.log(step_metrics(1))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "step": 2, "seconds": "<b>"}\n')
    run.log(step_metrics(3))
    assert [record["step"] for record in run.metrics()] == [1]
    assert f"{run.path / 'metrics.jsonl'}, line 2: " in caplog.text
    assert "are ignored" in caplog.text


def test_metrics_that_are_kept_keep_every_byte(run):
    for step in (1, 2, 3):
        run.log(step_metrics(step))
    before = (run.path / "metrics.jsonl").read_bytes()
    run.forget_after(2)
    assert before.startswith((run.path / "metrics.jsonl").read_bytes())
    assert [record["step"] for record in run.metrics()] == [1, 2]


def test_an_empty_folder_is_free_for_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").create(STARTED)
    assert RunFolder(tmp_path / "run").settings() == STARTED


def corrupted(content):
    """JSON with one value of another type, missing, or out of range."""
    for value in (None, True, -1, 10**400, 0.5, "a", "", [], [1], {}, {"a": 1}):
        for path in ((), *paths_in(content)):
            yield ".".join(path), replaced(content, path, value)
    for path in paths_in(content):
        yield ".".join(path), replaced(content, path)


def paths_in(content):
    for name, value in content.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *rest) for rest in paths_in(value))


def replaced(content, path, *value):
    if not path:
        return value[0]
    (name, *rest), content = path, dict(content)
    if rest:
        content[name] = replaced(content[name], rest, *value)
    elif value:
        content[name] = value[0]
    else:
        del content[name]
    return content


def test_settings_of_any_wrong_type_are_one_sentence_that_names_the_file(run):
    file = run.path / "settings.json"
    content, refusals = json.loads(file.read_text()), []
    for where, wrong in corrupted(content):
        file.write_text(json.dumps(wrong))
        try:
            read = types(as_json(run.settings()))
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert types(wrong).items() <= read.items(), where
    assert len(refusals) > 200
    for told in refusals:
        assert told.startswith(f"{file}: ")
        assert told.isprintable() and len(told) < 500 + len(str(file))


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("settings", {"seed": -1}),
        ("settings", {"shift": 2**63}),
        ("settings", {"iterations": 10**12}),
        ("settings", {"checkpoint_every": 0}),
        ("recipe", {"epochs": 10**400}),
        ("recipe", {"batch_size": 0}),
        ("recipe", {"learning_rate": -1.0}),
    ],
)
def test_settings_that_no_training_can_have_are_refused_by_the_name_of_their_file(run, part, wrong):
    file = run.path / "settings.json"
    content = json.loads(file.read_text())
    content[part] |= wrong
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{file}: .* must be (at least|at most|above)"):
        run.settings()


def types(content):
    """The type of each value; None matches any type."""
    leaves = {}
    for path in paths_in(content):
        value = content
        for name in path:
            value = value[name]
        if value is not None:
            leaves[path] = list if isinstance(value, tuple) else type(value)
    return leaves


def test_a_result_of_any_wrong_type_is_one_sentence_that_names_the_file(run):
    run.finish(result(errors=3))
    file = run.path / "result.json"
    content, refusals = json.loads(file.read_text()), []
    for where, wrong in corrupted(content):
        file.write_text(json.dumps(wrong))
        try:
            assert types(run.result()) == types(content), where
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 80
    assert all(told.startswith(f"{file}: ") for told in refusals)
