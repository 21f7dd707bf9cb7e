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
from torch.utils.data import DataLoader

from support.cache import FeatureCache, Store, SuperpointCache, image_key, to_tensor

FORK = multiprocessing.get_context("fork")
IMAGES = list(np.random.default_rng(0).integers(0, 256, (10, 8, 12, 3), np.uint8))


class Tower:
    """A stand-in for an image tower that counts the images it has seen."""

    def __init__(self, factor=1.0):
        self.seen, self.factor = 0, factor

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 8, 12)
        assert 0 <= images.min() <= images.max() <= 1
        self.seen += len(images)
        tokens = torch.nn.functional.avg_pool2d(images, 4) * self.factor  # (B, 3, 2, 3)
        return tokens.requires_grad_(), images.flatten(1)[:, :5] * self.factor


def build(folder, images=IMAGES, owner="tower, 8x12", tower=None, **options):
    tower = tower or Tower()
    cache = FeatureCache(folder, owner, tower, batch_size=3, **options)
    cache.build(images)
    return cache, tower


def entries(cache):
    return sorted(cache.store.folder.glob("??/*"))


# ------------------------------------------------------------------------------------------------------------- store


def key_of(number):
    return number.to_bytes(16, "little")


def test_a_store_gives_back_what_was_put_and_nothing_else(tmp_path):
    store = Store(tmp_path, "owner")
    assert store.get(key_of(1)) is None and store.size(key_of(1)) is None
    for content in (b"", b"abc", b"\0" * 1000):
        store.put(key_of(1), content)
        assert store.get(key_of(1)).tobytes() == content and store.size(key_of(1)) == len(content)
    assert store.get(key_of(2)) is None
    assert Store(tmp_path, "owner").get(key_of(1)).tobytes() == b"\0" * 1000


def test_owners_in_one_folder_do_not_meet(tmp_path):
    """Also if an entry is copied over, or two kinds of cache are given one owner."""
    first, second = Store(tmp_path, "first"), Store(tmp_path, "second")
    first.put(key_of(1), b"abc")
    assert second.get(key_of(1)) is None
    second.put(key_of(1), b"def")
    second.path(key_of(1)).write_bytes(first.path(key_of(1)).read_bytes())
    assert second.get(key_of(1)) is None and first.get(key_of(1)).tobytes() == b"abc"
    folders = {FeatureCache(tmp_path, "same", None).store.folder, SuperpointCache(tmp_path, None, "same").store.folder,
               Store(tmp_path, "same").folder}
    assert len(folders) == 3


def test_a_damaged_entry_is_deleted_and_may_be_put_again(tmp_path):
    store = Store(tmp_path, "owner")
    store.put(key_of(1), b"abcdef")
    path = store.path(key_of(1))
    whole = path.read_bytes()
    for content in (b"", whole[:30], whole[:-1], whole + b"x", whole[:-1] + b"x", b"x" + whole[1:]):
        path.write_bytes(content)
        assert store.get(key_of(1)) is None and not path.exists()
        store.put(key_of(1), b"abcdef")
        assert path.read_bytes() == whole


def test_temporaries_are_swept_after_a_day(tmp_path):
    folder = Store(tmp_path, "owner").folder / "tmp"
    for name, age in (("left by a killed process", 25), ("being written", 1)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - 3600 * age,) * 2)
    Store(tmp_path, "owner")
    assert [path.name for path in folder.iterdir()] == ["being written"]


def fill_disk(monkeypatch, times):
    """The next `times` entries are written to a full disk, and pauses are counted, not slept."""
    written, pauses = [], []
    write = Path.write_bytes

    def write_full(path, content):
        written.append(path)
        write(path, content[:5])
        return write(Path("/dev/full") if len(written) <= times else path, content)

    monkeypatch.setattr(Path, "write_bytes", write_full)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_disk_that_is_full_for_a_while_delays_an_entry(tmp_path, monkeypatch):
    store = Store(tmp_path, "owner")
    pauses = fill_disk(monkeypatch, 2)
    store.put(key_of(1), b"abcdef")
    assert store.get(key_of(1)).tobytes() == b"abcdef" and pauses == [1, 2]


def test_a_full_disk_is_one_line_with_path_and_free_space_and_leaves_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, "owner")
    store.put(key_of(1), b"old")
    fill_disk(monkeypatch, 9)
    with pytest.raises(OSError, match=f"No space left on device, [0-9.]+ GiB free: '{store.path(key_of(1))}'"):
        store.put(key_of(1), b"abcdef")
    assert store.get(key_of(1)).tobytes() == b"old" and not list((store.folder / "tmp").iterdir())


def test_a_temporary_store_is_deleted_with_its_owner_and_not_with_a_copy():
    store = Store(None, "owner")
    copy = pickle.loads(pickle.dumps(store))
    copy.put(key_of(1), b"abc")
    del copy
    folder = store.folder
    assert store.get(key_of(1)).tobytes() == b"abc"
    del store
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------------- features


def test_features_come_back_to_half_precision(tmp_path):
    cache, _ = build(tmp_path)
    tokens, pooled = Tower()(torch.stack([to_tensor(p) for p in IMAGES]))
    for i, image in enumerate(IMAGES):
        own_tokens, own_pooled = cache.get(image)
        assert own_tokens.dtype == own_pooled.dtype == torch.float16 and not own_tokens.requires_grad
        assert torch.equal(own_tokens, tokens[i].half()) and torch.equal(own_pooled, pooled[i].half())
        assert ((own_tokens.float() - tokens[i]).abs() <= tokens[i].abs() * 2 ** -11).all()


@pytest.mark.parametrize("shapes", [[(4, 2, 3), (5,)], [(4, 2, 3), (5,), (5, 2, 3)], [()], [(2, 0), (1, 1, 1, 1, 7)]])
def test_any_number_of_tensors_of_any_shapes_comes_back_in_order(tmp_path, shapes):
    generator = torch.Generator().manual_seed(0)
    features = tuple(torch.randn(2, *shape, generator=generator) for shape in shapes)
    cache = FeatureCache(tmp_path, "tower", lambda images: features)
    cache.build(IMAGES[:2])
    for i in range(2):
        found = cache.get(IMAGES[i])
        assert len(found) == len(shapes)
        assert all(torch.equal(a, b[i].half()) for a, b in zip(found, features))
        found[0].add_(1)  # writable, and the entry stays as it is
        assert all(torch.equal(a, b[i].half()) for a, b in zip(cache.get(IMAGES[i]), features))


def test_the_error_of_a_cached_feature_is_the_one_stated(tmp_path):
    """2^-11 of a value or 2^-25 absolute, 2^-11 of the norm of a token, and hardly more after projection and norm."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(10, 768, 2, 3, generator=generator) * 10 ** torch.empty(10, 768, 1, 1).uniform_(
        -6, 1, generator=generator)
    cache = FeatureCache(tmp_path, "tower", lambda images: (tokens, tokens[:, :512, 0, 0]), batch_size=10)
    cache.build(IMAGES)
    stored = torch.stack([cache.get(image)[0] for image in IMAGES]).float()
    error = (stored - tokens).abs()
    assert (error <= (tokens.abs() * 2 ** -11).clamp(min=2 ** -25)).all() and (tokens.abs() < 2 ** -14).any()
    assert (error.norm(dim=1) <= 2 ** -11 * tokens.norm(dim=1)).all()
    torch.manual_seed(0)
    project = torch.nn.Sequential(torch.nn.Linear(768, 256), torch.nn.LayerNorm(256))
    with torch.no_grad():
        exact, cached = (project(x.permute(0, 2, 3, 1)) for x in (tokens, stored))
    assert ((cached - exact).norm(dim=-1) <= 2 ** -11 * exact.norm(dim=-1)).all()


def test_a_second_build_never_runs_the_tower(tmp_path):
    _, first = build(tmp_path)
    cache, second = build(tmp_path)
    assert first.seen == 10 and second.seen == 0
    cache.get(IMAGES[3])
    assert second.seen == 0


def test_equal_images_are_encoded_once_and_changed_ones_again(tmp_path):
    _, tower = build(tmp_path, IMAGES[:2] * 3)
    assert tower.seen == 2
    changed = IMAGES[0].copy()
    changed[0, 0, 0] ^= 1
    _, tower = build(tmp_path, [changed, *IMAGES[:3]])
    assert tower.seen == 2  # the changed one and the third


def test_another_owner_has_its_own_entries(tmp_path):
    build(tmp_path)
    cache, tower = build(tmp_path, owner="another tower", tower=Tower(2.0))
    assert tower.seen == 10
    assert torch.equal(cache.get(IMAGES[0])[1], Tower(2.0)(to_tensor(IMAGES[0])[None])[1][0].half())
    assert (cache.store.folder / "owner.txt").read_text() == "image feature tensors: another tower"


def test_the_shape_of_an_image_is_part_of_its_hash():
    assert image_key(IMAGES[0]) != image_key(IMAGES[0].reshape(12, 8, 3))
    assert image_key(IMAGES[0]) == image_key(np.asfortranarray(IMAGES[0]))
    with pytest.raises(ValueError, match="uint8"):
        image_key(IMAGES[0].astype(np.float32))


def test_every_flipped_byte_and_every_truncation_is_noticed_and_rebuilt(tmp_path):
    cache, _ = build(tmp_path, IMAGES[:1])
    path, = entries(cache)
    whole = path.read_bytes()
    broken = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:] for i in range(len(whole))]
    broken += [whole[:size] for size in range(0, len(whole), 7)] + [whole + b"\0\0", b"\0" * len(whole)]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no usable features in .*run build again"):
            cache.get(IMAGES[0])
    _, tower = build(tmp_path, IMAGES[:1])
    assert tower.seen == 1 and path.read_bytes() == whole


def test_an_entry_of_another_image_or_tower_is_not_used(tmp_path):
    cache, _ = build(tmp_path, IMAGES[:2])
    first, second = (cache.store.path(image_key(p)) for p in IMAGES[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="no usable features"):
        cache.get(IMAGES[0])
    other, _ = build(tmp_path, IMAGES[:2], owner="another tower")
    second.write_bytes(other.store.path(image_key(IMAGES[1])).read_bytes())
    with pytest.raises(ValueError, match="no usable features"):
        cache.get(IMAGES[1])
    assert build(tmp_path, IMAGES[:2])[1].seen == 2


def test_a_image_that_was_never_encoded_is_an_error(tmp_path):
    cache, _ = build(tmp_path, IMAGES[:2])
    with pytest.raises(ValueError, match="run build again"):
        cache.get(IMAGES[5])


class MortalTower(Tower):
    """A tower that is killed after six images."""

    def __call__(self, images):
        if self.seen == 6:
            os._exit(9)
        return super().__call__(images)


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    process = FORK.Process(target=build, args=(tmp_path, IMAGES, "tower, 8x12", MortalTower()))
    process.start()
    process.join()
    assert process.exitcode == 9
    cache, tower = build(tmp_path)
    assert tower.seen == 4 and len(entries(cache)) == 10


def test_processes_share_the_work_and_may_overlap(tmp_path):
    towers = [Tower(), Tower(), Tower()]
    for rank in range(2):
        FeatureCache(tmp_path, "tower, 8x12", towers[rank], batch_size=3).build(IMAGES, rank, 2)
    assert [tower.seen for tower in towers[:2]] == [5, 5]
    assert build(tmp_path)[1].seen == 0


def test_concurrent_builds_of_the_same_images_leave_whole_entries(tmp_path):
    processes = [FORK.Process(target=build, args=(tmp_path, IMAGES * 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache, tower = build(tmp_path)
    assert tower.seen == 0 and len(entries(cache)) == 10 and not list((cache.store.folder / "tmp").iterdir())


class Reader(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.cache.get(IMAGES[index])[0]


def test_workers_build_and_read(tmp_path):
    cache, tower = build(tmp_path, workers=2)
    assert tower.seen == 10
    alone, together = (torch.cat(list(DataLoader(Reader(cache), 5, num_workers=n))) for n in (0, 2))
    assert torch.equal(alone, together)


def test_a_temporary_folder_outlives_workers_and_copies_but_not_its_owner():
    cache, _ = build(None)
    list(DataLoader(Reader(cache), 5, num_workers=2))
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(IMAGES[0])[0], cache.get(IMAGES[0])[0]) and copy.encode is None
    del copy
    folder = cache.store.folder
    assert folder.exists()
    with pytest.raises(ValueError, match="cannot share a temporary folder"):
        cache.build(IMAGES, 0, 2)
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


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="10 images need .* GiB"):
        build(tmp_path)


def test_size_is_announced(tmp_path, capsys):
    build(tmp_path, IMAGES[:4])
    assert "encoding 4 images: 0.00 GiB in" in capsys.readouterr().out


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
        FeatureCache(tmp_path, "tower, 8x12", None).build(images, rank, 3)
        assert images.reads == len(range(rank, 10, 3))
    images = SignedImages(IMAGES[:5])
    images[2] = IMAGES[2] + 1
    assert build(tmp_path, images)[1].seen == 1 and images.reads == 6


def test_entries_that_vanished_or_shrank_are_encoded_again_without_reading_the_others(tmp_path):
    cache, _ = build(tmp_path, SignedImages(IMAGES))
    vanished, shrunk = (cache.store.path(image_key(IMAGES[i])) for i in (2, 7))
    vanished.unlink()
    shrunk.write_bytes(shrunk.read_bytes()[:-2])
    images = SignedImages(IMAGES)
    cache, tower = build(tmp_path, images)
    assert tower.seen == images.reads == 2
    assert all(len(cache.get(image)) == 2 for image in IMAGES)


def test_an_entry_that_was_altered_in_place_is_refused_and_encoded_at_the_next_build(tmp_path):
    cache, _ = build(tmp_path, SignedImages(IMAGES))
    path = cache.store.path(image_key(IMAGES[4]))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="run build again"):
        cache.get(IMAGES[4])
    assert build(tmp_path, SignedImages(IMAGES))[1].seen == 1
    assert len(cache.get(IMAGES[4])) == 2


# ------------------------------------------------------------------------------------------------------- superpoints

DEPTH, COLORS, INTRINSICS = np.ones((4, 6), np.float32), np.zeros((4, 6, 3), np.uint8), np.eye(3)


def rows(depth, colors, intrinsics):
    """An oversegmentation."""
    return np.indices(depth.shape)[0]


def never(depth, colors, intrinsics):
    raise AssertionError("computed")


def test_superpoints_are_computed_once_and_damage_is_noticed(tmp_path):
    def get(oversegment, owner="rows"):
        return SuperpointCache(tmp_path, oversegment, owner)(DEPTH, COLORS, INTRINSICS)

    for oversegment in (rows, never):
        assert get(oversegment).dtype == np.int64 and np.array_equal(get(oversegment), np.indices((4, 6))[0])
    path, = SuperpointCache(tmp_path, never, "rows").store.folder.glob("??/*")
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(content)
        assert np.array_equal(get(rows), np.indices((4, 6))[0]) and path.read_bytes() == whole
    with pytest.raises(AssertionError, match="computed"):
        get(never, "columns")


@pytest.mark.parametrize("other", [(DEPTH + 1, COLORS, INTRINSICS), (DEPTH, COLORS + 1, INTRINSICS),
                                   (DEPTH, COLORS, 2 * INTRINSICS),
                                   (DEPTH.reshape(6, 4), COLORS.reshape(6, 4, 3), INTRINSICS)])
def test_superpoints_of_another_frame_are_not_used(tmp_path, other):
    SuperpointCache(tmp_path, rows, "rows")(DEPTH, COLORS, INTRINSICS)
    with pytest.raises(AssertionError, match="computed"):
        SuperpointCache(tmp_path, never, "rows")(*other)


def test_a_superpoint_cache_works_in_workers(tmp_path):
    cache = pickle.loads(pickle.dumps(SuperpointCache(tmp_path, rows, "rows")))
    assert np.array_equal(cache(DEPTH, COLORS, INTRINSICS), np.indices((4, 6))[0])


def is_alive(pid):
    """Whether a process runs; one that has ended may remain as a zombie until somebody asks for its status."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def encode_and_be_killed(folder, pipe):
    def die(images):
        pipe.send(multiprocessing.active_children()[0].pid)
        os.kill(os.getpid(), signal.SIGKILL)

    images = [np.full((300, 400, 3), i, np.uint8) for i in range(12)]  # more than a pipe holds
    FeatureCache(folder, "tower", die, batch_size=4, workers=1).build(images)


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
    assert process.exitcode == -signal.SIGKILL and not survived
