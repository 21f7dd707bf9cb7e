# SPDX-License-Identifier: MIT
"""cache.py: what is stored comes back, once computed; what is damaged, foreign or half-written is never used."""
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from support import files
from support.cache import FeatureCache, Store, SuperpointCache, image_key, to_tensor
from support.runtime import init_worker

FORK = multiprocessing.get_context("fork")
IMAGES = list(np.random.default_rng(0).integers(0, 256, (10, 8, 12, 3), np.uint8))


class Tower:
    """A stand-in for an image tower that counts the images it has seen, and may be killed after some of them."""

    def __init__(self, factor=1.0, dies_after=99):
        self.seen = 0
        self.factor = factor
        self.dies_after = dies_after

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 8, 12)
        assert 0 <= images.min() <= images.max() <= 1
        if self.seen >= self.dies_after:
            os._exit(9)
        self.seen += len(images)
        tokens = torch.nn.functional.avg_pool2d(images, 4) * self.factor  # (B, 3, 2, 3)
        return tokens.requires_grad_(), images.flatten(1)[:, :5] * self.factor


def build(folder, images=IMAGES, owner="tower, 8x12", tower=None, **options):
    tower = tower or Tower()
    cache = FeatureCache(folder, owner, tower, batch_size=3, **options)
    cache.build(images)
    return cache, tower


def reader(folder, owner="tower, 8x12"):
    """The cache as a worker has it: without the tower."""
    return FeatureCache(folder, owner, None)


def expected(image, factor=1.0):
    """The pooled feature of an image, as a cache keeps it."""
    _, pooled = Tower(factor)(to_tensor(image)[None])
    return pooled[0].half()


def entries(cache):
    return sorted(cache.store.folder.glob("??/*"))


def unusable():
    return pytest.raises(ValueError, match="no usable features .*run build again")


# ------------------------------------------------------------------------------------------------------------- store

KEY, OTHER = b"0123456789abcdef", b"fedcba9876543210"


def test_a_store_gives_back_what_was_put_and_nothing_else(tmp_path):
    store = Store(tmp_path, "owner")
    assert store.get(KEY) is None and store.size(KEY) is None
    for content in (b"", b"abc", b"\0" * 1000):
        store.put(KEY, content)
        assert store.get(KEY).tobytes() == content
        assert store.size(KEY) == len(content)
    assert store.get(OTHER) is None
    assert Store(tmp_path, "owner").get(KEY).tobytes() == b"\0" * 1000


def test_an_entry_is_the_file_that_it_always_was(tmp_path):
    """So that a cache outlives a new version."""
    Store(tmp_path, "owner").put(KEY, b"abc")
    name = "32793175d6a4217ae1e8b894c713b518"
    entry = (tmp_path / name / "30" / KEY.hex()).read_bytes()
    assert entry == b"BFSTORE1" + bytes.fromhex(name) + KEY + bytes.fromhex("a7bf27fa") + b"abc"


def test_owners_in_one_folder_do_not_meet(tmp_path):
    """Also if an entry is copied over, or two kinds of cache are given one owner."""
    first, second = Store(tmp_path, "first"), Store(tmp_path, "second")
    first.put(KEY, b"abc")
    second.put(KEY, b"def")
    second.path(KEY).write_bytes(first.path(KEY).read_bytes())
    assert second.get(KEY) is None and first.get(KEY).tobytes() == b"abc"
    stores = (reader(tmp_path, "same").store, SuperpointCache(tmp_path, None, "same").store, Store(tmp_path, "same"))
    assert len({store.folder for store in stores}) == 3


def test_a_damaged_entry_is_deleted_and_may_be_put_again(tmp_path):
    store = Store(tmp_path, "owner")
    store.put(KEY, b"abcdef")
    path = store.path(KEY)
    whole = path.read_bytes()
    damaged = [whole[:place] + bytes([byte ^ 255]) + whole[place + 1:] for place, byte in enumerate(whole)]
    for content in (*damaged, b"", whole[:30], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        assert store.get(KEY) is None and not path.exists()
    store.put(KEY, b"abcdef")
    assert path.read_bytes() == whole


def test_temporaries_are_swept_after_a_day(tmp_path):
    folder = Store(tmp_path, "owner").folder / "tmp"
    for name, age in (("left by a killed process", 25), ("being written", 1)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - 3600 * age,) * 2)
    Store(tmp_path, "owner")
    assert os.listdir(folder) == ["being written"]


def test_a_full_disk_is_one_line_and_what_can_be_computed_again_goes_on(tmp_path, monkeypatch):
    store, cache = Store(tmp_path, "owner"), SuperpointCache(tmp_path, rows, "rows")
    store.put(KEY, b"old")
    monkeypatch.setattr(files, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match=f"No space left on device, .* GiB free: '{store.path(KEY)}'"):
        store.put(KEY, b"abcdef")
    assert store.get(KEY).tobytes() == b"old"
    assert not os.listdir(store.folder / "tmp")
    with pytest.warns(UserWarning, match="takes no new entries: No space left"):
        assert np.array_equal(cache(DEPTH, COLORS, INTRINSICS), SEGMENTS)


def test_a_cache_that_cannot_be_written_is_read_and_what_it_lacks_is_kept_for_the_run(tmp_path, monkeypatch):
    """Also for workers, and by several processes if nothing is missing."""
    build(tmp_path, IMAGES[:4])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "access", lambda path, mode: not path.is_relative_to(tmp_path))
    with pytest.warns(UserWarning, match=f"cache {tmp_path} cannot be written"):
        cache, tower = build(tmp_path)
    assert tower.seen == 6
    assert len(list(DataLoader(Reader(cache), 5, num_workers=1))) == 2
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.warns(UserWarning):
        cache = reader(tmp_path)
    assert cache.build(IMAGES[:4], 0, 2) == 0
    with pytest.raises(ValueError, match="3 images have no features yet, and 2 processes cannot share"):
        cache.build(IMAGES, 0, 2)


def test_a_cache_that_cannot_be_made_is_a_temporary_one():
    with pytest.warns(UserWarning, match="cache /proc/none cannot be written"):
        store = Store("/proc/none", "owner")
    store.put(KEY, b"abc")
    assert store.get(KEY).tobytes() == b"abc" and store.is_temporary


# ---------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("shapes", [[(4, 2, 3), (5,), (5, 2, 3)], [()], [(2, 0), (1, 1, 7)]])
def test_any_number_of_tensors_of_any_shapes_comes_back_in_half_precision(tmp_path, shapes):
    generator = torch.Generator().manual_seed(0)
    features = tuple(torch.randn(2, *shape, generator=generator) for shape in shapes)
    cache = FeatureCache(tmp_path, "tower", lambda images: features)
    cache.build(IMAGES[:2])
    for number in range(2):
        kept = [tensor[number].half() for tensor in features]
        for _ in range(2):
            found = cache.get(IMAGES[number])
            assert len(found) == len(shapes)
            assert all(map(torch.equal, found, kept))
            found[0].add_(1)  # writable, and the entry stays as it is


def test_equal_images_are_encoded_once_and_changed_ones_again(tmp_path):
    _, tower = build(tmp_path, IMAGES[:2] * 3)
    assert tower.seen == 2
    changed = IMAGES[0].copy()
    changed[0, 0, 0] ^= 1
    _, tower = build(tmp_path, [changed, *IMAGES[:3]])
    assert tower.seen == 2  # the changed one and the third


def test_the_shape_of_an_image_is_part_of_its_hash():
    assert image_key(IMAGES[0]) != image_key(IMAGES[0].reshape(12, 8, 3))
    assert image_key(IMAGES[0]) == image_key(np.asfortranarray(IMAGES[0]))
    with pytest.raises(ValueError, match="uint8"):
        image_key(IMAGES[0].astype(np.float32))


def test_a_missing_or_damaged_entry_is_encoded_where_the_tower_is_and_refused_elsewhere(tmp_path, monkeypatch):
    cache, tower = build(tmp_path, IMAGES[:2])
    path = cache.store.path(image_key(IMAGES[0]))
    whole = path.read_bytes()
    for damaged in (whole[:-1], cache.store.path(image_key(IMAGES[1])).read_bytes()):
        path.write_bytes(damaged)
        with unusable():
            reader(tmp_path).get(IMAGES[0])
        with unusable(), monkeypatch.context() as worker:
            worker.setattr("support.cache.get_worker_info", lambda: 0)
            cache.get(IMAGES[0])
        assert torch.equal(cache.get(IMAGES[0])[1], expected(IMAGES[0]))
        assert path.read_bytes() == whole
    assert tower.seen == 4
    cache.get(IMAGES[5])
    assert tower.seen == 5 and len(entries(cache)) == 3


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    process = FORK.Process(target=build, args=(tmp_path, IMAGES, "tower, 8x12", Tower(dies_after=6)))
    process.start()
    process.join()
    assert process.exitcode == 9
    cache, tower = build(tmp_path)
    assert tower.seen == 4 and len(entries(cache)) == 10


def test_processes_share_the_work(tmp_path):
    towers = [Tower(), Tower()]
    for rank in range(2):
        FeatureCache(tmp_path, "tower, 8x12", towers[rank], batch_size=3).build(IMAGES, rank, 2)
    assert [tower.seen for tower in towers] == [5, 5]
    assert build(tmp_path)[1].seen == 0


def test_concurrent_builds_of_the_same_images_leave_whole_entries(tmp_path):
    processes = [FORK.Process(target=build, args=(tmp_path, IMAGES * 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache, tower = build(tmp_path)
    assert tower.seen == 0 and len(entries(cache)) == 10
    assert not os.listdir(cache.store.folder / "tmp")


class Reader(Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.cache.get(IMAGES[index])[0]


def test_workers_build_and_read(tmp_path):
    cache, tower = build(tmp_path, num_workers=2)
    assert tower.seen == 10
    alone, together = (torch.cat(list(DataLoader(Reader(cache), 5, num_workers=n))) for n in (0, 2))
    assert torch.equal(alone, together)


def test_a_temporary_folder_outlives_workers_and_copies_but_not_its_owner():
    cache, _ = build(None)
    list(DataLoader(Reader(cache), 5, num_workers=2))
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(IMAGES[0])[0], cache.get(IMAGES[0])[0])
    assert copy.encode is None
    del copy
    folder = cache.store.folder
    assert folder.exists()
    del cache
    assert not folder.exists()


@pytest.mark.parametrize("encode, message", [
    (lambda x: x, "tuple of tensors .B, .... for B = 3, got a Tensor"),
    (lambda x: (), "tuple of tensors .B, .... for B = 3, got a tuple of shapes ..$"),
    (lambda x: (x[:1], x.flatten(1)), r"for B = 3, got a tuple of shapes .\(1, 3, 8, 12\), \(3, 288\)"),
    (lambda x: (x * 1e6, x.flatten(1)), "not finite in fp16"),
    (lambda x: (x, x.flatten(1) * float("nan")), "not finite in fp16")])
def test_features_that_cannot_be_kept_are_refused(tmp_path, encode, message):
    cache = FeatureCache(tmp_path, "bad", encode, batch_size=3)
    with pytest.raises(ValueError, match=message):
        cache.build(IMAGES)
    assert not entries(cache)


def test_the_size_of_the_features_is_compared_with_the_disk_before_the_work(tmp_path, monkeypatch):
    build(tmp_path, IMAGES[:4])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="6 images need .* GiB, .* has 0.00 GiB left"):
        build(tmp_path)


class SignedImages(list):
    """Images that say when they change, and count how often one is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)

    def signature(self, indices):
        return b"".join(image_key(list.__getitem__(self, index)) for index in indices)


def test_images_whose_signature_is_known_are_not_read(tmp_path):
    for seen, reads in ((10, 20), (0, 0)):
        images = SignedImages(IMAGES)
        assert build(tmp_path, images)[1].seen == seen and images.reads == reads
    for rank in range(3):  # a share is another set of images
        images = SignedImages(IMAGES)
        reader(tmp_path).build(images, rank, 3)
        assert images.reads == len(range(rank, 10, 3))
    images = SignedImages(IMAGES[:5])
    images[2] = IMAGES[2] + 1
    assert build(tmp_path, images)[1].seen == 1 and images.reads == 6


def test_entries_that_vanished_or_shrank_are_encoded_again_without_reading_the_others(tmp_path):
    cache, _ = build(tmp_path, SignedImages(IMAGES))
    vanished, shrunk = (cache.store.path(image_key(IMAGES[number])) for number in (2, 7))
    vanished.unlink()
    shrunk.write_bytes(shrunk.read_bytes()[:-2])
    images = SignedImages(IMAGES)
    _, tower = build(tmp_path, images)
    assert tower.seen == images.reads == 2
    assert all(len(reader(tmp_path).get(image)) == 2 for image in IMAGES)


# ------------------------------------------------------------------------------------------------------- superpoints

DEPTH = np.ones((4, 6), np.float32)
COLORS = np.zeros((4, 6, 3), np.uint8)
INTRINSICS = np.eye(3)
SEGMENTS = np.indices((4, 6))[0]


def rows(depth, colors, intrinsics):
    """An oversegmentation."""
    return np.indices(depth.shape)[0]


def never(depth, colors, intrinsics):
    raise AssertionError("computed")


def test_superpoints_are_computed_once_and_damage_is_noticed(tmp_path):
    def get(oversegment, owner="rows"):
        cache = pickle.loads(pickle.dumps(SuperpointCache(tmp_path, oversegment, owner)))
        return cache(DEPTH, COLORS, INTRINSICS)

    for oversegment in (rows, never):
        assert get(oversegment).dtype == np.int64
        assert np.array_equal(get(oversegment), SEGMENTS)
    path, = SuperpointCache(tmp_path, never, "rows").store.folder.glob("??/*")
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(content)
        assert np.array_equal(get(rows), SEGMENTS) and path.read_bytes() == whole
    with pytest.raises(AssertionError, match="computed"):
        get(never, "columns")


@pytest.mark.parametrize("other", [
    (DEPTH + 1, COLORS, INTRINSICS), (DEPTH, COLORS + 1, INTRINSICS), (DEPTH, COLORS, 2 * INTRINSICS),
    (DEPTH.reshape(6, 4), COLORS.reshape(6, 4, 3), INTRINSICS)])
def test_superpoints_of_another_frame_are_not_used(tmp_path, other):
    SuperpointCache(tmp_path, rows, "rows")(DEPTH, COLORS, INTRINSICS)
    with pytest.raises(AssertionError, match="computed"):
        SuperpointCache(tmp_path, never, "rows")(*other)


# ----------------------------------------------------------------------------------------------------------- workers


def is_alive(pid):
    """Whether a process runs; one that has ended may remain as a zombie until somebody asks for its status."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def encode_and_be_killed(folder, pipe):
    def die(images):
        pipe.send(multiprocessing.active_children()[0].pid)
        os.kill(os.getpid(), signal.SIGKILL)

    images = [np.full((300, 400, 3), number, np.uint8) for number in range(12)]  # more than a pipe holds
    FeatureCache(folder, "tower", die, batch_size=4, num_workers=1, worker_init_fn=init_worker).build(images)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_worker_outlives_a_killed_build(tmp_path):
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=encode_and_be_killed, args=(tmp_path, theirs))
    process.start()
    worker = mine.recv()
    process.join()
    end = time.time() + 5
    while is_alive(worker) and time.time() < end:
        time.sleep(0.02)
    survived = is_alive(worker)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    assert process.exitcode == -signal.SIGKILL
    assert not survived


def start_late(pipe):
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    init_worker(0)
    pipe.send("alive")


def leave_a_late_worker(pipe):
    FORK.Process(target=start_late, args=(pipe,)).start()
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_whose_process_ended_while_it_started_ends_too():
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=leave_a_late_worker, args=(theirs,))
    process.start()
    theirs.close()
    process.join()
    with pytest.raises(EOFError):
        mine.recv()
