# SPDX-License-Identifier: MIT
"""Planted faults are named, each alone, in rendered and in real frames; clean and noisy data raise no finding."""
import shutil
import time

import numpy as np
import pytest
from helpers import write_rooms_as_scannet
from PIL import Image

import check
from data import crop_intrinsics, resize_intrinsics
from sources.rooms import RoomFrames
from sources.scannet import ScanNetFrames

QUARTER_TURN = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])  # z-up world -> y-up world


class Frames(list):
    """A source in memory; its last label name is not in the class list."""

    def __init__(self, frames, class_names):
        super().__init__(frames)
        self.class_names = class_names

    def edited(self, **fields):
        """A copy with some fields replaced by functions of the frame."""
        return Frames([{**frame, **{key: change(frame) for key, change in fields.items()}} for frame in self],
                      self.class_names)

    def with_poses(self, change):
        """A copy whose stored camera-to-world matrices went through `change`."""
        return self.edited(world2cam=lambda frame: np.linalg.inv(change(np.linalg.inv(frame["world2cam"]))))

    def with_next(self, *keys):
        """A copy whose frames have some fields of the next frame of their scene."""
        pairs = [(a, b) for a, b in zip(self, self[1:]) if a["name"].split("/")[0] == b["name"].split("/")[0]]
        return Frames([{**a, **{key: b[key] for key in keys}} for a, b in pairs], self.class_names)

    def with_noise(self):
        rng = np.random.default_rng(0)
        noise = 0.02 * rng.standard_normal(self[0]["depth"].shape)
        return self.edited(depth=lambda frame: np.where(frame["depth"] > 0, frame["depth"] + rng.permutation(noise), 0)
                           .astype(np.float32))


@pytest.fixture(scope="module")
def rooms():
    source = RoomFrames("train", 3, 6, size=(120, 160))
    return Frames([source[i] for i in range(len(source))], [*source.class_names, "id 17"])


@pytest.fixture(scope="module", params=["rooms", "ycbv"])
def frames(request):
    if request.param == "rooms":
        return request.getfixturevalue("rooms")
    folder = check.Path(check.__file__).resolve().parent.parent / "shared" / "data" / "ycbv"
    if not folder.is_dir():
        pytest.skip("needs the real frames in shared/ beside the repository")
    source = ScanNetFrames(folder, folder / "classes.txt")
    return Frames([source[i] for i in (*range(6), *range(10, 15))], [*source.class_names, "id 22"])


def findings(frames, up="z"):
    """Names of what is wrong with frames, one source or a dict of them."""
    sources = frames if isinstance(frames, dict) else {"all": frames}
    source, = {id(source.class_names): source for source in sources.values()}.values()
    rows = check.inspect(sources, len(source.class_names) - 1, up)
    return [row.test for row in rows if row.verdict == "WRONG"]


def diagonal(*signs):
    return np.diag([*signs, 1.0])


def rescaled(field, scale):
    """Intrinsics of an image `scale` times as large."""
    return lambda frame: resize_intrinsics(frame[field], (1, 1), (scale, scale))


def millimetres(pose):
    return np.block([[pose[:3, :3], 1000 * pose[:3, 3:]], [pose[3:]]])


FAULTS = {
    "pose inverted": lambda frames: frames.with_poses(np.linalg.inv),
    "OpenGL axes": lambda frames: frames.with_poses(lambda pose: pose @ diagonal(1, -1, -1)),
    "camera axes": lambda frames: frames.with_poses(lambda pose: pose @ diagonal(-1, -1, 1)),
    "mirrored poses": lambda frames: frames.with_poses(lambda pose: pose @ diagonal(1, -1, 1)),
    "mirrored poses, of the world": lambda frames: frames.with_poses(lambda pose: diagonal(1, -1, 1) @ pose),
    "mirrored poses, both": lambda frames: frames.with_poses(
        lambda pose: diagonal(1, -1, 1) @ pose @ diagonal(1, -1, 1)),
    "millimetres in poses": lambda frames: frames.with_poses(millimetres),
    "depth scale, 5000": lambda frames: frames.edited(depth=lambda frame: frame["depth"] * np.float32(5)),
    "depth scale, 100": lambda frames: frames.edited(depth=lambda frame: frame["depth"] * np.float32(0.1)),
    "8-bit depth": lambda frames: frames.edited(depth=lambda frame: np.float32(0.001) * (
        (1000 * frame["depth"]).astype(np.uint32) >> 5).astype(np.uint8)),
    "colour intrinsics": lambda frames: frames.edited(intrinsics=rescaled("intrinsics", 2.025)),
    "depth intrinsics": lambda frames: frames.edited(depth_intrinsics=rescaled("depth_intrinsics", 0.5)),
    "intrinsics of both": lambda frames: frames.edited(intrinsics=rescaled("intrinsics", 2),
                                                       depth_intrinsics=rescaled("depth_intrinsics", 2)),
    "depth and colour shifted in time": lambda frames: frames.with_next("depth", "depth_intrinsics"),
    "depth and colour shifted in time, colour": lambda frames: frames.with_next("color", "intrinsics"),
    "poses off by one frame": lambda frames: frames.with_next("world2cam"),
    "up axis": lambda frames: frames.with_poses(lambda pose: QUARTER_TURN @ pose),
    "label ids": lambda frames: frames.edited(label=lambda frame: frame["label"] + 1),
    "frames in both splits": lambda frames: {"train": frames, "val": Frames(frames[-1:], frames.class_names)},
    "instance ids": lambda frames: frames.edited(instance=lambda frame: np.full_like(frame["instance"], -1)),
}


@pytest.mark.parametrize("planted", FAULTS)
def test_a_planted_fault_is_named_and_nothing_else_is(frames, planted):
    assert findings(FAULTS[planted](frames)) == [planted.split(",")[0]]


@pytest.mark.parametrize("change", [lambda frames: frames, Frames.with_noise], ids=["clean", "noise of 2 cm"])
def test_clean_frames_and_noisy_depth_raise_no_finding(frames, change):
    assert findings(change(frames)) == []
    assert check.quick_check(change(frames)) == []


def test_a_world_with_y_up_is_fine_if_up_says_so(frames):
    turned = FAULTS["up axis"](frames)
    assert findings(turned, up="y") == [] and check.quick_check(turned, up="y") == []


@pytest.mark.parametrize("planted", ["pose inverted", "OpenGL axes", "mirrored poses", "mirrored poses, of the world",
                                     "millimetres in poses", "8-bit depth", "colour intrinsics", "depth intrinsics",
                                     "intrinsics of both", "up axis"])
def test_the_quick_check_names_what_cannot_be_right(frames, planted):
    assert [fault for fault, _ in check.quick_check(FAULTS[planted](frames))] == [planted.split(",")[0]]


@pytest.mark.parametrize("change", [
    lambda frame: np.where(np.arange(frame["depth"].size).reshape(frame["depth"].shape) % 5 > 1, np.inf, frame["depth"]),
    lambda frame: frame["depth"] * (np.indices(frame["depth"].shape) % 2).prod(0)], ids=["inf", "odd rows and columns"])
def test_depth_that_is_unknown_in_many_pixels_is_no_fault(rooms, change):
    assert check.quick_check(rooms.edited(depth=lambda frame: change(frame).astype(np.float32))) == []


def test_the_quick_check_is_quick(frames):
    start = time.perf_counter()
    check.quick_check(frames)
    assert time.perf_counter() - start < 2


def test_every_fault_has_a_mend_in_its_words(rooms):
    for fault, words in check.quick_check(FAULTS["millimetres in poses"](rooms)):
        assert "0.001" in words and words.endswith(check.MENDS[fault])


def test_labels_that_start_at_zero_are_found_by_the_height_of_the_floor(rooms):
    assert findings(rooms.edited(label=lambda frame: frame["label"] - (frame["label"] >= 0))) == ["label ids"]


@pytest.mark.parametrize("instance", [lambda frame: np.ones_like(frame["label"]), lambda frame: frame["label"]],
                         ids=["one id for everything", "the labels again"])
def test_instance_ids_that_separate_no_objects_are_found(rooms, instance):
    assert findings(rooms.edited(instance=instance)) == ["instance ids"]


def test_cropped_images_whose_intrinsics_are_right_raise_no_finding(rooms):
    columns = rooms[0]["depth"].shape[1] // 3
    crops = {key: (lambda frame, key=key: frame[key][:, columns:]) for key in ("color", "depth", "label", "instance")}
    cameras = {key: (lambda frame, key=key: crop_intrinsics(frame[key], 0, columns))
               for key in ("intrinsics", "depth_intrinsics")}
    assert findings(rooms.edited(**crops, **cameras)) == []


def test_what_the_frames_cannot_tell_is_not_tested_rather_than_fine(rooms):
    alone = Frames([{**rooms[0], "name": f"scene{i}/0", "label": None, "instance": None} for i in range(4)], ["id 1"])
    still = Frames([{**rooms[0], "name": f"scene/{i}"} for i in range(4)], rooms.class_names)
    tests = {planted.split(",")[0] for planted in FAULTS} & {fault for fault, _, _ in check.alternatives()}
    for source in (alone, still):
        verdicts = {row.test: row.verdict for row in check.inspect({"all": source}, 1000)}
        assert tests and {verdicts[test] for test in tests} == {"not tested"}
    verdicts = {row.test: row.verdict for row in check.inspect({"all": alone})}
    assert verdicts["neighbours"] == verdicts["label ids"] == verdicts["instance ids"] == "not tested"


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    write_rooms_as_scannet(tmp_path, num_rooms=2, frames_per_room=4, size=(120, 160))
    return tmp_path


def test_the_command_passes_a_clean_folder_and_draws_it(folder, capsys):
    picture = folder / "check.png"
    assert check.main([str(folder), "--train-split", f"{folder}/train.txt", "--val-split", f"{folder}/val.txt",
                       "--picture", str(picture)]) == 0
    assert "Nothing wrong was found" in capsys.readouterr().out
    red, green, blue = np.asarray(Image.open(picture)).reshape(-1, 3).T
    assert ((green > 200) & (red < 200) & (blue == 0)).sum() > 500  # points whose depth is off by less than 1 %


def write_8_bit(folder):
    for path in folder.glob("*/depth/*.png"):
        Image.fromarray((np.asarray(Image.open(path)) >> 5).astype(np.uint8)).save(path)


def write_unlisted_id(folder):
    path = next(folder.glob("*/label-filt/*.png"))
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 77)).save(path)


def write_no_depth(folder):
    path = next(folder.glob("*/depth/*.png"))
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)


def remove_class_list(folder):
    (folder / "classes.txt").unlink()


def remove_labels_of_a_scene(folder):
    shutil.rmtree(next(folder.glob("*/label-filt")))


def write_matrix_that_is_no_pose(folder):
    np.savetxt(next(folder.glob("*/pose/*.txt")), np.diag([2.0, 1, 1, 1]))


@pytest.mark.parametrize("plant, words", [(write_8_bit, "8-bit depth"), (write_unlisted_id, "id 77"),
                                          (write_matrix_that_is_no_pose, "pose is not a rotation"),
                                          (write_no_depth, "No pixel of 1 of 8 sampled frames has depth"),
                                          (remove_class_list, "but no class list"),
                                          (remove_labels_of_a_scene, "1 of 2 scenes have no label-filt")])
def test_the_command_names_faults_of_files_and_returns_1(folder, capsys, plant, words):
    plant(folder)
    assert check.main([str(folder)]) == 1
    findings = capsys.readouterr().out.split("WRONG")[1:]
    assert len(findings) == 1 and words in " ".join(findings[0].split())


def test_the_command_names_frames_in_both_splits_and_classes_that_one_lacks(folder, capsys):
    both = ["--split", f"{folder}/train.txt", f"{folder}/val.txt", f"{folder}/train.txt"]
    assert check.main([str(folder), *both[:3]]) == 0
    assert "not in the sample of" in capsys.readouterr().out
    (folder / "val.txt").write_text(next(folder.glob("*/pose")).parent.name + "\n")
    (folder / "train.txt").write_text("".join(f"{path.parent.name}\n" for path in folder.glob("*/pose")))
    assert check.main([str(folder), *both[:3]]) == 1
    assert "frames in both splits" in capsys.readouterr().out


def test_the_command_reads_folders_such_as_those_of_7_scenes(folder, tmp_path, capsys):
    source = ScanNetFrames(folder, None)
    size, intrinsics = source[0]["depth"].shape, source[0]["intrinsics"]
    for scene in {name.split("/")[0] for name in source.names}:
        (tmp_path / "seven" / scene).mkdir(parents=True)
    for index, name in enumerate(source.names):
        scene, stem = name.split("/")
        target = tmp_path / "seven" / scene / f"frame-{int(stem):06d}"
        shutil.copy(folder / scene / "depth" / f"{stem}.png", f"{target}.depth.png")
        Image.fromarray(source.color(index)).resize(size[::-1]).save(f"{target}.color.png")
        np.savetxt(f"{target}.pose.txt", np.linalg.inv(source[index]["world2cam"]))
    camera = ",".join(str(intrinsics[row, column]) for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))
    assert check.main([str(tmp_path / "seven"), "--intrinsics", camera]) == 0
    assert check.main([str(tmp_path / "seven")]) == 1
    assert "give --intrinsics" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments, words", [(["--up", "w"], "invalid choice"), (["--frames", "0"], "at least 1"),
                                              (["--picture", "no/x.png"], "a folder that exists"),
                                              (["--picture", "x"], "name of a .png file"),
                                              (["--intrinsics", "1,2"], "fx,fy,cx,cy")])
def test_bad_options_are_refused(folder, capsys, arguments, words):
    with pytest.raises(SystemExit):
        check.main([str(folder), *arguments])
    assert words in capsys.readouterr().err


def test_the_rooms_take_no_options_of_folders(capsys):
    with pytest.raises(SystemExit):
        check.main(["rooms", "--train-split", "x.txt"])
    assert "the built-in rooms take no splits" in capsys.readouterr().err
