# SPDX-License-Identifier: MIT
"""Projects points into images and mixes the 2D features found there into the 3D features of the points.

    p_cam = world2cam p,    (u, v) = (K p_cam)_xy / z
    f_2d = bilinear(feature map, u, v), averaged over the views that see p
    alpha = sigmoid(gate([f_3d, f_2d])), or 0 if no view sees p,    f = f_3d + alpha (f_2d - f_3d)

Camera axes are OpenCV's (x right, y down, z forward), in meters. Integer pixel coordinates are pixel
centers, so an image W wide covers [-0.5, W - 0.5], and pixel u lies at (u + 0.5) * Wf / W - 0.5 of a
feature map Wf wide. B scenes, V views per scene, I = B * V images, N points of all scenes (packed;
`batch` (N,) holds the scene of each), C channels, H W image, Hf Wf feature map.

An image tower is an nn.Module such as `encoder.Enhanced2DEncoder`. It has

    image_size               (H, W) of its images
    encode(images)           (I, 3, H, W), RGB in [0, 1] -> tokens (I, D, Hf, Wf), pooled (I, E)
    project(tokens, pooled)  what `encode` gave, maybe in fp16 -> spatial (I, C, Hf, Wf), global (I, C)
    fingerprint()            a string that differs if `encode` gives other features

and, for (1) targets per point, (2) text queries, (3) torch.compile, (4) a learning rate of its own,

    encode_with_dense(images)    -> tokens, pooled, dense (I, T, Ht, Wt)                        (1, 2)
    project_dense_target(dense)  -> (I, C, Ht, Wt)                                              (1)
    encode_prompts(n strings)    -> (n, T), in the space of dense                               (2)
    project_global(prompts)      -> (n, C), in the space of global                              (2)
    blocks                       a list of modules whose inputs always have the same shape      (3)
    trainable                    an nn.ModuleList                                               (4)

Functions raise ValueError for shapes that do not fit and for matrices whose last row is not 0 ... 0 1.
Imports torch.
"""
import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 65_536  # points projected at once: the allocator reuses buffers of this size, not larger ones


# -------------------------------------------------------------------------------- camera geometry


def apply_transform(points, matrix):
    """points (N, 3) or (B, N, 3), matrix (4, 4) or (B, 4, 4) -> transformed points, of the same shape.

    Elementwise: autocast and TF32 would round a matrix product, and bf16 resolves 1 cm at 3 m.
    """
    points_shape = "B N 3" if points.dim() == 3 else "N 3"
    matrix_shape = "B 4 4" if points.dim() == matrix.dim() == 3 else "4 4"
    check_shapes(points=(points, points_shape), matrix=(matrix, matrix_shape))
    check_last_row("matrix", matrix)
    matrix = matrix[..., None, :3, :]
    rotated = (matrix[..., :3] * points[..., None, :]).sum(-1)
    return rotated + matrix[..., 3]


def project_to_image(points_cam, intrinsics):
    """points_cam (..., N, 3), intrinsics (..., 3, 3) -> uv (..., N, 2) in pixels, depth (..., N) in m.

    If depth <= 0 the point is not in front of the camera and uv is meaningless: see `visible_mask`.
    """
    check_shapes(points_cam=(points_cam, "... N 3"), intrinsics=(intrinsics, "...K 3 3"))
    check_last_row("intrinsics", intrinsics)
    with torch.autocast(points_cam.device.type, enabled=False):
        intrinsics = intrinsics[..., None, :2, :]
        depth = points_cam[..., 2]
        divisor = depth.where(depth != 0, 1)[..., None, None]
        ray = points_cam[..., None, :2] / divisor
        uv = (ray * intrinsics[..., :2]).sum(-1) + intrinsics[..., 2]
        return uv, depth


def columns_at_points(matrix, batch):
    """matrix (B, V, R, C), batch (N,) -> the C columns of each point's matrices, (N, V, R) each."""
    gathered = matrix.flatten(1).index_select(0, batch)
    return gathered.unflatten(1, matrix.shape[1:]).unbind(-1)


def transform_packed(points, world2cam, batch):
    """points (N, 3) of several scenes, world2cam (B, V, 4, 4), batch (N,) -> points_cam (N, V, 3)."""
    a, b, c, shift = columns_at_points(world2cam[:, :, :3], batch)
    x, y, z = points[:, None].split(1, -1)
    return (a * x).add_(b * y).add_(c * z).add_(shift)


def project_packed(points_cam, intrinsics, batch):
    """points_cam (N, V, 3), intrinsics (B, V, 3, 3), batch (N,) -> uv (N, V, 2), depth (N, V)."""
    with torch.autocast(points_cam.device.type, enabled=False):
        a, b, center = columns_at_points(intrinsics[:, :, :2], batch)
        depth = points_cam[..., 2:]
        ray = points_cam[..., :2] / depth.where(depth != 0, 1)
        x, y = ray.split(1, -1)
        uv = (a * x).add_(b * y).add_(center)
        return uv, depth.squeeze(-1)


def visible_mask(uv, depth, image_size):
    """uv (..., 2), depth (...), image_size (H, W) -> whether the image shows the point, bool (...)."""
    check_shapes(uv=(uv, "... 2"), depth=(depth, "..."))
    h, w = image_size
    u, v = uv.unbind(-1)
    in_front = (depth > 0) & (depth < torch.inf)  # at infinity uv may be finite: the principal point
    in_width = (u >= -0.5) & (u <= w - 0.5)
    in_height = (v >= -0.5) & (v <= h - 0.5)
    return in_front & in_width & in_height


def occluded_mask(uv, depth, depth_map, view, tolerance=0.05):
    """Whether the depth map holds a surface more than `tolerance` meters in front of the point.

    uv (..., 2) in pixels of the map, depth (...), depth_map (I, Hd, Wd) in meters with 0 = unknown, view
    (...) int64, the map of each point -> bool (...). Reads the nearest pixel; False outside the map.
    """
    check_shapes(
        depth_map=(depth_map, "I Hd Wd"),
        depth=(depth, "..."),
        view=(view, "..."))
    h, w = depth_map.shape[1:]
    inside = visible_mask(uv, depth, (h, w))
    uv = uv.where(inside[..., None], 0)
    u, v = uv.round().long().unbind(-1)
    u = u.clamp(0, w - 1)  # W - 0.5 may round to W
    v = v.clamp(0, h - 1)
    surface = depth_map[view, v, u]
    return inside & (surface > 0) & (depth > surface + tolerance)


# -------------------------------------------------------------------------------- sampling


def linear_corners(x, size, cells):
    """Pixel coordinate x (N, V) on an axis -> the two cells around it (N, V, 2) int32, their weights."""
    x = (x + 0.5) * (cells / size) - 0.5
    inner = (x > 0) & (x < cells - 1)  # beyond the outermost centers the border cell is read twice
    x = x.clamp(0, cells - 1)
    low = x.floor()
    high = low + inner
    fraction = x - low
    index = torch.stack([low, high], -1)
    weight = torch.stack([1 - fraction, fraction], -1)
    return index.int(), weight


def view_cells(uv, image_size, map_shape, view, visible):
    """The cells of I feature maps that each point reads, and their weights, averaged over its views.

    uv (N, V, 2) in pixels of image_size (H, W), map_shape (I, C, Hf, Wf), view (N, V) int64 in [0, I),
    visible (N, V) bool -> index (N, 4 V) int32 of a cell, weight (N, 4 V). A view that does not see the
    point gets the index one past the last cell.
    """
    i, _, hf, wf = map_shape
    h, w = image_size
    uv = uv.where(visible[..., None], 0)
    column, weight_x = linear_corners(uv[..., 0], w, wf)  # (N, V, 2)
    row, weight_y = linear_corners(uv[..., 1], h, hf)
    cell = row[..., None] * wf + column[..., None, :]  # (N, V, 2, 2)
    weight = weight_y[..., None] * weight_x[..., None, :]
    first = view.int() * (hf * wf)  # cell of each map
    index = cell + first[..., None, None]
    index = index.where(visible[..., None, None], i * hf * wf)
    number_seen = visible.sum(1, keepdim=True)
    view_weight = visible / number_seen.clamp(min=1)  # (N, V)
    weight = weight * view_weight[..., None, None]
    return index.flatten(1), weight.flatten(1)


def sample_cells(feature_map, index, weight):
    """feature_map (I, C, Hf, Wf), index and weight (N, K) of `view_cells` -> sum of weighted cells (N, C).

    In float32 or the wider dtype of the map, without a tensor (N, K, C). A cell that no index names has no
    influence, whatever it holds, and gets no gradient.
    """
    with torch.autocast(feature_map.device.type, enabled=False):
        rows = feature_map.permute(0, 2, 3, 1).flatten(0, 2)  # (I * Hf * Wf, C)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        padded = F.pad(rows, (0, 0, 0, 1))  # a weight of 0 would not do: 0 * NaN is NaN
        weight = weight.to(rows.dtype)
        return F.embedding_bag(index, padded, mode="sum", padding_idx=len(rows),
                               per_sample_weights=weight)


def sample_features(feature_map, uv, image_size, batch):
    """Bilinear features at pixel positions, with one image per scene and first derivatives.

    feature_map (B, C, Hf, Wf), uv (N, 2) in pixels of image_size (H, W), batch (N,) int64 -> (N, C). Equals
    grid_sample(align_corners=False, padding_mode="border") at 2 (u + 0.5) / W - 1; 0 if uv is NaN.
    """
    check_shapes(feature_map=(feature_map, "B C Hf Wf"), uv=(uv, "N 2"), batch=(batch, "N"))
    check_ids("batch", batch, len(feature_map))
    uv = uv[:, None]  # (N, 1, 2)
    view = batch[:, None]
    visible = ~uv.isnan().any(-1)
    index, weight = view_cells(uv, image_size, feature_map.shape, view, visible)
    return sample_cells(feature_map, index, weight)


# -------------------------------------------------------------------------------- fusion


class FusionGate(nn.Module):
    """Learned mix of the 3D and the 2D feature of a point; one gate per point, closed if no view sees it."""

    def __init__(self, dim=256, hidden=64):
        super().__init__()
        self.dim = dim
        self.gate = nn.Sequential(
            nn.Linear(2 * dim, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, 1))

    def forward(self, feat_3d, feat_2d, valid):
        """feat_3d (N, C), feat_2d (N, C), valid (N,) bool -> fused (N, C), alpha (N, 1) in [0, 1].

        If a point is not valid, fused equals feat_3d, alpha is 0 and no gradient reaches feat_2d, which
        must be finite there (the samplers above give 0).
        """
        check_shapes(feat_3d=(feat_3d, "N C"), feat_2d=(feat_2d, "N C"), valid=(valid, "N"))
        # The first layer of self.gate on [feat_3d, feat_2d], without the copy of a concatenation
        weight_3d, weight_2d = self.gate[0].weight.split(self.dim, 1)
        hidden = F.linear(feat_3d, weight_3d, self.gate[0].bias)
        hidden += F.linear(feat_2d, weight_2d)
        alpha = self.gate[1:](hidden).sigmoid()
        alpha = alpha.where(valid[:, None], 0).to(feat_3d.dtype)
        return torch.lerp(feat_3d, feat_2d.to(feat_3d.dtype), alpha), alpha


class BiFusionEncoder(nn.Module):
    """Points with posed images -> a fused feature per point, and CLIP features that a loss may tie it to.

    encoder_2d: an image tower, as described above with C = embed_dim, or None for the 3D baseline.
    encoder_3d: any module `batch dict -> (N, dim_3d)`.
    gate: any module like `FusionGate(embed_dim)`, the default; alpha (N, 1) or (N, embed_dim). If no view
        sees a point, feat_2d is 0 there, and feat_3d and 0 replace what the gate gives.
    depth_tolerance: meters by which a point may lie behind the depth map and still count as seen.
    """

    def __init__(self, encoder_2d, encoder_3d, gate=None, dim_3d=96, embed_dim=256, depth_tolerance=0.05):
        super().__init__()
        self.encoder_2d = encoder_2d
        self.encoder_3d = encoder_3d
        self.proj_3d = nn.Sequential(nn.Linear(dim_3d, embed_dim), nn.LayerNorm(embed_dim))
        if encoder_2d is not None:
            self.norm_2d = nn.LayerNorm(embed_dim)
            self.gate = FusionGate(embed_dim) if gate is None else gate
        self.depth_tolerance = depth_tolerance

    def encode_images(self, batch, with_dense=False):
        """Images or cached features -> spatial (I, C, Hf, Wf), global (I, C), dense or None, image_size."""
        encoder = self.encoder_2d
        if "images" in batch:
            images = batch["images"].flatten(0, 1)  # (I, 3, H, W)
            image_size = images.shape[-2:]
            encode = encoder.encode_with_dense if with_dense else encoder.encode
            tokens, pooled, *dense = encode(images)
        else:
            image_size = encoder.image_size
            names = ["clip_tokens", "clip_pooled"] + ["clip_dense_map"] * with_dense
            tokens, pooled, *dense = [batch[name].flatten(0, 1) for name in names]
        spatial, clip_global = encoder.project(tokens, pooled)
        target = encoder.project_dense_target(*dense) if with_dense else None
        return spatial, clip_global, target, image_size

    def project(self, batch, image_size):
        """The batch's points in its views -> uv (N, V, 2), visible (N, V) bool, view (N, V) in [0, I)."""
        owner = batch["batch"]
        v = batch["world2cam"].shape[1]
        view = owner[:, None] * v + torch.arange(v, device=owner.device)
        points_cam = transform_packed(batch["points"], batch["world2cam"], owner)
        uv, depth = project_packed(points_cam, batch["intrinsics"], owner)
        visible = visible_mask(uv, depth, image_size)
        if "depth" in batch:
            if "depth_world2cam" in batch:  # a depth camera with a pose of its own
                points_cam = transform_packed(batch["points"], batch["depth_world2cam"], owner)
            depth_uv, depth = project_packed(points_cam, batch["depth_intrinsics"], owner)
            depth_map = batch["depth"].flatten(0, 1)  # (I, Hd, Wd)
            visible &= ~occluded_mask(depth_uv, depth, depth_map, view, self.depth_tolerance)
        return uv, visible, view

    def sample(self, batch, image_size, maps):
        """Maps (I, C, Hf, Wf) at the batch's points -> valid (N,), one (N, C) per map."""
        parts = []
        chunks = zip(batch["points"].split(CHUNK), batch["batch"].split(CHUNK))
        for points, owner in chunks:
            chunk = {**batch, "points": points, "batch": owner}
            uv, visible, view = self.project(chunk, image_size)
            part = [visible.any(1)]
            for feature_map in maps:
                part += view_cells(uv, image_size, feature_map.shape, view, visible)
            parts.append(part)
        valid, *cells = (torch.cat(part) for part in zip(*parts))
        index, weight = cells[::2], cells[1::2]
        return valid, list(map(sample_cells, maps, index, weight))

    def forward(self, batch, with_dense=False):
        """A batch as `check_batch` describes it -> dict of

            feat_fusion, feat_3d (N, C)   with and without the images
            clip_global (B, C)            CLIP's global feature, averaged over the views
            clip_point (N, C)             the learned 2D feature at each point, 0 if no view sees it
            clip_dense (N, C)             with_dense: CLIP's own feature at each point, fixed; else None
            valid (N,) bool, alpha        whether a view sees the point, and its gate

        Without a 2D encoder the clip entries are None, and valid and alpha are 0.
        """
        check_batch(batch, self.encoder_2d is not None, with_dense)
        feat_3d = self.proj_3d(self.encoder_3d(batch))  # (N, C)
        fused = feat_3d
        clip_global = feat_2d = clip_dense = None
        valid = torch.zeros_like(batch["batch"], dtype=torch.bool)
        alpha = feat_3d.new_zeros(len(feat_3d), 1)
        if self.encoder_2d is not None:
            spatial, clip_global, dense, image_size = self.encode_images(batch, with_dense)
            clip_global = clip_global.unflatten(0, batch["world2cam"].shape[:2])  # (B, V, C)
            clip_global = clip_global.mean(1)
            spatial = spatial.permute(0, 2, 3, 1)
            spatial = self.norm_2d(spatial).permute(0, 3, 1, 2)  # per cell, before sampling
            maps = [spatial, dense] if with_dense else [spatial]
            valid, (feat_2d, *target) = self.sample(batch, image_size, maps)
            clip_dense = target[0] if with_dense else None
            fused, alpha = self.gate(feat_3d, feat_2d, valid)
            fused = fused.where(valid[:, None], feat_3d)  # whatever the gate does
            alpha = alpha.where(valid[:, None], 0)
        return {"feat_fusion": fused, "feat_3d": feat_3d, "clip_global": clip_global,
                "clip_point": feat_2d, "clip_dense": clip_dense, "valid": valid, "alpha": alpha}


# -------------------------------------------------------------------------------- checks


def check_shapes(**fields):
    """name=(tensor, "N V 3"): raises ValueError if sizes do not fit; what begins with "..." are several."""
    sizes = {}
    for name, (tensor, pattern) in fields.items():
        shape = tuple(tensor.shape)
        letters = pattern.split()
        if letters[0].startswith("..."):
            lead = len(shape) - len(letters) + 1
            shape = (shape[:lead], *shape[lead:])
        fits = len(shape) == len(letters)
        for letter, size in zip(letters, shape):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            fits = fits and size == expected
        if not fits:
            expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(f"{name} {tuple(tensor.shape)} must be ({expected})")


def check_values(fits, message):
    """Raises ValueError if a bool scalar is false; on CUDA a device assertion, so that nothing waits."""
    if torch.compiler.is_compiling():
        return  # a traced value cannot be read
    if fits.is_cuda:
        torch._assert_async(fits, message)  # torch has no public name for it
    elif fits.is_cpu and not fits:
        raise ValueError(message)


def check_ids(name, ids, size):
    """Raises ValueError if ids are not in [0, size)."""
    inside = (ids >= 0) & (ids < size)
    check_values(inside.all(), f"{name} {tuple(ids.shape)} must lie in [0, {size})")


def check_last_row(name, matrix):
    """Raises ValueError if the last row of matrix (..., n, n) is not 0 ... 0 1: it may be transposed."""
    n = matrix.shape[-1]
    difference = matrix - torch.eye(n, device=matrix.device)
    fits = difference[..., -1, :].abs() <= 1e-6
    check_values(fits.all(), f"{name} {tuple(matrix.shape)} must have the last row {'0 ' * (n - 1)}1")


def check_batch(batch, with_images, with_dense=False):
    """Raises a ValueError that names the field of a batch that is missing, misshapen or impossible.

    points: in the world of the cameras; coords: what the 3D encoder sees, maybe augmented; batch: the scene
    of each point; images: RGB in [0, 1], or clip_*, the raw features cached for them; depth: optional, in
    meters, 0 = unknown, of a pinhole camera with depth_world2cam or the pose of the image.
    """
    shapes = {"points": "N 3", "coords": "N 3", "features": "N F", "batch": "N"}
    if with_images:
        shapes |= {"world2cam": "B V 4 4", "intrinsics": "B V 3 3"}
        if "images" in batch or "clip_tokens" not in batch:
            shapes["images"] = "B V 3 H W"
        else:
            shapes |= {"clip_tokens": "B V D Hf Wf", "clip_pooled": "B V E"}
            if with_dense:
                shapes["clip_dense_map"] = "B V T Ht Wt"
        if "depth" in batch:
            shapes |= {"depth": "B V Hd Wd", "depth_intrinsics": "B V 3 3"}
            if "depth_world2cam" in batch:
                shapes["depth_world2cam"] = "B V 4 4"
    fields = {}
    for name, shape in shapes.items():
        if name not in batch:
            raise ValueError(f"batch: field {name!r} ({', '.join(shape.split())}) is missing")
        fields[f"batch: field {name!r}"] = (batch[name], shape)
    check_shapes(**fields)
    if with_images:
        check_ids("batch: field 'batch'", batch["batch"], len(batch["world2cam"]))
        for name in ("world2cam", "depth_world2cam", "intrinsics", "depth_intrinsics"):
            if name in batch:
                check_last_row(f"batch: field {name!r}", batch[name])
