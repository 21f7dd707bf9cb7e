# SPDX-License-Identifier: MIT
"""Results that are computed once and kept on disk, found by the content that they were computed from.

`Store` keeps bytes. `FeatureCache` keeps the fp16 features that a frozen image encoder gives for an
image, and `SuperpointCache` the oversegmentation of a frame. All may share one folder: each owner (a
string that names what computed the entries) has a subfolder of its own.

An entry is <folder>/<hash of owner>/<xx>/<key>. It begins with a magic number, the owner, its key and a
checksum of all of it, so an entry that is truncated, altered or foreign is never used. Entries are
moved into place as whole files, so any number of processes may write at once, and a kill leaves no
broken entry.

fp16 keeps a value x to 2^-11 |x| (below 2^-14 to 2^-25), and a token or pooled feature to 2^-11 of its
norm. Projected and normalized, a cell of ViT-B-16 with random weights changes by 2.4e-4 of its norm.
The encoder itself should run in fp32 when it fills a cache: it runs only once, and fp16 autocast costs
1.3e-3 of a token's norm, bf16 1.0e-2.

Imports torch, numpy, tqdm and support.files.
"""
import contextlib
import hashlib
import math
import os
import shutil
import struct
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info
from tqdm import tqdm

from support.files import write_whole

MAGIC = b"BFSTORE1"
HEADER = struct.Struct("<8s16s16s")  # magic, hash of owner, key; a crc32 of header and content follows
DAY = 24 * 3600  # seconds


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

    folder: where they are kept; None: a temporary folder, deleted with this object, not with its
    copies. A folder that cannot be written is read, and new entries go to a temporary one.
    owner: names what the entries depend on besides what the keys are hashes of: program, settings.

    Attributes: folder, of new entries; is_temporary, whether it is deleted with this object.
    """

    def __init__(self, folder, owner):
        self._owner_hash = content_key(owner)
        name = self._owner_hash.hex()
        self._folders = [] if folder is None else [Path(folder) / name]
        self._temporary = None
        if folder is None or not is_writable(Path(folder), name):
            self._temporary = tempfile.TemporaryDirectory(prefix="store-")
            self._folders.append(Path(self._temporary.name))
        self.folder = self._folders[-1]
        self.is_temporary = self._temporary is not None
        self._unfinished = self.folder / "tmp"
        self._unfinished.mkdir(exist_ok=True)
        for path in self._unfinished.iterdir():
            with contextlib.suppress(OSError):  # another process sweeps, too
                if path.stat().st_mtime < time.time() - DAY:
                    path.unlink()
        if not (self.folder / "owner.txt").exists():  # for people who look into the folder
            self._write(self.folder / "owner.txt", owner.encode())

    def __getstate__(self):  # a copy in a worker must not delete the folder
        return {**self.__dict__, "_temporary": None}

    def get(self, key):
        """The content (n,) of an entry as a writable uint8 array, or None; what is damaged is deleted."""
        for path in self._paths(key):
            with contextlib.suppress(FileNotFoundError):
                entry = np.fromfile(path, np.uint8)
                content = entry[HEADER.size + 4:]
                if entry[:HEADER.size + 4].tobytes() == self._head(key, content):
                    return content
                with contextlib.suppress(OSError):  # in a folder that is only read it stays
                    path.unlink()
        return None

    def put(self, key, content):
        """Writes an entry, replacing an older one. OSError if the disk is full."""
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        self._write(path, self._head(key, content) + content)

    def keep(self, key, content):
        """`put` of what can be computed again: that a disk takes nothing is only warned of."""
        try:
            self.put(key, content)
        except OSError as error:
            warnings.warn(f"{self.folder} takes no new entries: {error.strerror}")

    def size(self, key):
        """Bytes of an entry's content, or None if there is no entry; the content is not checked."""
        for path in self._paths(key):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_size - HEADER.size - 4
        return None

    def path(self, key):
        """Where a new entry is written."""
        return self._paths(key)[-1]

    def _paths(self, key):
        return [folder / key.hex()[:2] / key.hex() for folder in self._folders]

    def _head(self, key, content):
        header = HEADER.pack(MAGIC, self._owner_hash, key)
        return header + zlib.crc32(content, zlib.crc32(header)).to_bytes(4, "little")

    def _write(self, path, content):
        write_whole(path, lambda file: file.write(content), self._unfinished, sync=False)


def is_writable(cache, name):
    """Whether the folder `name` of a cache, which is made if need be, can be written; if not, warns."""
    try:
        (cache / name / "tmp").mkdir(parents=True, exist_ok=True)
        if os.access(cache / name / "tmp", os.W_OK):
            return True
        reason = "no permission, or a disk that is only read"
    except OSError as error:
        reason = error.strerror
    warnings.warn(f"cache {cache} cannot be written ({reason}): its entries are used, and those that it lacks "
                  "are kept in a temporary folder, for this run alone")
    return False


# -------------------------------------------------------------------------------------------- features


def image_key(image):
    """128-bit content hash of an image (H, W, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    return content_key(image)


def to_tensor(image):
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)) / 255


def pack_features(tensors):
    """Float16 tensors of any shapes -> bytes: their number, ndim and shape of each, then the values."""
    numbers = [len(tensors)]
    for tensor in tensors:
        numbers += [tensor.dim(), *tensor.shape]
    values = [tensor.numpy().astype("<f2").tobytes() for tensor in tensors]
    return np.array(numbers, "<u4").tobytes() + b"".join(values)


def unpack_features(content):
    """What `pack_features` made, a writable uint8 array -> float16 tensors that share its memory."""
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
    """Features of a frozen image encoder: `build` encodes what is missing, `get` reads, also in workers.

    folder: see `Store`. owner: names all that the features depend on besides the image: model, a
    fingerprint of the weights, precision, and which features.
    encode: images (B, 3, H, W) float32 in [0, 1] -> tuple of tensors (B, ...) on any device, such as
    tokens (B, D, Hf, Wf), pooled (B, E), and dense features (B, E, Hf, Wf) if a loss needs them.
    batch_size, loader_options: of the DataLoaders of `build`.
    """

    def __init__(self, folder, owner, encode, batch_size=32, **loader_options):
        self.store = Store(folder, f"image feature tensors: {owner}")
        self.encode = encode
        self.batch_size = batch_size
        self.loader_options = {"generator": torch.Generator(), **loader_options}

    def __getstate__(self):  # a worker reads: it needs no encoder
        return {**self.__dict__, "encode": None, "loader_options": {}}

    def get(self, image):
        """Image (H, W, 3) uint8 -> what `encode` gave for it, float16 tensors without batch dimension.

        An image without a whole entry is encoded now. ValueError in a loader's worker, which cannot.
        """
        key = image_key(image)
        content = self.store.get(key)
        if content is None:
            if self.encode is None or get_worker_info() is not None:
                raise ValueError(f"no usable features of an image in {self.store.path(key)}; run build again")
            entry, = self._features([image])
            self.store.keep(key, entry)
            content = np.frombuffer(bytearray(entry), np.uint8)
        return unpack_features(content)

    def build(self, images, rank=0, world_size=1):
        """Checks the entries of all images, encodes what is missing or damaged, and returns how many.

        images: sequence of (H, W, 3) uint8 of one size, such as `PointDataset.images_only`. Each of
        world_size processes takes its share; let all of them finish before the first `get`. If
        images.signature(indices) gives bytes that change whenever these images may have changed, the
        keys of the share are remembered under it, and the next call reads no image: it only looks
        whether the entries exist at their full size.
        """
        share = range(rank, len(images), world_size)
        if not share:
            return 0
        signature = images.signature(share) if hasattr(images, "signature") else None
        memory = None if signature is None else content_key("keys", signature)
        known = None if memory is None else self.store.get(memory)

        if known is None:
            checked = Subset(CheckedImages(self.store, images), share)
            loader = DataLoader(checked, batch_size=None, **self.loader_options)
            keys, whole = zip(*tqdm(loader, "checking features", unit="img", disable=rank > 0 or None))
        else:
            size = int.from_bytes(known[:8], "little")
            keys = [key.tobytes() for key in known[8:].reshape(-1, 16)]
            whole = [self.store.size(key) == size for key in keys]
        todo = {}  # key: index of the first image that has it
        for index, key, is_whole in zip(share, keys, whole):
            if not is_whole:
                todo.setdefault(key, index)
        if todo and world_size > 1 and self.store.is_temporary:
            raise ValueError(f"{len(todo)} images have no features yet, and {world_size} processes cannot "
                             "share a temporary folder: name one that can be written")
        if todo:
            self._encode(Subset(images, list(todo.values())), rank)
        if known is None and memory is not None:
            size = self.store.size(keys[0])
            self.store.put(memory, size.to_bytes(8, "little") + b"".join(keys))
        return len(todo)

    def _encode(self, images, rank):
        """Encodes images and writes their entries."""
        loader = DataLoader(images, self.batch_size, collate_fn=list, **self.loader_options)
        bar = tqdm(total=len(images), desc="encoding images", unit="img", disable=rank > 0 or None)
        for number, batch in enumerate(loader):
            entries = self._features(batch)
            needed, free = len(images) * len(entries[0]), shutil.disk_usage(self.store.folder).free
            if number == 0 and needed > free:
                raise ValueError(f"features of {len(images)} images need {needed / 2**30:.2f} GiB, {self.store.folder} "
                                 f"has {free / 2**30:.2f} GiB left")
            for image, entry in zip(batch, entries):
                self.store.put(image_key(image), entry)
            bar.update(len(batch))
        bar.close()

    @torch.no_grad()
    def _features(self, batch):
        """Images -> the contents of their entries."""
        features = self.encode(torch.stack([to_tensor(image) for image in batch]))
        sizes = {len(tensor) for tensor in features}
        if not isinstance(features, tuple) or sizes != {len(batch)}:
            shapes = [tuple(tensor.shape) for tensor in features]
            raise ValueError(f"encode must return a tuple of tensors (B, ...) for B = {len(batch)}, got a "
                             f"{type(features).__name__} of shapes {shapes}")
        features = [tensor.half().cpu() for tensor in features]
        if not all(tensor.isfinite().all() for tensor in features):
            raise ValueError("encode returned features that are not finite in fp16")
        return [pack_features(of_image) for of_image in zip(*features)]


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


# ----------------------------------------------------------------------------------------- superpoints


class SuperpointCache:
    """An oversegmentation, computed once per frame, by the first process that needs it.

    oversegment: (depth (H, W), colors (H, W, 3), intrinsics (3, 3)) -> (H, W) integers.
    folder: see `Store`. owner: names the method, its version and its settings.
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
        self.store.keep(key, zlib.compress(segments.astype("<i4").tobytes(), 1))
        return segments
