"""Records read from files: which content is accepted, and the errors for any other."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from graphcaps.files import parse_record, read_bounded, read_record, record, write_whole


@record
@dataclass(frozen=True)
class Schedule:
    rate: float
    shape: Literal["flat", "cosine"] = "flat"


@record
@dataclass(frozen=True)
class Plan:
    steps: int
    schedule: Schedule
    sizes: tuple[int, ...] | None = (3, 5)
    folder: Path | None = None


def test_a_record_is_read_with_its_nested_ones(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(
        '{"steps": 7, "schedule": {"rate": 1, "shape": "cosine"}, "sizes": [1], "folder": "a"}'
    )
    expected = Plan(7, Schedule(1.0, "cosine"), (1,), Path("a"))
    assert read_record(file, Plan) == expected


def test_a_missing_field_has_its_default():
    plan = parse_record(b'{"steps": 7, "schedule": {"rate": 0.5}}', Plan, "plan.json")
    assert plan == Plan(7, Schedule(0.5))


@pytest.mark.parametrize(
    ("content", "field", "told"),
    [
        (b'{"schedule": {"rate": 1}}', "steps", "missing"),
        (b'{"steps": true, "schedule": {"rate": 1}}', "steps", "integer, got True"),
        (b'{"steps": "7", "schedule": {"rate": 1}}', "steps", "integer, got '7'"),
        (b'{"steps": 7.5, "schedule": {"rate": 1}}', "steps", "integer, got 7.5"),
        (b'{"steps": 7, "schedule": {"rate": NaN}}', "schedule.rate", "finite number, got nan"),
        (b'{"steps": 7, "schedule": {"rate": 1e999}}', "schedule.rate", "finite number, got inf"),
        (b'{"steps": 7, "schedule": {"rate": null}}', "schedule.rate", "number, got None"),
        (b'{"steps": 7, "schedule": {"rate": 1, "shape": "up"}}', "schedule.shape", "got 'up'"),
        (b'{"steps": 7, "schedule": 3}', "schedule", "object, got 3"),
        (b'{"steps": 7, "schedule": {"rate": 1, "extra": 1}}', "schedule.extra", "unknown field"),
        (b'{"steps": 7, "schedule": {"rate": 1}, "sizes": [1, "x"]}', "sizes.1", "got 'x'"),
        (b'{"steps": 7, "schedule": {"rate": 1}, "folder": 3}', "folder", "got 3"),
        (b'{"steps": 7, "schedule": {"rate": 1}, "\\u001b[2J": 3}', r"'\x1b[2J'", "unknown field"),
        (b"", "", "truncated or not JSON"),
        (b"[7]", "", "expected an object, got [7]"),
        (b'{"steps": ' + b"[" * 100_000, "", "not JSON"),
        (b"\xff\xfe", "", "not JSON"),
    ],
)
def test_what_is_wrong_in_a_record_is_told_in_one_line(tmp_path, content, field, told):
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(told)) as raised:
        read_record(file, Plan)
    message = str(raised.value)
    assert message.startswith(f"{file}: {field}")
    assert len(message) < 300 + len(str(file)) and message.isprintable()


def test_a_long_wrong_value_is_shortened():
    content = b'{"steps": "' + b"x" * 100_000 + b'", "schedule": {"rate": 1}}'
    with pytest.raises(ValueError, match="steps") as raised:
        parse_record(content, Plan, "plan.json")
    assert len(str(raised.value)) < 200


def test_a_file_too_large_for_a_record_is_not_read(tmp_path):
    file = tmp_path / "plan.json"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"plan\.json.*at most 1,048,576 bytes"):
        read_record(file, Plan)


def test_no_more_than_the_bound_is_read(tmp_path):
    file = tmp_path / "content"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(ValueError, match="at most 4 bytes"):
        read_bounded(file, 4)


def test_pipes_and_devices_are_no_records(tmp_path):
    pipe = tmp_path / "plan.json"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: expected a regular file"):
            read_record(path, Plan)
    with pytest.raises(FileNotFoundError, match="none"):
        read_record(tmp_path / "none.json", Plan)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x"])
def test_a_file_whose_name_is_as_long_as_it_may_be_is_written(tmp_path, name):
    write_whole(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert os.listdir(tmp_path) == [name]
