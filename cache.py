# SPDX-License-Identifier: MIT
"""Features of a frozen image tower, computed once: one checked fp16 file per picture, found by the picture's content.

A frozen tower maps the same picture to the same tokens for ever, so every epoch after the first pass can read them.
An entry lies at <folder>/<hash of key>/<xx>/<hash of picture>.feat and holds the header below, the pooled feature (E,)
and the tokens (D, Hf, Wf), both fp16. Entries are written under a temporary name and moved into place, so any number of
processes may write at once and a killed build goes on where it stopped. The checksum covers header and payload, the
header names key and picture: an entry that is truncated, altered or of another tower is never used. Pictures, not
paths, are hashed: a file that changes is encoded again.

A value x comes back within 2^-11 |x|, below 2^-14 within 2^-25, and a token or pooled feature within 2^-11 of its norm.
Projected and normalised, a cell of ViT-B-16 with random weights differs by 2.4e-4 of its norm. The tower itself should
run in fp32 where it fills a cache: under fp16 autocast a token is off by 1.3e-3 of its norm, under bf16 by 1.0e-2, five
and forty times what storing it costs, and it runs only once.

Imports torch, numpy, tqdm.
"""
import hashlib
import os
import shutil
import struct
import tempfile
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

HEADER = struct.Struct("<8s16s16s4I")  # magic, hash of key, hash of picture, D, Hf, Wf, E; a crc32 follows
MAGIC = b"BFFEAT1\n"


def picture_hash(picture):
    """128-bit content hash of a (H, W, 3) uint8 picture."""
    if picture.dtype != np.uint8 or picture.ndim != 3:
        raise ValueError(f"expected a picture (H, W, 3) of uint8, got {picture.shape} of {picture.dtype}")
    shape = np.array(picture.shape, "<i8").tobytes()
    return hashlib.blake2b(shape + np.ascontiguousarray(picture).tobytes(), digest_size=16).digest()


def to_tensor(picture):
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)) / 255


class FeatureCache:
    """`build` encodes what is missing, `get` reads it back; `get` is safe in data-loading workers.

    folder: where the entries live, or None for a temporary folder that goes with this object.
    key: names all that the features depend on besides the picture: model, fingerprint of the weights, precision.
    encode: images (B, 3, H, W) float32 in [0, 1] -> tokens (B, D, Hf, Wf), pooled (B, E), on any device.
    batch_size, workers: of the build.
    """

    def __init__(self, folder, key, encode, batch_size=32, workers=0):
        self.encode, self.batch_size, self.workers = encode, batch_size, workers
        self._temporary = tempfile.TemporaryDirectory(prefix="clip-cache-") if folder is None else None
        self._key_hash = hashlib.blake2b(key.encode(), digest_size=16).digest()
        self.folder = Path(folder or self._temporary.name) / self._key_hash.hex()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.txt").exists():
            self._write(self.folder / "key.txt", key.encode())

    def __getstate__(self):  # a worker reads: it needs neither the tower nor the right to delete the folder
        return {**self.__dict__, "encode": None, "_temporary": None}

    def get(self, picture):
        """Picture (H, W, 3) uint8 -> tokens (D, Hf, Wf), pooled (E,) float16; ValueError where there is none."""
        name = picture_hash(picture)
        try:
            tokens, pooled = self._read(name)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"no usable features of a picture; run build again: {error}") from None
        return torch.from_numpy(tokens.copy()), torch.from_numpy(pooled.copy())

    def build(self, pictures, rank=0, world_size=1):
        """Checks the entries of all pictures and encodes those that are missing or damaged. Returns how many.

        pictures: sequence of (H, W, 3) uint8 of one size, such as `PointDataset.pictures`. Each of world_size processes
        takes its share of them; let all have finished before the first `get`.
        """
        if world_size > 1 and self._temporary is not None:
            raise ValueError(f"{world_size} processes cannot share a temporary folder: name one")
        share, todo, damaged = range(rank, len(pictures), world_size), {}, 0
        loader = DataLoader(Subset(Checked(self, pictures), share), batch_size=None, num_workers=self.workers)
        for index, (name, state) in zip(share, tqdm(loader, "checking features", unit="img", disable=rank > 0)):
            damaged += state == "damaged"
            if state != "whole":
                todo.setdefault(name, index)
        if not todo:
            return 0
        loader = DataLoader(Subset(pictures, list(todo.values())), self.batch_size, num_workers=self.workers,
                            collate_fn=list)
        bar = None
        for batch in loader:
            entries = self._encode(batch)
            if bar is None:
                size, free = len(entries[0]) * len(todo), shutil.disk_usage(self.folder).free
                if size > free:
                    raise ValueError(f"features of {len(todo)} pictures need {size / 2**30:.2f} GiB, "
                                     f"{self.folder} has {free / 2**30:.2f} GiB left")
                if rank == 0:
                    print(f"encoding {len(todo)} of {len(share)} pictures ({damaged} entries were damaged): "
                          f"{size / 2**30:.2f} GiB in {self.folder}, {free / 2**30:.1f} GiB free", flush=True)
                bar = tqdm(total=len(todo), desc="encoding pictures", unit="img", disable=rank > 0)
            for picture, entry in zip(batch, entries):
                self._write(self._path(picture_hash(picture)), entry)
            bar.update(len(batch))
        bar.close()
        return len(todo)

    @torch.no_grad()
    def _encode(self, batch):
        """Pictures -> the bytes of their entries."""
        tokens, pooled = self.encode(torch.stack([to_tensor(picture) for picture in batch]))
        if tokens.dim() != 4 or pooled.dim() != 2 or not len(tokens) == len(pooled) == len(batch):
            raise ValueError(f"encode must return tokens (B, D, Hf, Wf) and pooled (B, E) for B = {len(batch)}, got "
                             f"{tuple(tokens.shape)} and {tuple(pooled.shape)}")
        tokens, pooled = tokens.half().cpu(), pooled.half().cpu()
        if not (tokens.isfinite().all() and pooled.isfinite().all()):
            raise ValueError("encode returned features that are not finite in fp16")
        entries = []
        for picture, own_tokens, own_pooled in zip(batch, tokens.numpy(), pooled.numpy()):
            header = HEADER.pack(MAGIC, self._key_hash, picture_hash(picture), *own_tokens.shape, len(own_pooled))
            payload = own_pooled.tobytes() + own_tokens.tobytes()
            entries.append(header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload)
        return entries

    def _path(self, name):
        return self.folder / name.hex()[:2] / f"{name.hex()}.feat"

    def _write(self, path, content):
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def _read(self, name):
        """Hash of a picture -> tokens, pooled as views of the memory-mapped entry; raises where it is not whole."""
        path = self._path(name)
        if os.path.getsize(path) < HEADER.size + 4:
            raise ValueError(f"{path} is truncated")
        entry = np.memmap(path, mode="r")
        header, payload = entry[:HEADER.size], entry[HEADER.size + 4:]
        magic, key, owner, depth, height, width, embed = HEADER.unpack(header)
        if (magic, key, owner) != (MAGIC, self._key_hash, name):
            raise ValueError(f"{path} belongs to another tower, picture or program")
        if len(payload) != 2 * (embed + depth * height * width):
            raise ValueError(f"{path} is truncated")
        if zlib.crc32(payload, zlib.crc32(header)) != int.from_bytes(entry[HEADER.size:HEADER.size + 4], "little"):
            raise ValueError(f"{path} is damaged")
        values = payload.view("<f2")
        return values[embed:].reshape(depth, height, width), values[:embed]


class Checked(Dataset):
    """(hash, "whole" | "missing" | "damaged") of each picture's entry."""

    def __init__(self, cache, pictures):
        self.cache, self.pictures = cache, pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        name = picture_hash(self.pictures[index])
        try:
            self.cache._read(name)
        except FileNotFoundError:
            return name, "missing"
        except ValueError:
            return name, "damaged"
        return name, "whole"
