# SPDX-License-Identifier: MIT
"""Projects points into images and mixes the 2D features found there into the 3D features of the points.

    p_cam = world2cam p,    (u, v) = (K p_cam)_xy / z,    f_2d = bilinear(feature map, u, v), averaged over the views
    alpha = sigmoid(gate([f_3d, f_2d])),    f = f_3d + alpha (f_2d - f_3d)          alpha = 0 if no view sees p

Camera axes are OpenCV's (x right, y down, z forward), in metres. Integer pixel coordinates are pixel centres, so an
image W wide covers [-0.5, W - 0.5], and pixel u lies at (u + 0.5) * Wf / W - 0.5 of a feature map Wf wide.

B scenes, V views per scene, N points of the whole batch (packed; `batch` (N,) holds the scene of each), I = B * V
images, C channels, H W image, Hf Wf feature map.

Imports torch.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 65_536  # points projected at once: the allocator reuses buffers of this size, but not those of a million


# ---------------------------------------------------------------------------------------------- checks


def check_shapes(**fields):
    """name=(tensor, "N V 3"): raises ValueError if a shape does not fit; a letter is one size, "..." any dimensions."""
    sizes = {}
    for tensor, pattern in fields.values():
        letters = pattern.replace("...", "").split()
        shape = tensor.shape[-len(letters):] if "..." in pattern else tensor.shape
        expected = [int(x) if x.isdigit() else sizes.setdefault(x, size) for x, size in zip(letters, shape)]
        if len(shape) != len(letters) or list(shape) != expected:
            got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, (tensor, _) in fields.items())
            patterns = ", ".join(f"({pattern.replace(' ', ', ')})" for _, pattern in fields.values())
            raise ValueError(f"{got} must be {patterns}")


def check_values(fits: Tensor, message):
    """Raises ValueError if `fits`, a bool scalar, is false. On CUDA a device assertion, which waits for nothing.

    Not checked while torch.compile or torch.export traces: a traced value cannot be read.
    """
    if torch.compiler.is_compiling():
        return
    if fits.is_cuda:
        torch._assert_async(fits, message)
    elif fits.device.type == "cpu" and not fits:
        raise ValueError(message)


def check_ids(name, ids: Tensor, size):
    """Raises ValueError if ids are not integers in [0, size)."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}")
    check_values(((ids >= 0) & (ids < size)).all(), f"{name} {tuple(ids.shape)} must lie in [0, {size})")


def check_mask(name, mask: Tensor):
    """Raises ValueError if a mask is not bool."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, got {mask.dtype}")


def last_row_fits(matrix: Tensor) -> Tensor:
    """matrix (..., n, n) -> bool (...): its last row is 0 ... 0 1; false for a transposed camera matrix."""
    last = matrix[..., -1, :]
    return (last[..., :-1].abs() <= 1e-6).all(-1) & ((last[..., -1] - 1).abs() <= 1e-6)


# ---------------------------------------------------------------------------------------------- camera geometry


def apply_transform(points: Tensor, matrix: Tensor) -> Tensor:
    """points (N, 3) or (B, N, 3), matrix (4, 4) or (B, 4, 4) -> transformed points, of the shape of `points`.

    Raises ValueError for other shapes, and if the last row of a matrix is not 0 0 0 1. Elementwise, because autocast
    and TF32 would round a matrix product: bf16 resolves 1 cm at 3 m.
    """
    if points.dim() not in (2, 3) or points.shape[-1] != 3 or matrix.shape[-2:] != (4, 4) or not (
            matrix.dim() == 2 or matrix.dim() == points.dim() == 3 and len(matrix) == len(points)):
        raise ValueError(f"points {tuple(points.shape)} and matrix {tuple(matrix.shape)} must be (N, 3) and (4, 4), "
                         "or (B, N, 3) and (4, 4) or (B, 4, 4)")
    check_values(last_row_fits(matrix).all(), f"matrix {tuple(matrix.shape)} must have the last row 0 0 0 1")
    return (matrix[..., None, :3, :3] * points[..., None, :]).sum(-1) + matrix[..., None, :3, 3]


def fold_projection(projection: Tensor, world2cam: Tensor):
    """KITTI's projection P (..., 3, 4) with world2cam (..., 4, 4) -> intrinsics (..., 3, 3), world2cam (..., 4, 4).

    P = K [I | t], so P world2cam = K (world2cam moved by t = inv(K) P[:, 3]). Use float64. Raises ValueError for other
    shapes, and if the third row of K is not 0 0 1 (P then also holds a rotation or a scale).
    """
    check_shapes(projection=(projection, "... 3 4"), world2cam=(world2cam, "... 4 4"))
    intrinsics = projection[..., :3]
    check_values(last_row_fits(intrinsics).all(), f"projection {tuple(projection.shape)} must have the third row 0 0 1 "
                                                  "t: decompose it into intrinsics, rotation and translation first")
    check_values(last_row_fits(world2cam).all(), f"world2cam {tuple(world2cam.shape)} must have the last row 0 0 0 1")
    shift = torch.linalg.solve(intrinsics, projection[..., 3:])  # (..., 3, 1)
    return intrinsics, torch.cat([world2cam[..., :3], world2cam[..., 3:] + F.pad(shift, (0, 0, 0, 1))], -1)


def project_to_image(points_cam: Tensor, intrinsics: Tensor):
    """points_cam (..., N, 3), intrinsics (..., 3, 3) -> uv (..., N, 2) in pixels, depth (..., N) in metres.

    If depth <= 0 the point is not in front of the camera and uv is meaningless (see `visible_mask`).
    Raises ValueError for other shapes, and if the last row of an intrinsics is not 0 0 1.
    """
    check_shapes(points_cam=(points_cam, "... N 3"), intrinsics=(intrinsics, "... 3 3"))
    check_values(last_row_fits(intrinsics).all(), f"intrinsics {tuple(intrinsics.shape)} must have the last row 0 0 1")
    with torch.autocast(points_cam.device.type, enabled=False):
        depth = points_cam[..., 2]
        ray = points_cam[..., None, :2] / depth.where(depth != 0, 1)[..., None, None]
        return (ray * intrinsics[..., None, :2, :2]).sum(-1) + intrinsics[..., None, :2, 2], depth


def transform_packed(points: Tensor, world2cam: Tensor, batch: Tensor) -> Tensor:
    """points (N, 3) of several scenes, world2cam (B, V, 4, 4), batch (N,) -> points_cam (N, V, 3)."""
    check_shapes(points=(points, "N 3"), world2cam=(world2cam, "B V 4 4"), batch=(batch, "N"))
    # Column by column, gathered for all views at once: a product with (N, V, 3, 3) takes several times as long.
    a, b, c, shift = (x.flatten(1).index_select(0, batch).unflatten(1, x.shape[1:])
                      for x in world2cam[:, :, :3].unbind(-1))
    x, y, z = points[:, None].split(1, -1)
    return (a * x).add_(b * y).add_(c * z).add_(shift)


def project_packed(points_cam: Tensor, intrinsics: Tensor, batch: Tensor):
    """points_cam (N, V, 3), intrinsics (B, V, 3, 3), batch (N,) -> uv (N, V, 2), depth (N, V)."""
    check_shapes(points_cam=(points_cam, "N V 3"), intrinsics=(intrinsics, "B V 3 3"), batch=(batch, "N"))
    with torch.autocast(points_cam.device.type, enabled=False):
        a, b, centre = (x.flatten(1).index_select(0, batch).unflatten(1, x.shape[1:])
                        for x in intrinsics[:, :, :2].unbind(-1))
        depth = points_cam[..., 2:]
        x, y = (points_cam[..., :2] / depth.where(depth != 0, 1)).split(1, -1)
        return (a * x).add_(b * y).add_(centre), depth.squeeze(-1)


def visible_mask(uv: Tensor, depth: Tensor, image_size) -> Tensor:
    """uv (..., 2), depth (...), image_size (H, W) -> bool (...): in front of the camera and inside the image.

    Non-finite points are not visible. A point at infinity has finite uv, the principal point, so depth is tested too.
    Raises ValueError for other shapes.
    """
    if uv.shape[-1:] != (2,) or uv.shape[:-1] != depth.shape:
        raise ValueError(f"uv {tuple(uv.shape)} and depth {tuple(depth.shape)} must be (..., 2) and (...)")
    h, w = image_size
    u, v = uv.unbind(-1)
    return (depth > 0) & (depth < torch.inf) & (u >= -0.5) & (u <= w - 0.5) & (v >= -0.5) & (v <= h - 0.5)


def occluded_mask(uv: Tensor, depth: Tensor, depth_map: Tensor, view: Tensor, tolerance=0.05) -> Tensor:
    """True if the depth map holds a surface more than `tolerance` metres in front of the point.

    uv (..., 2) in pixels of the depth map, depth (...), depth_map (I, Hd, Wd) in metres with 0 = unknown, view (...)
    int64, the map of each point. Reads the nearest pixel; points outside the map are not occluded. Raises ValueError
    for other shapes.
    """
    if view.shape != depth.shape or depth_map.dim() != 3:
        raise ValueError(f"depth {tuple(depth.shape)}, depth_map {tuple(depth_map.shape)}, view {tuple(view.shape)} "
                         "must be (...), (I, Hd, Wd), (...)")
    h, w = depth_map.shape[-2:]
    inside = visible_mask(uv, depth, (h, w))
    u, v = uv.where(inside[..., None], 0).round().long().unbind(-1)  # W - 0.5 may round to W: hence the clamp
    surface = depth_map[view, v.clamp(0, h - 1), u.clamp(0, w - 1)]
    return inside & (surface > 0) & (depth > surface + tolerance)


# ---------------------------------------------------------------------------------------------- sampling


def bilinear_corners(uv: Tensor, image_size, grid_size):
    """The four cells around each pixel position and their weights.

    uv (..., 2) finite, image_size (H, W), grid_size (Hf, Wf) -> cell index (..., 4) int32 in row-major order, weight
    (..., 4). Positions beyond the outermost cell centres take the border (`grid_sample`'s padding_mode="border").
    Raises ValueError for other shapes.
    """
    check_shapes(uv=(uv, "... 2"))
    low, high, fraction = [], [], []
    for axis, size, cells in ((0, image_size[1], grid_size[1]), (1, image_size[0], grid_size[0])):
        x = (uv[..., axis] + 0.5) * (cells / size) - 0.5
        inner = (x > 0) & (x < cells - 1)  # the others read the border cell alone, twice
        x = x.clamp(0, cells - 1)
        x0 = x.floor()
        low.append(x0.int())
        high.append(x0.int() + inner.int())
        fraction.append(x - x0)
    (x0, y0), (x1, y1), (fx, fy) = low, high, fraction
    index = torch.stack([y0, y0, y1, y1], -1) * grid_size[1] + torch.stack([x0, x1, x0, x1], -1)
    weight = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], -1)
    return index, weight


def weighted_rows(rows, index, weight):
    """rows (R, C), index (N, K) in [0, R], weight (N, K) -> sum over k of weight[:, k] * rows[index[:, k]], (N, C).

    Index R stands for no row, whatever its weight: 0 * NaN would be NaN. No (N, K, C) tensor is made.
    Raises ValueError for other shapes.
    """
    check_shapes(rows=(rows, "R C"), index=(index, "N K"), weight=(weight, "N K"))
    return F.embedding_bag(index, F.pad(rows, (0, 0, 0, 1)), mode="sum", per_sample_weights=weight,
                           padding_idx=rows.shape[0])


def view_cells(uv: Tensor, image_size, map_size, view: Tensor, visible: Tensor):
    """Which cells of I feature maps a point reads, and with what weight: the mean over the views that see it.

    uv (N, V, 2) pixels of images of image_size (H, W), map_size (I, Hf, Wf), view (N, V) int64 in [0, I), visible
    (N, V) bool -> index (N, 4 V) int32, weight (N, 4 V). A view that does not see the point gets the index one past
    the last cell. Raises ValueError for other shapes and for a mask that is not bool.
    """
    check_shapes(uv=(uv, "N V 2"), view=(view, "N V"), visible=(visible, "N V"))
    check_mask("visible", visible)
    i, hf, wf = map_size
    index, weight = bilinear_corners(uv.where(visible[..., None], 0), image_size, (hf, wf))  # (N, V, 4)
    view_weight = visible / visible.sum(1, keepdim=True).clamp(min=1)  # (N, V)
    weight = weight * view_weight[..., None]
    index = (index + view[..., None].int() * (hf * wf)).where(visible[..., None], i * hf * wf)
    return index.flatten(1), weight.flatten(1)


def sample_cells(feature_map: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """feature_map (I, C, Hf, Wf), index and weight of `view_cells` -> (N, C), in fp32 or the wider dtype of the map."""
    with torch.autocast(feature_map.device.type, enabled=False):
        rows = feature_map.permute(0, 2, 3, 1).flatten(0, 2)  # (I * Hf * Wf, C)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return weighted_rows(rows, index, weight.to(rows.dtype))


def sample_views(feature_map: Tensor, uv: Tensor, image_size, view: Tensor, visible: Tensor) -> Tensor:
    """Bilinear feature of each point, averaged over the views that see it; zero if none does.

    feature_map (I, C, Hf, Wf), uv (N, V, 2) pixels of images of image_size (H, W), view (N, V) int64 in [0, I), visible
    (N, V) bool -> (N, C), in fp32 or the wider dtype of the map.
    A cell that no visible point touches has no influence, whatever it holds, and gets no gradient.
    """
    check_shapes(feature_map=(feature_map, "I C Hf Wf"))
    i, _, hf, wf = feature_map.shape
    check_ids("view", view, i)
    return sample_cells(feature_map, *view_cells(uv, image_size, (i, hf, wf), view, visible))


def sample_features(feature_map: Tensor, uv: Tensor, image_size, batch: Tensor) -> Tensor:
    """Bilinear features at pixel positions: `sample_views` with one image per scene and every point visible.

    feature_map (B, C, Hf, Wf), uv (N, 2) in pixels of images of image_size (H, W), batch (N,) int64 -> (N, C).
    Equals grid_sample(align_corners=False, padding_mode="border") at 2 (u + 0.5) / W - 1; zero if uv is NaN.
    Has first derivatives. Raises ValueError for other shapes, and for batch outside [0, B).
    """
    check_shapes(feature_map=(feature_map, "B C Hf Wf"), uv=(uv, "N 2"), batch=(batch, "N"))
    b, _, hf, wf = feature_map.shape
    check_ids("batch", batch, b)
    visible = ~uv.isnan().any(1, keepdim=True)
    return sample_cells(feature_map, *view_cells(uv[:, None], image_size, (b, hf, wf), batch[:, None], visible))


# ---------------------------------------------------------------------------------------------- fusion


class FusionGate(nn.Module):
    """Learned mix of the 3D and the 2D feature of a point: one gate per point, closed if no view sees the point."""

    def __init__(self, dim=256, hidden=64):
        super().__init__()
        self.dim = dim
        self.gate = nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 1))

    def forward(self, feat_3d: Tensor, feat_2d: Tensor, valid: Tensor):
        """feat_3d (N, C), feat_2d (N, C), valid (N,) bool -> fused (N, C), alpha (N, 1) in [0, 1].

        If a point is not valid, fused equals feat_3d (if that is finite), alpha is 0, and feat_2d is not read and gets
        no gradient. Raises ValueError for other shapes and for a mask that is not bool.
        """
        check_shapes(feat_3d=(feat_3d, "N C"), feat_2d=(feat_2d, "N C"), valid=(valid, "N"))
        check_mask("valid", valid)
        feat_2d = feat_2d.where(valid[:, None], 0)
        # The first layer of self.gate on [feat_3d, feat_2d], without the copy that a concatenation makes
        weight_3d, weight_2d = self.gate[0].weight.split(self.dim, 1)
        hidden = F.linear(feat_3d, weight_3d, self.gate[0].bias) + F.linear(feat_2d, weight_2d)
        alpha = self.gate[1:](hidden).sigmoid().where(valid[:, None], 0).to(feat_3d.dtype)
        return torch.lerp(feat_3d, feat_2d.to(feat_3d.dtype), alpha), alpha


class BiFusionEncoder(nn.Module):
    """Points with posed images -> one fused feature per point, and the CLIP features that a loss may tie it to.

    encoder_2d: any module `images (B, 3, H, W) -> spatial (B, embed_dim, Hf, Wf), global (B, embed_dim)`. None gives
        the 3D baseline. For batches that hold cached raw features instead of images it also needs `image_size` (H, W)
        and `project(tokens, pooled) -> spatial, global`.
    encoder_3d: any module `batch dict -> (N, dim_3d)`.
    gate: any module like `FusionGate(embed_dim)`, the default; alpha (N, 1) or (N, embed_dim).
    camera_model: None for pinhole cameras. A function `points_cam (..., 3) -> uv (..., 2)`, in the pixels that
        `intrinsics` would give, for all views, or a sequence of V functions, None for pinhole ones. It must return NaN
        for directions that the lens does not see. A batch may bring its own as the field `camera_model`.
    depth_tolerance: metres by which a point may lie behind the depth map and still count as seen.
    dense_target: also give `clip_dense`, CLIP's own feature at every point through a fixed map, a target for a loss; the
        training loop switches it. encoder_2d then needs `encode_with_dense(images) -> tokens, pooled, dense`,
        `project(tokens, pooled)` and `project_dense_target(dense)`.
    """

    def __init__(self, encoder_2d, encoder_3d, gate=None, dim_3d=96, embed_dim=256, depth_tolerance=0.05,
                 dense_target=False, camera_model=None):
        super().__init__()
        self.encoder_2d = encoder_2d
        self.encoder_3d = encoder_3d
        self.proj_3d = nn.Sequential(nn.Linear(dim_3d, embed_dim), nn.LayerNorm(embed_dim))
        if encoder_2d is not None:
            self.norm_2d = nn.LayerNorm(embed_dim)
            self.gate = FusionGate(embed_dim) if gate is None else gate
        self.depth_tolerance = depth_tolerance
        self.dense_target = dense_target
        self.camera_model = camera_model

    def encode_images(self, batch):
        """Feature maps of the batch's B * V images, or of the raw features cached for them.

        Returns spatial (B * V, C, Hf, Wf), global (B * V, C), dense (B * V, C, Hf, Wf) or None, image_size (H, W).
        """
        encoder = self.encoder_2d
        tokens = None
        if "images" in batch:
            images = present_views(batch, "images")  # (B * V, 3, H, W)
            image_size = images.shape[-2:]
            if not self.dense_target:
                return *encoder(images), None, image_size
            tokens, pooled, dense = encoder.encode_with_dense(images)
        else:
            image_size = encoder.image_size
            tokens = present_views(batch, "clip_tokens")
            pooled = present_views(batch, "clip_pooled")
            dense = present_views(batch, "clip_dense_map") if self.dense_target else None
        if self.dense_target:
            dense = encoder.project_dense_target(dense)
        return *encoder.project(tokens, pooled), dense, image_size

    def project(self, batch, image_size):
        """The batch's points in its views -> uv (N, V, 2), visible (N, V) bool, view (N, V) index into B * V.

        uv are pixels of images of image_size (H, W), whatever size the cameras refer to (`image_sizes`).
        """
        owner = batch["batch"]
        v = batch["world2cam"].shape[1]
        view = owner[:, None] * v + torch.arange(v, device=owner.device)
        points_cam = transform_packed(batch["points"], batch["world2cam"], owner)
        uv, depth = project_packed(points_cam, batch["intrinsics"], owner)
        uv = distort(uv, points_cam, batch.get("camera_model", self.camera_model))
        if "image_sizes" in batch:
            h, w = batch["image_sizes"].to(uv.dtype).unbind(-1)
            scale = torch.stack([image_size[1] / w, image_size[0] / h], -1)  # (B, V, 2)
            uv = (uv + 0.5) * scale[owner] - 0.5
        visible = visible_mask(uv, depth, image_size)
        if "view_valid" in batch:
            visible &= batch["view_valid"][owner]
        if "depth" in batch:
            depth_uv, _ = project_packed(points_cam, batch["depth_intrinsics"], owner)
            visible &= ~occluded_mask(depth_uv, depth, batch["depth"].flatten(0, 1), view, self.depth_tolerance)
        return uv, visible, view

    def sample(self, batch, image_size, maps):
        """Feature maps (B * V, C, Hf, Wf) of one Hf, Wf at the batch's points -> valid (N,) bool, [(N, C)] per map."""
        points, owner = batch["points"], batch["batch"]
        corners = 4 * batch["world2cam"].shape[1]
        map_size = (len(maps[0]), *maps[0].shape[2:])
        valid = torch.empty_like(owner, dtype=torch.bool)
        index = points.new_empty(len(points), corners, dtype=torch.int32)
        weight = points.new_empty(len(points), corners)
        for start in range(0, len(points), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = {**batch, "points": points[part], "batch": owner[part]}
            uv, visible, view = self.project(chunk, image_size)
            valid[part] = visible.any(1)
            index[part], weight[part] = view_cells(uv, image_size, map_size, view, visible)
        return valid, [sample_cells(feature_map, index, weight) for feature_map in maps]

    def forward(self, batch):
        """A batch as `collate` makes it -> dict of

            feat_fusion (N, C), feat_3d (N, C)   with and without the images
            clip_global (B, C)                   CLIP's global feature, averaged over the views
            clip_point (N, C)                    the learned 2D feature at each point, 0 if no view sees it
            clip_dense (N, C)                    CLIP's own feature at each point, fixed; None without dense_target
            valid (N,) bool, alpha               whether a view sees the point, and its gate

        Without a 2D encoder the clip entries are None, and valid and alpha are 0.

        Fields: points, coords (N, 3), features (N, F), batch (N,), images (B, V, 3, H, W) or clip_tokens
        (B, V, D, Hf, Wf), clip_pooled (B, V, E) and, with dense_target, clip_dense_map (B, V, E, Hf, Wf), world2cam
        (B, V, 4, 4), intrinsics (B, V, 3, 3), optionally depth (B, V, Hd, Wd) and depth_intrinsics (B, V, 3, 3) of a
        pinhole depth camera with the same pose, view_valid (B, V) bool, false for a view that is not there, whatever its
        fields hold, image_sizes (B, V, 2), the (H, W) that each view's intrinsics refer to if it is not that of the
        images, and camera_model. Raises ValueError for others (`check_batch`).
        """
        check_batch(batch, self.encoder_2d is not None, self.dense_target)
        feat_3d = self.proj_3d(self.encoder_3d(batch))  # (N, C)
        if self.encoder_2d is None:
            n = len(feat_3d)
            return {"feat_fusion": feat_3d, "feat_3d": feat_3d, "clip_global": None, "clip_point": None,
                    "clip_dense": None, "valid": torch.zeros(n, dtype=torch.bool, device=feat_3d.device),
                    "alpha": feat_3d.new_zeros(n, 1)}

        spatial, clip_global, dense, image_size = self.encode_images(batch)
        spatial = self.norm_2d(spatial.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # LayerNorm per cell, before sampling
        maps = [spatial] if dense is None else [spatial, dense]
        valid, (feat_2d, *target) = self.sample(batch, image_size, maps)
        fused, alpha = self.gate(feat_3d, feat_2d, valid)
        if type(self.gate) is not FusionGate:  # FusionGate leaves unseen points alone; here every gate does
            fused = fused.where(valid[:, None], feat_3d)
            alpha = alpha.where(valid[:, None], 0)
        clip_global = clip_global.unflatten(0, batch["world2cam"].shape[:2])  # (B, V, C)
        if "view_valid" in batch:
            there = batch["view_valid"][..., None]
            clip_global = clip_global.where(there, 0).sum(1) / there.sum(1).clamp(min=1)
        else:
            clip_global = clip_global.mean(1)
        return {"feat_fusion": fused, "feat_3d": feat_3d, "clip_global": clip_global,
                "clip_point": feat_2d, "clip_dense": target[0] if target else None, "valid": valid, "alpha": alpha}


def present_views(batch, name):
    """A field (B, V, ...) as (B * V, ...), 0 for views that are not there: their NaN would reach weight gradients."""
    views = batch[name].flatten(0, 1)
    if "view_valid" not in batch:
        return views
    there = batch["view_valid"].flatten()
    return views.where(there.view(-1, *[1] * (views.dim() - 1)), 0)


def distort(uv: Tensor, points_cam: Tensor, camera_model) -> Tensor:
    """uv (N, V, 2) of pinhole cameras, points_cam (N, V, 3) -> uv with the views of other models in their places."""
    if camera_model is None:
        return uv
    with torch.autocast(uv.device.type, enabled=False):
        if callable(camera_model):
            uv = camera_model(points_cam)
        elif len(camera_model) != uv.shape[1]:
            raise ValueError(f"camera_model has {len(camera_model)} entries for {uv.shape[1]} views")
        else:
            models = zip(camera_model, points_cam.unbind(1), uv.unbind(1))
            uv = torch.stack([pinhole if model is None else model(points) for model, points, pinhole in models], 1)
    check_shapes(**{"uv of camera_model": (uv, "N V 2"), "points_cam": (points_cam, "N V 3")})
    return uv


def check_batch(batch, with_images, with_dense=False):
    """Raises a ValueError that names the first missing or misshapen field of a batch, or one with impossible values."""
    def expect(name, shape):
        if name not in batch:
            raise ValueError(f"batch: field {name!r} {shape} is missing")
        got = tuple(batch[name].shape)
        if len(got) != len(shape) or any(isinstance(s, int) and s != g for s, g in zip(shape, got)):
            raise ValueError(f"batch: field {name!r} must be {shape}, got {got}")
        return got

    n, _ = expect("points", ("N", 3))
    expect("coords", (n, 3))
    expect("features", (n, "F"))
    expect("batch", (n,))
    if not with_images:
        return
    b, v, _, _ = expect("world2cam", ("B", "V", 4, 4))
    expect("intrinsics", (b, v, 3, 3))
    if "images" in batch or "clip_tokens" not in batch:
        expect("images", (b, v, 3, "H", "W"))
    else:
        expect("clip_tokens", (b, v, "D", "Hf", "Wf"))
        expect("clip_pooled", (b, v, "E"))
        if with_dense:
            expect("clip_dense_map", (b, v, "E", "Hf", "Wf"))
    check_ids("batch: field 'batch'", batch["batch"], b)
    there = torch.ones((), dtype=torch.bool, device=batch["batch"].device)
    if "view_valid" in batch:
        expect("view_valid", (b, v))
        there = batch["view_valid"]
        check_mask("batch: field 'view_valid'", there)
    if "image_sizes" in batch:
        expect("image_sizes", (b, v, 2))
    if "depth" in batch:
        expect("depth", (b, v, "Hd", "Wd"))
        expect("depth_intrinsics", (b, v, 3, 3))
    for name, row in (("world2cam", "0 0 0 1"), ("intrinsics", "0 0 1"), ("depth_intrinsics", "0 0 1")):
        if name in batch:
            check_values((last_row_fits(batch[name]) | ~there).all(),
                         f"batch: field {name!r} {tuple(batch[name].shape)} must have the last row {row}")
