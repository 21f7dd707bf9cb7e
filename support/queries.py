# SPDX-License-Identifier: MIT
"""Questions in words: how likely each point is what a query names.

    queries = TextQueries(tower, "chair, red sofa | couch, something to sit on")

Templates and neutral names: as in the evaluation of OpenScene (Peng et al., CVPR 2023) and of CLIP.

Imports torch and support.files.
"""
import re

import torch
from torch.nn import functional as F

from support.files import check_torch_file

TEMPLATES = ("a {} in a scene", "a photo of a {}.", "a photo of the {}.", "a photo of a {} in a room.",
             "a photo of the large {}.", "a photo of the small {}.", "there is a {} in the scene.")
NEUTRAL = ("object", "things", "stuff", "texture")  # compete with queries: one alone means something
SOURCES = ("clip", "fused", "3d", "mean")
TEXT_SCALE = 40.0


def parse_queries(text):
    """"chair, red sofa | couch" -> [["chair"], ["red sofa", "couch"]]: queries, each with its names."""
    queries = [[name.strip() for name in query.split("|")] for query in text.split(",")]
    for names in queries:
        if "" in names:
            raise ValueError(f'--text {text!r}: an empty name; write queries as "chair, red sofa | couch"')
    fields = field_names(queries)
    for field in fields:
        if fields.count(field) > 1 or field in ("label", "instance", "confidence", "gate"):
            raise ValueError(f"--text {text!r}: the field scalar_{field} of a PLY file would be written twice")
    return queries


def field_names(queries):
    """Names of the PLY fields of queries: their first names, or query_1 and so on beyond ASCII."""
    names = [re.sub(r"\W+", "_", names[0]).strip("_") for names in queries]
    return [name if name.isascii() and name else f"query_{number}" for number, name in enumerate(names, 1)]


def embed_names(encoder_2d, names):
    """The mean of each name's normalized embeddings in TEMPLATES (T, E)."""
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    embedding = encoder_2d.encode_prompts(prompts).float()
    embedding = F.normalize(embedding, dim=1)
    return embedding.unflatten(0, (len(names), -1)).mean(1)


def read_embeddings(path, names, width):
    """The vectors (T, width) of T names in a torch file {name: vector}; ValueError if it lacks one."""
    check_torch_file(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path}: not a dict of tensors: {type(error).__name__}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: must hold a dict {{name: vector}}, found a {type(stored).__name__}")
    vectors = []
    for name in names:
        vector = stored.get(name)
        shape = tuple(vector.shape) if isinstance(vector, torch.Tensor) else "none"
        if shape != (width,) or not vector.isfinite().all():
            raise ValueError(f"{path}: {name!r} needs a finite vector ({width},), found {shape}; the file names "
                             f"{', '.join(map(str, stored))}")
        vectors.append(vector.float())
    return torch.stack(vectors)


class TextQueries:
    """Queries in words, compared with features of points.

    encoder_2d: an Enhanced2DEncoder. queries: text for `parse_queries`, or its result. source: one of
    SOURCES. "clip": CLIP's dense features; "fused" and "3d": the network's, with and without the
    images, which only a trained consistency loss ties to text; "mean": the mean of "clip" and "fused".
    attention: of the dense features, see `encoder.last_block`; None: the tower's default. embeddings:
    a file for `read_embeddings`, of another text encoder; None: those of `embed_names`. A point's
    logits are TEXT_SCALE times its cosines with all names, NEUTRAL ones included; a query gets the
    largest probability among its names.
    """

    def __init__(self, encoder_2d, queries, source="clip", attention=None, embeddings=None):
        if encoder_2d is None:
            raise ValueError("text queries need a CLIP tower, and this network was trained with --no-clip")
        self.names = parse_queries(queries) if isinstance(queries, str) else queries
        self.source = source
        self.needs_dense = source in ("clip", "mean")
        self.options = {} if attention is None else {"attention": attention}
        names = [*sum(self.names, []), *NEUTRAL]  # T
        if embeddings is None:
            self.origin = f"templates: {', '.join(TEMPLATES)}"
            vectors = embed_names(encoder_2d, names)
        else:
            self.origin = f"embeddings: {embeddings}"
            device = next(encoder_2d.parameters()).device
            blank = torch.zeros(1, 3, *encoder_2d.image_size, device=device)
            width = self.encode(encoder_2d, blank)[-1].shape[1]
            vectors = read_embeddings(embeddings, names, width).to(device)
        self.embedding = F.normalize(vectors, dim=1)  # (T, E)
        if source != "clip":
            projected = encoder_2d.project_global(self.embedding)
            self.embedding = F.normalize(projected, dim=1)  # (T, C)

    def encode(self, encoder_2d, images):
        """Images (V, 3, H, W) -> the tower's tokens, pooled and, if these queries need them, dense
        ones.
        """
        if not self.needs_dense:
            return encoder_2d.encode(images)
        return encoder_2d.encode_with_dense(images, **self.options)

    def cosines(self, fusion, batch, feats, dense=None):
        """Cosines (N, T) of the points of a sample with all names; with "clip" 0 if no view sees a point.

        feats (N, C): the network's, fused or 3D. dense (V, E, Hf, Wf): CLIP's, of the sample's views.
        """
        tower = fusion.encoder_2d
        if self.source == "clip":  # interpolated cosines need T channels per point instead of E
            maps = torch.einsum("vehw,te->vthw", dense, self.embedding)
            _, (cosines,) = fusion.sample(batch, tower.image_size, [maps])
            return cosines
        feats = F.normalize(feats.float(), dim=1)
        if self.source == "mean":
            maps = tower.project_dense_target(dense)
            _, (seen,) = fusion.sample(batch, tower.image_size, [maps])  # 0 if no view sees a point
            feats = feats + F.normalize(seen, dim=1)
            feats = F.normalize(feats, dim=1)
        return feats @ self.embedding.T

    def probabilities(self, cosines):
        """Cosines (N, T) -> the probability of each query (N, Q); 0 for cosines of 0."""
        likely = (TEXT_SCALE * cosines).softmax(1)
        likely = likely * cosines.any(1, keepdim=True)
        sizes = [*map(len, self.names), len(NEUTRAL)]
        *columns, _ = likely.split(sizes, 1)
        return torch.stack([column.amax(1) for column in columns], 1)

    def described(self):
        """What a score of these queries depends on, as a dict."""
        return {"names": self.names, "neutral": NEUTRAL, "from": self.origin}
