# SPDX-License-Identifier: MIT
"""Results that are computed once and kept on disk, found by the content of what they were computed from.

`Store` keeps bytes. `FeatureCache` keeps the fp16 features that a frozen image encoder gives for an image, and
`SuperpointCache` the oversegmentation of a frame. All may share one folder: each owner (a string that names what
computed the entries) has a subfolder of its own.

An entry is <folder>/<hash of owner>/<xx>/<key>. It begins with a magic number, the owner, its key and a checksum of all
of it, so an entry that is truncated, altered or foreign is never used. Entries are written under a unique temporary
name and moved into place, so any number of processes may write at once, and a killed process leaves no broken entry.

fp16 keeps a value x to 2^-11 |x| (below 2^-14 to 2^-25), and a token or pooled feature to 2^-11 of its norm. Projected
and normalised, a cell of ViT-B-16 with random weights changes by 2.4e-4 of its norm. The encoder itself should run in
fp32 when it fills a cache: fp16 autocast costs 1.3e-3 of a token's norm and bf16 1.0e-2, and it runs only once.

Imports torch, numpy, tqdm.
"""
import contextlib
import ctypes
import errno
import hashlib
import math
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

MAGIC = b"BFSTORE1"
HEADER = struct.Struct("<8s16s16s")  # magic, hash of owner, key; a crc32 of header and content follows
PAUSES = (1, 2, 4)  # seconds until a full disk is tried again


def content_key(*parts):
    """128-bit hash of arrays, bytes and strings; the shape and type of an array count."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part))
        else:
            part = part.encode() if isinstance(part, str) else part
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


class Store:
    """Entries of bytes in a folder, found by a key of 16 bytes.

    folder: where they are kept; None: a temporary folder, deleted with this object (but not with its copies).
    owner: names all that the entries depend on besides what the keys are hashes of, such as program and settings.
    """

    def __init__(self, folder, owner):
        self._temporary = tempfile.TemporaryDirectory(prefix="store-") if folder is None else None
        self._owner_hash = content_key(owner)
        self.folder = Path(folder or self._temporary.name) / self._owner_hash.hex()
        self._unfinished = self.folder / "tmp"
        self._unfinished.mkdir(parents=True, exist_ok=True)
        for path in self._unfinished.iterdir():
            with contextlib.suppress(OSError):  # another process sweeps, too, or the folder is read-only
                if path.stat().st_mtime < time.time() - 24 * 3600:
                    path.unlink()
        if not (self.folder / "owner.txt").exists():  # for people who look into the folder
            self._write(self.folder / "owner.txt", owner.encode())

    def __getstate__(self):  # a copy in a worker must not delete the folder
        return {**self.__dict__, "_temporary": None}

    @property
    def is_temporary(self):
        """Whether the folder is deleted with this object."""
        return self._temporary is not None

    def get(self, key):
        """The content (n,) of an entry as a writable uint8 array, or None; a damaged entry is deleted."""
        path = self.path(key)
        try:
            entry = np.fromfile(path, np.uint8)
        except FileNotFoundError:
            return None
        header = HEADER.pack(MAGIC, self._owner_hash, key)
        start = HEADER.size + 4
        content = entry[start:]
        checksum = zlib.crc32(content, zlib.crc32(header)).to_bytes(4, "little")
        if len(entry) < start or entry[:start].tobytes() != header + checksum:
            path.unlink(missing_ok=True)
            return None
        return content

    def put(self, key, content):
        """Writes an entry, replacing an older one."""
        header = HEADER.pack(MAGIC, self._owner_hash, key)
        checksum = zlib.crc32(content, zlib.crc32(header)).to_bytes(4, "little")
        self._write(self.path(key), header + checksum + content)

    def size(self, key):
        """Bytes of an entry's content, or None if there is no entry; the content is not checked."""
        try:
            return os.stat(self.path(key)).st_size - HEADER.size - 4
        except FileNotFoundError:
            return None

    def path(self, key):
        """Where an entry lies."""
        return self.folder / key.hex()[:2] / key.hex()

    def _write(self, path, content):
        """Moves a whole file into place, or leaves nothing; a full disk is tried again after each of PAUSES."""
        temporary = self._unfinished / uuid.uuid4().hex
        for pause in (*PAUSES, None):
            try:
                temporary.write_bytes(content)
                path.parent.mkdir(exist_ok=True)
                os.replace(temporary, path)
                return
            except BaseException as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                if not isinstance(error, OSError):
                    raise
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not is_full or pause is None:
                    left = f", {shutil.disk_usage(self.folder).free / 2**30:.3f} GiB free" if is_full else ""
                    raise OSError(error.errno, f"{error.strerror}{left}", str(path)) from error
            time.sleep(pause)


# ---------------------------------------------------------------------------------------------------------- features


def image_key(image):
    """128-bit content hash of an image (H, W, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    return content_key(image)


def to_tensor(image):
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)) / 255


def pack_features(tensors):
    """Any number of float16 tensors of any shapes -> bytes: their number, then ndim and shape of each, then the values.
    """
    numbers = [len(tensors)]
    for tensor in tensors:
        numbers += [tensor.dim(), *tensor.shape]
    values = [tensor.numpy().astype("<f2").tobytes() for tensor in tensors]
    return np.array(numbers, "<u4").tobytes() + b"".join(values)


def unpack_features(content):
    """The bytes of `pack_features`, as a writable uint8 array -> tuple of float16 tensors that share its memory."""
    numbers = content[:len(content) // 4 * 4].view("<u4")
    shapes = []
    at = 1
    for _ in range(numbers[0]):
        shapes.append(tuple(numbers[at + 1:at + 1 + numbers[at]].tolist()))
        at += 1 + int(numbers[at])
    values = torch.from_numpy(content[4 * at:].view("<f2"))
    parts = values.split([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes))


class FeatureCache:
    """Features of a frozen image encoder: `build` encodes what is missing, `get` reads; workers may call `get`.

    folder: see `Store`. owner: names all that the features depend on besides the image: model, a fingerprint of the
    weights, precision, and which features.
    encode: images (B, 3, H, W) float32 in [0, 1] -> tuple of tensors (B, ...) on any device, such as tokens
        (B, D, Hf, Wf), pooled (B, E), and dense features (B, E, Hf, Wf) if a loss needs them.
    batch_size, workers: for `build`.
    """

    def __init__(self, folder, owner, encode, batch_size=32, workers=0):
        self.store = Store(folder, f"image feature tensors: {owner}")
        self.encode = encode
        self.batch_size = batch_size
        self.workers = workers

    def __getstate__(self):  # a worker reads: it needs no encoder
        return {**self.__dict__, "encode": None}

    def get(self, image):
        """Image (H, W, 3) uint8 -> what `encode` gave for it, a tuple of float16 tensors without their batch dimension.

        Raises ValueError if the image has no whole entry.
        """
        key = image_key(image)
        content = self.store.get(key)
        if content is None:
            raise ValueError(f"an image has no usable features in {self.store.path(key)}; run build again")
        return unpack_features(content)

    def build(self, images, rank=0, world_size=1):
        """Checks the entries of all images and encodes those that are missing or damaged. Returns how many.

        images: sequence of (H, W, 3) uint8 of one size, such as `PointDataset.images_only`. Each of world_size
        processes takes its share; let all of them finish before the first `get`. If images.signature(indices) gives
        bytes that change whenever these images may have changed, the keys of the share are remembered under it, and the
        next call reads no image: it only looks whether the entries exist at their full size.
        """
        if world_size > 1 and self.store.is_temporary:
            raise ValueError(f"{world_size} processes cannot share a temporary folder: name one")
        share = range(rank, len(images), world_size)
        if not share:
            return 0
        signature = images.signature(share) if hasattr(images, "signature") else None
        memory = None if signature is None else content_key("keys", signature)
        known = None if memory is None else self.store.get(memory)

        if known is None:
            loader = DataLoader(Subset(CheckedImages(self.store, images), share), batch_size=None,
                                num_workers=self.workers, generator=torch.Generator())
            keys, whole = zip(*tqdm(loader, "checking features", unit="img", disable=rank > 0))
        else:
            size = int.from_bytes(known[:8], "little")
            keys = [key.tobytes() for key in known[8:].reshape(-1, 16)]
            whole = [self.store.size(key) == size for key in keys]
        todo = {}  # key: index of the first image that has it
        for index, key, is_whole in zip(share, keys, whole):
            if not is_whole:
                todo.setdefault(key, index)
        if todo:
            self._encode(Subset(images, list(todo.values())), rank)
        if known is None and memory is not None:
            self.store.put(memory, self.store.size(keys[0]).to_bytes(8, "little") + b"".join(keys))
        return len(todo)

    def _encode(self, images, rank):
        """Encodes images and writes their entries."""
        loader = DataLoader(images, self.batch_size, num_workers=self.workers, collate_fn=list,
                            worker_init_fn=end_with_parent, generator=torch.Generator())
        with tqdm(total=len(images), desc="encoding images", unit="img", disable=rank > 0) as bar:
            for batch in loader:
                entries = self._features(batch)
                if bar.n == 0:
                    self._announce(len(images), len(entries[0]), rank)
                for image, entry in zip(batch, entries):
                    self.store.put(image_key(image), entry)
                bar.update(len(batch))

    def _announce(self, count, entry_size, rank):
        """Says how much disk the features need; ValueError if there is less."""
        folder = self.store.folder
        size = count * entry_size
        free = shutil.disk_usage(folder).free
        if size > free:
            raise ValueError(f"features of {count} images need {size / 2**30:.2f} GiB, {folder} has "
                             f"{free / 2**30:.2f} GiB left")
        if rank == 0:
            tqdm.write(f"encoding {count} images: {size / 2**30:.2f} GiB in {folder}, {free / 2**30:.1f} GiB free")

    @torch.no_grad()
    def _features(self, batch):
        """Images -> the contents of their entries."""
        features = self.encode(torch.stack([to_tensor(image) for image in batch]))
        if not isinstance(features, tuple) or not features or any(len(tensor) != len(batch) for tensor in features):
            shapes = [tuple(tensor.shape) for tensor in features]
            raise ValueError(f"encode must return a tuple of tensors (B, ...) for B = {len(batch)}, got a "
                             f"{type(features).__name__} of shapes {shapes}")
        features = [tensor.half().cpu() for tensor in features]
        if not all(tensor.isfinite().all() for tensor in features):
            raise ValueError("encode returned features that are not finite in fp16")
        return [pack_features(of_image) for of_image in zip(*features)]


def end_with_parent(worker_id):
    """worker_init_fn of a DataLoader: on Linux a worker is killed when its process ends, however that ends.

    Images fill the pipe, and a worker would otherwise wait forever for somebody to read it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class CheckedImages(Dataset):
    """(key, whether its entry is whole) of each image."""

    def __init__(self, store, images):
        self.store = store
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        key = image_key(self.images[index])
        return key, self.store.get(key) is not None


# ------------------------------------------------------------------------------------------------------- superpoints


class SuperpointCache:
    """An oversegmentation, computed once per frame: the first process that needs it leaves it for all others.

    folder: see `Store`. oversegment: (depth (H, W), colors (H, W, 3), intrinsics (3, 3)) -> (H, W) integers.
    owner: names the method, its version and its settings.
    """

    def __init__(self, folder, oversegment, owner):
        self.store = Store(folder, f"superpoints: {owner}")
        self.oversegment = oversegment
        self.owner = owner

    def __call__(self, depth, colors, intrinsics):
        """The result of `oversegment` as (H, W) int64; computed again if its entry is not whole."""
        key = content_key(depth, colors, np.asarray(intrinsics, np.float64))
        content = self.store.get(key)
        if content is not None:
            return np.frombuffer(zlib.decompress(content), "<i4").reshape(depth.shape).astype(np.int64)
        segments = self.oversegment(depth, colors, intrinsics)
        self.store.put(key, zlib.compress(segments.astype("<i4").tobytes(), 1))
        return segments
