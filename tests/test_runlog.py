# SPDX-License-Identifier: MIT
"""support/runlog.py: averages over a window, what is written once, and a writer that fails."""
import math
from unittest.mock import Mock

import pytest
import torch
from tensorboard.util import tensor_util

from helpers import scalars
from support import runlog


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "run"


def test_a_log_holds_averages_since_the_last_one_the_latest_value_of_others_and_gradient_norms_of_modules(folder):
    part = torch.nn.Linear(3, 2)
    part(torch.ones(1, 3)).sum().backward()
    log = runlog.RunLog(folder, log_every=2, modules={"part": part, "idle": torch.nn.Linear(1, 1)},
                        mean_over_processes=lambda values: values / 2)
    for step in range(1, 6):
        log.begin_step(step, last=step == 5)
        log.add("a", torch.tensor(float(step)))
        log.add("host", step)
        if step > 1:
            log.add("late", torch.tensor(1.0, dtype=torch.bfloat16))
        log.add_gradient_norms()
        assert log.due == (step in (2, 4, 5))
        if log.due:
            log.write({"latest": step})
    log.close()
    events = scalars(folder.parents[1])
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert series.pop("grad/part") == [(step, pytest.approx(math.sqrt(8))) for step in (2, 4, 5)]
    assert series == {"a": [(2, 0.75), (4, 1.75), (5, 2.5)], "host": [(2, 1.5), (4, 3.5), (5, 5)],
                      "late": [(2, 0.5), (4, 0.5), (5, 0.5)], "latest": [(2, 2), (4, 4), (5, 5)]}


def test_a_log_without_a_folder_writes_nothing_and_still_averages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = runlog.RunLog(None, log_every=1)
    log.begin_step(1)
    log.add("a", torch.tensor(3.0))
    log.add_text("t", "x")
    log.add_table("t", {"x": 1})
    log.add_images({"i": torch.zeros(3, 2, 2)})
    log.add_histogram("h", torch.rand(3))
    log.add_gradient_norms()
    assert log.write({"b": 1}) == {"a": 3}
    log.close()
    assert not list(tmp_path.iterdir())


def test_an_image_or_cloud_that_has_not_changed_is_written_once_and_nothing_of_what_tensorboard_refuses(folder):
    log = runlog.RunLog(folder, log_every=1)
    points, colors = torch.rand(40, 3), torch.rand(40, 3)
    for step, image in ((1, torch.zeros(3, 2, 2)), (2, torch.zeros(3, 2, 2)), (3, torch.ones(3, 2, 2))):
        log.begin_step(step)
        log.add_images({"a/i": image})
        log.add_clouds({"truth/room": (points, colors), "empty/room": (points[:0], colors[:0])})
    for values in (torch.zeros(0), torch.tensor([math.nan])):
        log.add_histogram("left out", values)
    log.add_histogram("good", torch.rand(9))
    log.close()
    events = scalars(folder.parents[1])
    assert [event.step for event in events.Images("a/i")] == [1, 3] and events.Tags()["histograms"] == ["good"]
    assert set(events.Tags()["tensors"]) == {"truth/room_VERTEX", "truth/room_COLOR"}
    event, = events.Tensors("truth/room_VERTEX")
    written = torch.from_numpy(tensor_util.make_ndarray(event.tensor_proto)[0])
    assert torch.allclose(written, points[:, [0, 2, 1]] * torch.tensor([1, 1, -1]))  # y is up there


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("queue"), TypeError("proto")])
def test_a_writer_that_fails_is_reported_once_and_opened_again(folder, monkeypatch, error):
    monkeypatch.setattr(runlog, "RETRY_SECONDS", 0)
    reports = []
    full = Mock(**{f"{name}.side_effect": error for name in ("add_scalar", "add_text", "add_image", "flush")})
    log = runlog.RunLog(folder, log_every=1, report=reports.append)
    for step in (2, 3):
        log.writer = full
        log.begin_step(step)
        log.add("a", torch.tensor(1.0))
        log.write({"b": 2})
        log.add_text("t", "x")
        log.add_images({"i": torch.zeros(3, 2, 2)})
    log.begin_step(4)
    log.add("a", torch.tensor(5.0))
    assert log.write({}) == {"a": 5}
    log.add_images({"i": torch.zeros(3, 2, 2)})  # was lost
    log.close()
    events = scalars(folder.parents[1])
    assert events.Tags()["images"] == ["i"] and [(e.step, e.value) for e in events.Scalars("a")] == [(4, 5.0)]
    assert len(reports) == 1 and str(error) in reports[0] and str(folder) in reports[0]


def test_a_folder_that_is_gone_does_not_stop_a_log(folder):
    reports = []
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    log = runlog.RunLog(folder, log_every=1, report=reports.append)
    log.begin_step(1)
    log.add("a", torch.tensor(1.0))
    assert log.write({}) == {"a": 1} and len(reports) == 1
