# SPDX-License-Identifier: MIT
"""Planted faults are named with their right values, in rendered and real frames; clean ones raise no finding."""
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, write_rooms_as_scannet
from PIL import Image

import bench.faults
import check
from bench.check import WRITERS, judge, outcome
from bench.faults import (CAMERA_FIELDS, CLEAN, FAULTS, JITTER, QUARTER_TURN, SIZE, TILT, Frames, in_first_scene,
                          make_rooms, make_video, renamed, with_holes)
from sources.open import open_frames
from sources.scannet import load_classes
from support.runtime import run_command


@pytest.fixture(scope="module")
def video():
    return make_video()


@pytest.fixture(scope="module")
def rooms():
    return make_rooms()


@pytest.fixture(scope="module")
def ycbv():
    folder = ROOT.parent / "shared" / "data" / "ycbv"
    if not folder.is_dir():
        pytest.skip("needs the real frames in shared/ beside the repository")
    source = open_frames(str(folder))
    return Frames([source[i] for i in range(6)], source.class_names)


def faults(frames, up="z"):
    """What the quick check finds wrong -> {fault: words}."""
    return {row.test: row.words for row in check.quick_check(frames, up) if row.verdict == "WRONG"}


def label_faults(frames):
    """What is wrong with the labels."""
    labels = check.read_labels(frames, 48)
    rows = check.label_rows(labels, frames.class_names, 16, np.array([0, 0, 1]))
    trusted = all(row.verdict != "WRONG" for row in rows)
    rows += check.instance_rows(labels, frames.class_names, trusted=trusted)
    return {row.test: row.words for row in rows if row.verdict == "WRONG"}


@pytest.mark.parametrize("fault, words, plant", FAULTS, ids=[f"{i} {one[0]}" for i, one in enumerate(FAULTS)])
def test_a_planted_fault_is_named_and_nothing_else_is(video, fault, words, plant):
    found = faults(plant(video))
    assert list(found) == [fault]
    assert found[fault].endswith(check.FIXES[fault])
    if isinstance(words, tuple):
        words, value = words
        assert float(re.search(rf"{words} ([\d.]+)", found[fault])[1]) == pytest.approx(value, rel=0.01)
    assert words in found[fault]


@pytest.mark.parametrize("millimeters, degrees", [(32, 6), (50, 2), (0, 3)])
def test_depth_of_another_camera_than_color_is_told_by_their_edges(millimeters, degrees):
    angle = np.radians(degrees)
    offset = np.eye(4)
    offset[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    offset[0, 3] = millimeters / 1000
    frames = make_video(12, offset=offset)
    assert list(faults(frames)) == ["depth and color cameras"]
    told = frames.edited(depth_world2cam=lambda frame: np.linalg.inv(offset) @ frame["world2cam"])
    assert faults(told) == {}


@pytest.mark.parametrize("plant", [0, 3, 10, 14, 21, 32, 45])
def test_faults_are_named_in_rooms_that_are_seen_from_all_sides(rooms, plant):
    fault, _, change = FAULTS[plant]
    assert list(faults(change(rooms))) == [fault]


@pytest.mark.parametrize("plant", [0, 3, 7, 10, 18, 21, 24, 39, 48])
def test_faults_are_named_in_real_frames_that_hardly_move(ycbv, plant):
    fault, _, change = FAULTS[plant]
    found, = faults(change(ycbv))
    assert found == fault or found == "units" and fault.startswith("units")  # too little motion to know which


@pytest.mark.parametrize("plant", [33, 36, 59, 60, 61, 63])
def test_no_cause_is_told_as_sure_if_the_frames_hardly_move(ycbv, plant):
    fault, _, change = FAULTS[plant]
    rows = check.quick_check(change(ycbv))
    told = check.first_fault(rows) or " ".join(check.unknowns(rows))
    assert any(words in told for words in (fault, "unconfirmed", "up axis or poses", "poses cannot be tested"))


def test_training_says_which_faults_the_frames_cannot_tell(ycbv):
    words, = check.unknowns(check.quick_check(ycbv))
    assert "units" in words and "focal length" in words and "pose inverted" not in words


@pytest.mark.parametrize("plant", [0, 3, 12, 14, 17, 21, 35, 41, 46, 51, 55])
def test_a_fault_of_one_scene_only_is_found(video, plant):
    second = renamed(lambda scene, stem: f"other/{stem}")(make_video(seed=2))
    fault, _, change = FAULTS[plant]
    found = faults(in_first_scene(change)(Frames([*video, *second], video.class_names)))
    assert next(iter(found)) in (fault, "unconfirmed")


@pytest.mark.parametrize("plant", [21, 23, 30, 46])
def test_a_fault_of_one_scene_among_many_is_not_averaged_away(rooms, plant):
    scenes = Frames([{**frame, "name": f"{i}-{frame['name']}"} for i in range(4) for frame in rooms])
    fault, _, change = FAULTS[plant]
    for frames, expected in ((scenes, None), (in_first_scene(change)(scenes), fault)):
        assert check.first_fault(check.depth_rows(frames)[1] + check.color_rows(frames)) == expected


@pytest.mark.parametrize("fields, what", [(CAMERA_FIELDS, "both images"), (CAMERA_FIELDS[1:], "depth"),
                                          (CAMERA_FIELDS[:1], "color")])
@pytest.mark.parametrize("plant", [lambda one: one, in_first_scene])
def test_swapped_focal_lengths_are_named(monkeypatch, fields, what, plant):
    monkeypatch.setattr(bench.faults, "CAMERA", np.array([[141.0, 0, 81], [0, 169, 58], [0, 0, 1]]))
    frames = make_rooms()
    swapped = plant(lambda frames: frames.with_intrinsics(lambda k: k + np.diag([28, -28, 0]), fields))(frames)
    assert faults(frames) == {} and f"fx and fy of {what} swapped" in faults(swapped)["focal length"]


@pytest.mark.parametrize("plant", [0, 1, 3, 4, 10, 51])
def test_no_wrong_cause_is_told_if_hardly_any_frames_overlap(plant):
    fault, _, change = FAULTS[plant]
    first = next(iter(faults(change(make_rooms(2, frames_per_room=2)))))
    assert first in (fault, "unconfirmed", "up axis or poses")


@pytest.mark.parametrize("plant", [0, 1, 10])
def test_poses_that_hardly_move_from_frame_to_frame_are_judged_by_frames_far_apart(plant):
    walk = make_video(60, speed=0.1)  # 5 mm and 0.3 degrees, as at 30 frames per second
    fault, _, change = FAULTS[plant]
    assert list(faults(change(walk))) == [fault]


def test_another_up_of_frames_that_do_not_overlap_may_be_wrong_poses(rooms):
    alone = CLEAN["one frame per scene"](rooms).with_poses(lambda pose: QUARTER_TURN @ pose)
    assert list(faults(alone)) == ["up axis or poses"]
    assert faults(alone, "y") == {}


@pytest.mark.parametrize("plant", [0, 21, 55])
def test_training_decides_as_the_command_does(video, plant):
    frames = FAULTS[plant][2](video)
    assert set(check.quick_check(frames)) < set(check.inspect({"all": frames}))


@pytest.mark.parametrize("layout", WRITERS)
def test_the_measurement_writes_captures_that_say_what_the_frames_say(video, layout):
    assert judge(video, layout)[0] is None
    fault, _, plant = FAULTS[0]
    assert outcome(fault, *judge(plant(video), layout)) == "named"


def test_the_measurement_tells_wrong_causes_from_what_cannot_be_told():
    assert outcome("units of depth", "units", set()) == "named"
    assert outcome("units", "unconfirmed", set()) == "no known cause"
    assert outcome("units", "colors", set()) == "WRONG CAUSE"
    assert outcome("units", None, {"units"}) == "not tested"
    assert outcome("units", None, {"colors"}) == "MISSED"


MORE = {
    "whole millimeters": lambda frames: frames.with_depth(lambda depth, frame: np.round(depth, 3)),
    "holes of inf": with_holes(np.inf),
    "a blank depth image": lambda frames: Frames([{**frames[0], "depth": 0 * frames[0]["depth"]}, *frames[1:]]),
}


@pytest.mark.parametrize("variant", [*CLEAN, *MORE, *JITTER])
def test_clean_frames_raise_no_finding(video, variant):
    assert faults({**CLEAN, **MORE, **JITTER}[variant](video)) == {}


@pytest.mark.parametrize("variant", ["as they are", "noise of 1 %, seed 0", "every third frame", "one frame per scene",
                                     *JITTER])
@pytest.mark.parametrize("source", ["rooms", "ycbv"])
def test_clean_rooms_and_real_frames_raise_no_finding(request, source, variant):
    assert faults({**CLEAN, **JITTER}[variant](request.getfixturevalue(source))) == {}


@pytest.mark.parametrize("up, turn", [("y", QUARTER_TURN), ("0,0.436,0.9", TILT.T)])
def test_a_world_with_another_up_is_fine_if_up_says_so(video, up, turn):
    assert faults(video.with_poses(lambda pose: turn @ pose), up) == {}


def test_what_the_frames_cannot_tell_is_not_tested_rather_than_fine(rooms):
    alone = CLEAN["one frame per scene"](rooms).without_labels()
    still = Frames([{**rooms[0], "name": f"scene/{i}"} for i in range(4)])
    for frames in (alone, still):
        verdicts = {row.test: row.verdict for row in check.inspect({"all": frames})}
        tests = {"pose inverted", "OpenGL axes", "units", "poses off by one frame", "mirrored"}
        assert {verdicts[test] for test in tests} == {"not tested"}
    rows = check.quick_check(alone)
    assert {row.test for row in rows if row.verdict == "not tested"} >= tests | {"neighbors"}


def test_training_says_if_the_frames_do_not_tell_which_way_is_up(rooms):
    scenes = in_first_scene(lambda frames: frames.with_poses(lambda pose: TILT @ TILT @ pose))(rooms)
    assert "cameras and surfaces do not tell which way is up: --up is taken as it is" in check.unknowns(
        check.quick_check(scenes))


@pytest.mark.parametrize("plant, scenes", [(lambda one: one, "room0, room1"), (in_first_scene, "room0")])
def test_scenes_whose_red_and_blue_may_be_swapped_are_noted(rooms, plant, scenes):
    warm = rooms.edited(color=lambda frame: (frame["color"] * [1, 0.9, 0.7]).astype(np.uint8))
    swap = plant(lambda frames: frames.with_images(lambda image: image[..., ::-1], ["color"]))
    notes = [[row.words for row in check.quick_check(frames) if row.test == "colors"] for frames in (warm, swap(warm))]
    assert "bluish" not in notes[0][0] and f"bluish in {scenes}: " in notes[1][0]


def test_what_was_skipped_or_left_out_is_said(video):
    frames = MORE["a blank depth image"](video)
    frames.num_skipped, frames.left_out = 3, {"dot files": 2}
    notes = [row.words for row in check.inspect({"all": frames}) if row.verdict == "note"]
    assert any("1 in the sample, skipped: video/0" in words for words in notes)
    assert any("2 dot files, 3 frames with a lost pose" in words for words in notes)
    assert any(words.startswith("mean red") for words in notes)


# ----------------------------------------------------------------------------------------------------- labels


def scrambled(label):
    """Labels of the whole frame, permuted."""
    return np.where(label >= 0, (label + 1) % 16, -1)


def interpolated(label):
    """A label image that was enlarged with interpolation, and made small again."""
    size = label.shape[::-1]
    image = Image.fromarray((label + 1).astype(np.float32))
    for scale in (0.75, 1):
        image = image.resize((int(scale * size[0]), int(scale * size[1])), Image.Resampling.BILINEAR)
    return np.round(np.asarray(image)).astype(np.int32) - 1


@pytest.mark.parametrize("fault, change", [("label ids", lambda label: scrambled(label)),
                                           ("resized labels", lambda label: interpolated(label))])
def test_labels_of_one_scene_among_many_are_found(rooms, fault, change):
    scenes = Frames([{**frame, "name": f"{i}-{frame['name']}"} for i in range(4) for frame in rooms])
    spoiled = in_first_scene(lambda frames: frames.edited(label=lambda frame: change(frame["label"])))(scenes)
    assert label_faults(scenes) == {} and next(iter(label_faults(spoiled))) == fault


@pytest.mark.parametrize("fault, words, change", [
    ("label ids", "shifted or permuted", {"label": lambda frame: scrambled(frame["label"])}),
    ("label ids", "the class list lacks: id 99", {"label": lambda frame: np.where(
        frame["label"] == 0, 16, frame["label"])}),
    ("resized labels", "third one", {"label": lambda frame: interpolated(frame["label"])}),
    ("instance ids", "mostly of another class", {"instance": lambda frame: np.ones_like(frame["label"])}),
    ("instance ids", "the labels again", {"instance": lambda frame: frame["label"]}),
    ("instance ids", "No labeled pixel", {"instance": lambda frame: np.full_like(frame["label"], -1)}),
    ("instance ids", "id 0 count as none", {"instance": lambda frame: np.where(
        frame["instance"] == frame["instance"][frame["instance"] > 0].min(), -1, frame["instance"])})])
def test_labels_that_cannot_be_right_are_found(rooms, fault, words, change):
    frames = rooms.edited(**change)
    frames.class_names.append("id 99")
    found = label_faults(frames)
    assert list(found) == [fault] and words in found[fault]


def test_objects_close_to_the_camera_in_some_images_are_no_fault_of_units(video):
    near = {frame["name"] for frame in video[:3]}
    frames = video.edited(depth=lambda frame: frame["depth"] * (0.01 if frame["name"] in near else 1))
    assert check.range_rows(frames, 0) == []
    assert check.range_rows(video.edited(depth=lambda frame: frame["depth"] * 0.01), 0)[0].test == "units of depth"


@pytest.mark.parametrize("words, change", [
    ("flipped left to right", lambda label: label[:, ::-1]), ("by 180 degrees", lambda label: label[::-1, ::-1])])
def test_label_images_that_are_turned_are_found(rooms, words, change):
    row, = check.label_image_rows([rooms.edited(label=lambda frame: change(frame["label"]))])
    assert row.test == "label images" and words in row.words
    assert check.label_image_rows([rooms]) == []


@pytest.mark.parametrize("words, offset", [("of the next frame", -1), ("of the previous frame", 1)])
def test_label_images_of_another_frame_are_found(video, words, offset):
    labels = {frame["name"]: video[(i + offset) % len(video)]["label"] for i, frame in enumerate(video)}
    row, = check.label_image_rows([video.edited(label=lambda frame: labels[frame["name"]])])
    assert row.test == "label images" and words in row.words


@pytest.mark.parametrize("name", ["Void", "unannotated", "n/a"])
@pytest.mark.parametrize("number", [0, 7, 255])
@pytest.mark.filterwarnings("ignore:.*is ignored")
def test_a_class_that_means_no_class_is_found_or_with_id_0_or_255_ignored(rooms, tmp_path, name, number):
    (tmp_path / "classes.txt").write_text(f"{number} {name}\n2 floor\n")
    listed = load_classes(tmp_path / "classes.txt")
    frames = rooms.edited()
    frames.class_names[0] = listed[number] or "wall"
    assert list(label_faults(frames)) == ["void class"] * (number == 7)


@pytest.mark.parametrize("name", ["nothing", "background"])
@pytest.mark.parametrize("number", [0, 255])
def test_a_class_without_instances_may_mean_none_or_hold_objects_with_id_0(rooms, name, number):
    frames = rooms.edited(label=lambda frame: frame["label"] % 17, instance=lambda frame: frame["instance"] - 50 * (
        frame["label"] == 4))  # -1 becomes a class of its own; one more class has no instances
    frames.class_names.append(name)
    ids = [*range(1, 17), number]
    labels = check.read_labels(frames, 48)
    row, = check.instance_rows(labels, frames.class_names, ids)
    assert row.verdict == "WRONG" and f"class '{name}'" in row.words
    assert "it means unlabeled" in row.words and "or its objects have id 0" in row.words


@pytest.mark.parametrize("value, words", [(-1, "No pixel of the sampled label images"), (3, "holds only one value")])
def test_labels_of_one_value_are_found(rooms, value, words):
    found = label_faults(rooms.edited(label=lambda frame: np.full_like(frame["label"], value)))
    assert list(found) == ["label ids"] and words in found["label ids"]


@pytest.mark.parametrize("field", ["color", "depth", "label"])
def test_images_that_are_copies_of_each_other_are_found(rooms, video, field):
    same = video.edited(**{field: lambda frame: video[2][field]})
    assert list(faults(same)) == ["copied images"] and f"7 of 7 sampled {field} images" in faults(same)["copied images"]
    half = {frame["name"]: rooms[i % 3 if i < 6 else i][field] for i, frame in enumerate(rooms)}
    twice = rooms.edited(**{field: lambda frame: half[frame["name"]]})
    found = ["unconfirmed"] if field == "depth" else []  # depth of other frames is confirmed by few
    assert list(faults(twice)) == found  # two of a scene's six frames
    scenes = Frames([*rooms, *({**frame, "name": f"copy/{i}"} for i, frame in enumerate(rooms[:6]))])
    assert "in two scenes" in faults(scenes.edited(**{
        key: lambda frame, key=key: frame[key] + 1 for key in {"color", "depth", "label"} - {field}}))["copied images"]


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    write_rooms_as_scannet(tmp_path, num_rooms=2, frames_per_room=4, size=SIZE)
    return tmp_path


def test_the_command_passes_a_clean_folder_and_draws_it(folder, capsys):
    picture = folder / "check.png"
    assert check.main([str(folder), "--train-split", f"{folder}/train.txt", "--val-split", f"{folder}/val.txt",
                       "--picture", str(picture)]) == 0
    assert "Nothing wrong was found" in capsys.readouterr().out
    red, green, blue = np.asarray(Image.open(picture)).reshape(-1, 3).T
    assert ((green > 200) & (red < 200) & (blue == 0)).sum() > 500  # points whose depth is off by less than 1 %


def write_unlisted_id(folder):
    path = next(folder.glob("*/label-filt/*.png"))
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 77)).save(path)


def name_what_is_unlabeled(folder):
    path = folder / "classes.txt"
    path.write_text(path.read_text().replace("0 unlabeled", "0 nothing"))


def remove_class_list(folder):
    (folder / "classes.txt").unlink()


def remove_labels_of_a_scene(folder):
    shutil.rmtree(next(folder.glob("*/label-filt")))


@pytest.mark.parametrize("plant, words", [(write_unlisted_id, "id 77"), (remove_class_list, "but no class list"),
                                          (name_what_is_unlabeled, "class 'nothing' has an instance"),
                                          (remove_labels_of_a_scene, "1 of 2 scenes have no label-filt")])
def test_the_command_names_faults_of_files_and_returns_1(folder, capsys, plant, words):
    plant(folder)
    assert check.main([str(folder)]) == 1
    findings = capsys.readouterr().out.split("WRONG")[1:]
    assert len(findings) == 1 and words in " ".join(findings[0].split())


@pytest.mark.parametrize("file", ["color/1.jpg", "depth/1.png", "pose/1.txt", "label-filt/1.png"])
def test_the_command_refuses_a_file_that_cannot_be_read_in_one_line(folder, capsys, file):
    path = next(folder.glob(f"*/{file}"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SystemExit) as end:
        run_command(lambda: check.main([str(folder)]))
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(path) in error and error.count("\n") == 1


def test_the_command_names_frames_in_both_splits(folder, capsys):
    splits = ["--split", f"{folder}/train.txt", f"{folder}/val.txt"]
    assert check.main([str(folder), *splits]) == 0
    (folder / "val.txt").write_text(next(folder.glob("*/pose")).parent.name + "\n")
    (folder / "train.txt").write_text("".join(f"{path.parent.name}\n" for path in folder.glob("*/pose")))
    assert check.main([str(folder), *splits]) == 1
    assert "frames in both splits" in capsys.readouterr().out


def test_the_command_reads_folders_such_as_those_of_7_scenes(folder, tmp_path, capsys):
    source = open_frames(str(folder), labels=False)
    intrinsics = source[0]["intrinsics"]
    for index, name in enumerate(source.names):
        scene, stem = name.split("/")
        target = tmp_path / "seven" / scene / f"frame-{int(stem):06d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / scene / "depth" / f"{stem}.png", f"{target}.depth.png")
        Image.fromarray(source.color(index)).save(f"{target}.color.png")
        np.savetxt(f"{target}.pose.txt", np.linalg.inv(source[index]["world2cam"]))
    camera = ",".join(str(intrinsics[row, column]) for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))
    assert check.main([str(tmp_path / "seven"), "--intrinsics", camera]) == 0
    capsys.readouterr()
    with pytest.raises(ValueError, match="or --intrinsics"):
        check.main([str(tmp_path / "seven")])


@pytest.mark.parametrize("arguments, words", [
    (["--up", "w"], "up must be one of"), (["--up", "0,0,0"], "a vector x,y,z"), (["--frames", "0"], "at least 1"),
    (["--picture", "no/x.png"], "a folder that exists"), (["--picture", "x"], "name of a .png file"),
    (["--intrinsics", "1,2"], "fx,fy,cx,cy")])
def test_bad_options_are_refused(folder, capsys, arguments, words):
    with pytest.raises(SystemExit):
        check.main([str(folder), *arguments])
    assert words in capsys.readouterr().err


def test_the_rooms_take_no_options_of_folders(capsys):
    with pytest.raises(SystemExit):
        check.main(["rooms", "--train-split", "x.txt"])
    assert "the built-in rooms take no splits" in capsys.readouterr().err
