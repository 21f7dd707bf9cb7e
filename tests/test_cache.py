# SPDX-License-Identifier: MIT
"""cache.py: features come back as they were encoded, once; what is damaged, foreign or half-written is never used."""
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cache import FeatureCache, picture_hash, to_tensor

PICTURES = list(np.random.default_rng(0).integers(0, 256, (10, 8, 12, 3), np.uint8))


class Tower:
    """A stand-in for an image tower that counts the pictures it has seen."""

    def __init__(self, factor=1.0):
        self.seen, self.factor = 0, factor

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 8, 12)
        assert 0 <= images.min() <= images.max() <= 1
        self.seen += len(images)
        tokens = torch.nn.functional.avg_pool2d(images, 4) * self.factor  # (B, 3, 2, 3)
        return tokens.requires_grad_(), images.flatten(1)[:, :5] * self.factor


def build(folder, pictures=PICTURES, key="tower, 8x12", tower=None, **options):
    tower = tower or Tower()
    cache = FeatureCache(folder, key, tower, batch_size=3, **options)
    cache.build(pictures)
    return cache, tower


def entries(cache):
    return sorted(cache.folder.glob("*/*.feat"))


def test_features_come_back_to_half_precision(tmp_path):
    cache, _ = build(tmp_path)
    tokens, pooled = Tower()(torch.stack([to_tensor(p) for p in PICTURES]))
    for i, picture in enumerate(PICTURES):
        own_tokens, own_pooled = cache.get(picture)
        assert own_tokens.dtype == own_pooled.dtype == torch.float16 and not own_tokens.requires_grad
        assert torch.equal(own_tokens, tokens[i].half()) and torch.equal(own_pooled, pooled[i].half())
        assert ((own_tokens.float() - tokens[i]).abs() <= tokens[i].abs() * 2 ** -11).all()


def test_the_error_of_a_cached_feature_is_the_one_stated(tmp_path):
    """2^-11 of a value or 2^-25 absolute, 2^-11 of the norm of a token, and hardly more after projection and norm."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(10, 768, 2, 3, generator=generator) * 10 ** torch.empty(10, 768, 1, 1).uniform_(
        -6, 1, generator=generator)
    cache = FeatureCache(tmp_path, "tower", lambda images: (tokens, tokens[:, :512, 0, 0]), batch_size=10)
    cache.build(PICTURES)
    stored = torch.stack([cache.get(picture)[0] for picture in PICTURES]).float()
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
    cache.get(PICTURES[3])
    assert second.seen == 0


def test_equal_pictures_are_encoded_once_and_changed_ones_again(tmp_path):
    _, tower = build(tmp_path, PICTURES[:2] * 3)
    assert tower.seen == 2
    changed = PICTURES[0].copy()
    changed[0, 0, 0] ^= 1
    _, tower = build(tmp_path, [changed, *PICTURES[:3]])
    assert tower.seen == 2  # the changed one and the third


def test_another_key_has_its_own_entries(tmp_path):
    build(tmp_path)
    cache, tower = build(tmp_path, key="another tower", tower=Tower(2.0))
    assert tower.seen == 10
    assert torch.equal(cache.get(PICTURES[0])[1], Tower(2.0)(to_tensor(PICTURES[0])[None])[1][0].half())
    assert (cache.folder / "key.txt").read_text() == "another tower"


def test_the_shape_of_a_picture_is_part_of_its_hash():
    assert picture_hash(PICTURES[0]) != picture_hash(PICTURES[0].reshape(12, 8, 3))
    assert picture_hash(PICTURES[0]) == picture_hash(np.asfortranarray(PICTURES[0]))
    with pytest.raises(ValueError, match="uint8"):
        picture_hash(PICTURES[0].astype(np.float32))


def test_every_flipped_byte_and_every_truncation_is_noticed_and_rebuilt(tmp_path):
    cache, _ = build(tmp_path, PICTURES[:1])
    path, = entries(cache)
    whole = path.read_bytes()
    broken = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:] for i in range(len(whole))]
    broken += [whole[:size] for size in range(0, len(whole), 7)] + [whole + b"\0\0", b"\0" * len(whole)]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="run build again.*feat"):
            cache.get(PICTURES[0])
    _, tower = build(tmp_path, PICTURES[:1])
    assert tower.seen == 1 and path.read_bytes() == whole


def test_an_entry_of_another_picture_or_tower_is_not_used(tmp_path):
    cache, _ = build(tmp_path, PICTURES[:2])
    first, second = (cache._path(picture_hash(p)) for p in PICTURES[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="belongs to another"):
        cache.get(PICTURES[0])
    other, _ = build(tmp_path, PICTURES[:2], key="another tower")
    second.write_bytes(other._path(picture_hash(PICTURES[1])).read_bytes())
    with pytest.raises(ValueError, match="belongs to another"):
        cache.get(PICTURES[1])
    assert build(tmp_path, PICTURES[:2])[1].seen == 2


def test_a_picture_that_was_never_encoded_is_an_error(tmp_path):
    cache, _ = build(tmp_path, PICTURES[:2])
    with pytest.raises(ValueError, match="run build again"):
        cache.get(PICTURES[5])


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    program = textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        from test_cache import PICTURES, Tower, FeatureCache
        class Mortal(Tower):
            def __call__(self, images):
                if self.seen == 6:
                    os._exit(9)
                return super().__call__(images)
        FeatureCache({str(tmp_path)!r}, "tower, 8x12", Mortal(), batch_size=3).build(PICTURES)
    """)
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 9
    cache, tower = build(tmp_path)
    assert tower.seen == 4 and len(entries(cache)) == 10


def test_processes_share_the_work_and_may_overlap(tmp_path):
    towers = [Tower(), Tower(), Tower()]
    for rank in range(2):
        FeatureCache(tmp_path, "tower, 8x12", towers[rank], batch_size=3).build(PICTURES, rank, 2)
    assert [tower.seen for tower in towers[:2]] == [5, 5]
    assert build(tmp_path)[1].seen == 0


def test_concurrent_builds_of_the_same_pictures_leave_whole_entries(tmp_path):
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        from test_cache import PICTURES, build
        build({str(tmp_path)!r}, PICTURES * 4)
    """)
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    cache, tower = build(tmp_path)
    assert tower.seen == 0 and len(entries(cache)) == 10 and not list(cache.folder.glob("*/*.tmp"))


class Reader(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, index):
        return self.cache.get(PICTURES[index])[0]


def test_workers_build_and_read(tmp_path):
    cache, tower = build(tmp_path, workers=2)
    assert tower.seen == 10
    alone, together = (torch.cat(list(DataLoader(Reader(cache), 5, num_workers=n))) for n in (0, 2))
    assert torch.equal(alone, together)


def test_a_temporary_folder_outlives_workers_and_copies_but_not_its_owner():
    cache, _ = build(None)
    list(DataLoader(Reader(cache), 5, num_workers=2))
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(PICTURES[0])[0], cache.get(PICTURES[0])[0]) and copy.encode is None
    del copy
    folder = cache.folder
    assert folder.exists()
    with pytest.raises(ValueError, match="cannot share a temporary folder"):
        cache.build(PICTURES, 0, 2)
    del cache
    assert not folder.exists()


@pytest.mark.parametrize("encode, message", [
    (lambda x: (x, x), "tokens .B, D, Hf, Wf. and pooled .B, E."),
    (lambda x: (x[:1], x.flatten(1)), "for B = 3"),
    (lambda x: (x * 1e6, x.flatten(1)), "not finite in fp16"),
    (lambda x: (x, x.flatten(1) * float("nan")), "not finite in fp16")])
def test_features_that_cannot_be_kept_are_refused(tmp_path, encode, message):
    cache = FeatureCache(tmp_path, "bad", encode, batch_size=3)
    with pytest.raises(ValueError, match=message):
        cache.build(PICTURES)
    assert not entries(cache)


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="10 pictures need .* GiB"):
        build(tmp_path)


def test_size_is_announced(tmp_path, capsys):
    build(tmp_path, PICTURES[:4])
    assert "encoding 4 of 4 pictures (0 entries were damaged): 0.00 GiB in" in capsys.readouterr().out
