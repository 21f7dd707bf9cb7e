# SPDX-License-Identifier: MIT
"""How well posed RGB-D frames confirm each other, as given and if they are read in another way.

Depth pixels of frame a are moved into frame b of its scene, x_b = T_b inv(T_a) x_a. There b's own depth
confirms them, or hides them (it is nearer, which says nothing), or contradicts them (b looks through
them). Two costs say how well a pair fits, both independent of the scale of a scene:

    depth   mean of log(|z - z_b| / z_b), clipped to 0.0005 .. 0.1
    color   log(1 - r), r the correlation of gray values over points that are not hidden

An *alternative* is another reading of the frames: inverted poses, other axes, another unit, and so on.
It fits if it explains a pair better by MARGIN, as well for all pairs, confirms as many points as a
clean capture does, and beats poses that do not move, towards which noise in the poses pulls.

Imports numpy.
"""
import itertools
from functools import partial
from typing import NamedTuple

import numpy as np

CLEAN = 0.85  # share of points that clean captures confirm, at least
MARGIN = 0.15  # log units per pair
HINT = 0.5  # log units per pair by which an alternative that does not fit shows that something is wrong
MIN_PAIRS = 3  # overlapping pairs that a test needs
OVERLAP = 0.1  # share of points on known depth, from which on two frames overlap
DEPTH = ("depth_intrinsics",)
COLOR = ("intrinsics",)
BOTH = DEPTH + COLOR
POSES = ("world2cam",)


class Views(NamedTuple):
    """F frames as arrays, padded to one size and small enough for many comparisons."""
    depth: np.ndarray  # (F, H, W) float32 meters, 0 = unknown
    gray: np.ndarray  # (F, h, w) float32, NaN = none
    depth_intrinsics: np.ndarray  # (F, 3, 3)
    intrinsics: np.ndarray  # (F, 3, 3)
    world2cam: np.ndarray  # (F, 4, 4) of the color cameras; NaN: not to be compared
    depth_to_color: np.ndarray  # (F, 4, 4), from the depth camera to the color camera
    followed: np.ndarray  # (F,) bool, the next of the frames comes next in time


# ---------------------------------------------------------------------------------------------- frames


def scale_intrinsics(intrinsics, sx, sy):
    """Intrinsics (..., 3, 3) of an image resized by sx and sy: `c -> (c + 0.5) * s - 0.5`."""
    result = intrinsics * np.array([sx, sy, 1.0])[:, None]
    result[..., 0, 2] += (sx - 1) / 2
    result[..., 1, 2] += (sy - 1) / 2
    return result


def small_depth(frame, width):
    """Every k-th pixel of a frame's depth, and the intrinsics (3, 3) of that image."""
    k = max(1, -(-frame["depth"].shape[1] // width))
    first = k // 2
    depth = frame["depth"][first::k, first::k].astype(np.float32)
    known = (depth > 0) & np.isfinite(depth)
    intrinsics = frame["depth_intrinsics"].copy()
    intrinsics[:2, 2] -= first
    intrinsics[:2] /= k
    return np.where(known, depth, np.float32(0)), intrinsics


def small_gray(frame, width):
    """Gray means of k x k pixels of a color image, blurred, and the intrinsics (3, 3) of that image.

    Without the blur, samples between pixels would have less noise, and correlate better, than others.
    """
    color = frame["color"]
    k = max(1, -(-color.shape[1] // width))
    height = color.shape[0] // k
    width = color.shape[1] // k
    color = color[:height * k, :width * k]
    gray = color.mean(2, dtype=np.float32)
    gray = gray.reshape(height, k, width, k)
    gray = gray.mean((1, 3))
    for _ in range(2):  # down, then across
        first, last = gray[:1], gray[-1:]
        above = np.concatenate([first, gray[:-1]])
        below = np.concatenate([gray[1:], last])
        gray = ((above + 2 * gray + below) / 4).T
    return gray, scale_intrinsics(frame["intrinsics"], 1 / k, 1 / k)


def depth_to_color(frame):
    """The motion (4, 4) from a frame's depth camera to its color camera."""
    if "depth_world2cam" not in frame:
        return np.eye(4)
    return frame["world2cam"] @ np.linalg.inv(frame["depth_world2cam"])


def depth_and_gray(frame, width):
    """A frame's `small_depth` (h, w), and the gray values of the color image there, NaN outside.

    Unknown depth counts as the median.
    """
    depth, intrinsics = small_depth(frame, width)
    known = depth > 0
    middle = np.median(depth[known]) if known.any() else 1
    z = np.where(known, depth, middle)
    rays = pixel_rays(intrinsics, depth.shape)
    points = move(depth_to_color(frame), rays * z.ravel())
    gray, intrinsics = small_gray(frame, width)
    uv, _ = project(intrinsics, points[None])
    first = np.zeros(1, np.int64)
    gray = sample(gray[None], first, uv)
    return depth, gray.reshape(depth.shape)


def pixel_rays(intrinsics, size, step=1):
    """inv(K) (u, v, 1) of every step-th pixel of images of size (H, W) -> (..., 3, n), row by row."""
    rows = np.arange(step // 2, size[0], step)
    columns = np.arange(step // 2, size[1], step)
    v, u = np.meshgrid(rows, columns, indexing="ij")
    pixels = np.stack([u, v, np.ones_like(u)])
    return np.linalg.inv(intrinsics) @ pixels.reshape(3, -1)


def move(motion, points):
    """Points (..., 3, n) moved by rigid matrices (..., 4, 4)."""
    rotation = motion[..., :3, :3]
    return rotation @ points + motion[..., :3, 3:]


def pad(images, value):
    """Images of any sizes -> one array; the value fills up bottom and right."""
    size = np.max([image.shape for image in images], 0)
    result = np.full((len(images), *size), value, np.float32)
    for padded, image in zip(result, images):
        height, width = image.shape
        padded[:height, :width] = image
    return result


def make_views(runs, width=320):
    """Runs of frames -> Views of all of them, and pairs (P, 2) of places within a run.

    A frame's "position" in its source, if it has one, tells which frame follows in time.
    """
    frames = list(itertools.chain(*runs))
    lengths = [len(run) for run in runs]
    run_of = np.repeat(np.arange(len(runs)), lengths)
    a, b = np.triu_indices(len(frames), 1)
    same_run = run_of[a] == run_of[b]
    pairs = np.stack([a, b], 1)[same_run]
    backward = pairs.sum(1) % 2 == 0
    pairs[backward] = pairs[backward, ::-1]
    positions = [frame.get("position", i) for i, frame in enumerate(frames)]
    followed = np.diff(positions, append=-1) == 1
    followed &= np.diff(run_of, append=-1) == 0
    depth, depth_intrinsics = zip(*(small_depth(frame, width) for frame in frames))
    gray, intrinsics = zip(*(small_gray(frame, width) for frame in frames))
    world2cam = [frame["world2cam"] for frame in frames]
    views = Views(
        depth=pad(depth, 0),
        gray=pad(gray, np.nan),
        depth_intrinsics=np.array(depth_intrinsics),
        intrinsics=np.array(intrinsics),
        world2cam=np.array(world2cam),
        depth_to_color=np.array(list(map(depth_to_color, frames))),
        followed=followed)
    return views, pairs


# ----------------------------------------------------------------------------------------------- pairs


def project(intrinsics, points):
    """Camera points (P, 3, n) -> pixels (P, 2, n), far outside behind the camera, and depth (P, n)."""
    z = points[:, 2]
    front = z > 1e-6
    rays = points / np.where(front, z, 1)[:, None]
    uv = (intrinsics @ rays)[:, :2].clip(-1e6, 1e6)
    return np.where(front[:, None], uv, -1e6), z


def sample(images, places, uv):
    """Bilinear samples (P, n) of images[places] at pixels (P, 2, n), NaN outside."""
    height, width = images.shape[1:]
    last = np.array([width - 1, height - 1])[:, None]
    inside = ((uv >= 0) & (uv <= last)).all(1)
    corner = np.clip(uv.astype(np.int64), 0, last - 1)
    right, down = (uv - corner).transpose(1, 0, 2)
    x, y = corner.transpose(1, 0, 2)
    index = (places[:, None] * height + y) * width + x
    values = images.reshape(-1)
    above = values[index] * (1 - right) + values[index + 1] * right
    index += width
    below = values[index] * (1 - right) + values[index + 1] * right
    result = above * (1 - down) + below * down
    return np.where(inside, result, np.nan)


def look_up(depth, b, uv, radius=0):
    """Depth of frames b at pixels (P, 2, n) -> (P, n), 0 = unknown or outside.

    Also returns a list of such arrays for pixels around, `radius` away.
    """
    height, width = depth.shape[1:]
    last = np.array([width - 1, height - 1])[:, None]
    pixel = np.rint(uv).astype(np.int64)
    inside = ((pixel >= 0) & (pixel <= last)).all(1)
    values = depth.reshape(-1)
    first = b[:, None] * (height * width)
    offsets = (-radius, 0, radius) if radius else (0,)
    around = []
    for offset in itertools.product(offsets, repeat=2):
        moved = pixel + np.array(offset)[:, None]
        x, y = np.clip(moved, 0, last).transpose(1, 0, 2)
        around.append(values[first + y * width + x])
    seen = around[len(around) // 2]  # without offset
    return np.where(inside, seen, 0), around


def correlation_cost(x, y, use):
    """log(1 - correlation) of two arrays (P, n) over `use`; 0 if there is nothing to correlate."""
    count = use.sum(1)
    values = np.where(use, np.stack([x, y]), 0)  # (2, P, n)
    means = values.sum(2) / np.maximum(count, 1)
    x, y = np.where(use, values - means[..., None], 0)
    square = (x * x).sum(1) * (y * y).sum(1)
    known = (count >= 30) & (square > 0)
    scale = np.sqrt(np.where(known, square, 1))
    r = (x * y).sum(1) / scale
    cost = np.log(np.clip(1 - r, 0.005, 1))
    return np.where(known, cost, 0)


class Fit(NamedTuple):
    """Arrays (P,) over pairs of frames; overlap and costs are NaN if a pair is not to be compared."""
    overlap: np.ndarray  # share of a's points that fall on known depth of b
    confirmed: np.ndarray  # number of points that b confirms
    contradicted: np.ndarray  # number of points that b looks through
    costs: np.ndarray  # (2, P) of depth and of color

    def share(self, use=True):
        """Share of confirmed points among those that are confirmed or contradicted; 0 without overlap."""
        use = use & (self.overlap >= OVERLAP)
        confirmed = self.confirmed[use].sum()
        contradicted = self.contradicted[use].sum()
        return confirmed / max(confirmed + contradicted, 1)

    def cost(self):
        """Mean cost of the pairs that overlap; 0 without any."""
        use = self.overlap >= OVERLAP
        total = self.costs[:, use].sum()
        return total / max(use.sum(), 1)


def fit(views, pairs, num_points=300, radius=0.0125, tolerance=0.05):
    """Moves about num_points depth pixels of the first frame of every pair into the second -> Fit.

    A point is confirmed if it is within max(tolerance, 2 %) of a depth at most `radius` image widths
    away: that forgives edges and jitter of the poses. tolerance: meters.
    """
    a, b = pairs.T
    height, width = views.depth.shape[1:]
    step = max(1, int(np.sqrt(height * width / num_points)))
    grid = views.depth[:, step // 2::step, step // 2::step]
    z = grid.reshape(len(grid), -1)[a]
    rays = pixel_rays(views.depth_intrinsics, (height, width), step)
    cam2world = np.linalg.inv(views.world2cam)
    motion = views.world2cam[b] @ cam2world[a]
    points = move(views.depth_to_color[a], rays[a] * z[:, None])  # (P, 3, n) in the color camera of a
    moved = move(motion, points)
    color_to_depth = np.linalg.inv(views.depth_to_color)
    in_depth = move(color_to_depth[b], moved)
    uv, predicted = project(views.depth_intrinsics[b], in_depth)
    seen, around = look_up(views.depth, b, uv, round(radius * width))
    use = (seen > 0) & (z > 0)
    count = use.sum(1)
    num_known = (z > 0).sum(1)
    overlap = count / np.maximum(num_known, 1)
    enough = (overlap >= OVERLAP) & (count >= 30)

    seen = np.where(use, seen, 1)
    error = np.abs(predicted - seen)
    nearest = error
    for near in around:
        closer = np.minimum(nearest, np.abs(predicted - near))
        nearest = np.where(near > 0, closer, nearest)
    allowed = np.maximum(tolerance, 0.02 * seen)
    confirmed = use & (nearest < allowed)
    contradicted = use & ~confirmed & (predicted < seen)
    logs = np.log(np.clip(error / seen, 0.0005, 0.1)) * use
    depth_cost = logs.sum(1) / np.maximum(count, 1)
    depth_cost = np.where(enough, depth_cost, np.log(0.1))

    uv, _ = project(views.intrinsics[a], points)
    gray_a = sample(views.gray, a, uv)
    uv, _ = project(views.intrinsics[b], moved)
    gray_b = sample(views.gray, b, uv)
    use &= np.isfinite(gray_a + gray_b)
    use &= predicted < 1.1 * seen
    color_cost = correlation_cost(gray_a, gray_b, use) * enough
    comparable = np.isfinite(motion).all((1, 2))
    known = np.where(comparable, 1, np.nan)
    return Fit(
        overlap=overlap * enough * known,
        confirmed=confirmed.sum(1),
        contradicted=contradicted.sum(1),
        costs=np.array([depth_cost, color_cost]) * known)


# ---------------------------------------------------------------------------------------- alternatives


def with_poses(views, world2cam):
    """Views with other poses (F, 4, 4)."""
    return views._replace(world2cam=world2cam)


def edit(views, fields, change):
    """Views of which some fields, arrays (F, ...), went through `change`."""
    changed = {field: change(getattr(views, field)) for field in fields}
    return views._replace(**changed)


def to_quaternion(rotation):
    """Rotation (3, 3) -> quaternion (x, y, z, w): an eigenvector (Bar-Itzhack 2000)."""
    trace = np.trace(rotation)
    matrix = np.zeros((4, 4))
    matrix[:3, :3] = rotation + rotation.T - trace * np.eye(3)
    skew = rotation - rotation.T
    matrix[3, :3] = skew[2, 1], skew[0, 2], skew[1, 0]
    matrix[3, 3] = trace
    _, vectors = np.linalg.eigh(matrix)  # of the lower triangle
    return vectors[:, -1]


def to_rotation(quaternion):
    """Quaternion (x, y, z, w) -> rotation (3, 3)."""
    axis, w = quaternion[:3], quaternion[3]
    cross = np.cross(np.eye(3), axis)  # cross @ p = axis x p
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def reorder(matrices, order):
    """Rigid matrices (F, 4, 4) whose quaternions are read in another order."""
    result = matrices.copy()
    for matrix in result:
        quaternion = to_quaternion(matrix[:3, :3])
        matrix[:3, :3] = to_rotation(quaternion[list(order)])
    return result


def axis_changes():
    """All 47 changes of axes (4, 4) but the identity."""
    changes = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turn = np.eye(4)[[*order, 3]]
            changes.append(np.diag([*signs, 1.0]) @ turn)
    return changes[1:]


def name_axes(matrix, upright):
    """A change of axes (4, 4) -> fault and words."""
    axes = []
    for row in matrix[:3]:
        axis = np.abs(row).argmax()
        sign = "-" if row[axis] < 0 else ""
        axes.append(sign + "xyz"[axis])
    words = f"camera axes {', '.join(axes)} for x, y, z"
    if np.linalg.det(matrix) < 0:
        return "mirrored", words
    if axes == ["x", "-y", "-z"]:
        return "OpenGL axes", words
    return "images turned" if upright and axes[2] == "z" else "camera axes", words


def neighboring(views, fields, offset):
    """Views with some fields of the next (1) or previous (-1) frame."""
    followed = views.followed
    known = followed if offset > 0 else np.roll(followed, 1)
    views = edit(views, fields, lambda values: np.roll(values, -offset, 0))
    known = known[:, None, None]
    return with_poses(views, np.where(known, views.world2cam, np.nan))


def scale_motion(views, log_factor):
    """Views whose translations are multiplied by exp(log_factor)."""
    factors = np.ones((4, 4))
    factors[:3, 3] = np.exp(log_factor)
    return with_poses(views, views.world2cam * factors)


def scale_focal(views, log_factor, fields):
    """Views whose focal lengths are multiplied by exp(log_factor)."""
    factors = np.ones((3, 3))
    factors[[0, 1], [0, 1]] = np.exp(log_factor)
    return edit(views, fields, lambda intrinsics: intrinsics * factors)


def swap_focal(intrinsics):
    """Intrinsics (F, 3, 3) with fx as fy and fy as fx."""
    result = intrinsics.copy()
    result[:, [0, 1], [0, 1]] = intrinsics[:, [1, 0], [1, 0]]
    return result


def shift_center(views, offset):
    """Views whose principal points are moved by offset (2,), in units of the image's size."""
    for field in BOTH:
        shift = np.zeros((3, 3))
        shift[:2, 2] = offset * image_size(views, field)
        views = edit(views, [field], lambda intrinsics: intrinsics + shift)
    return views


def image_size(views, field):
    """(W, H) of the images that a field of intrinsics belongs to."""
    image = views.depth if field == "depth_intrinsics" else views.gray
    return np.array(image.shape[:0:-1])


def off_center(views, field):
    """How far principal points are from the middle of the images (2,), as a share of their size."""
    points = getattr(views, field)[:, :2, 2] + 0.5
    return np.median(points / image_size(views, field), 0) - 0.5


def fit_to_images(views, fields):
    """Views whose intrinsics are rescaled so that principal points are in the middle of the images."""
    for field in fields:
        size = image_size(views, field)
        rescaled = []
        for intrinsics in getattr(views, field):
            factors = size / (2 * intrinsics[:2, 2] + 1)
            rescaled.append(scale_intrinsics(intrinsics, *factors))
        views = views._replace(**{field: np.array(rescaled)})
    return views


def alternatives(views, upright=True):
    """Yields (fault, words, Views). upright: whether the cameras stand upright in the world as given."""
    poses = np.linalg.inv(views.world2cam)
    yield "pose inverted", "the inverse matrices", with_poses(views, poses)
    rotations = poses[:, :3, :3]
    transposed = poses.copy()
    transposed[:, :3, :3] = rotations.swapaxes(1, 2)
    moved = poses.copy()
    moved[:, :3, 3:] = -rotations @ poses[:, :3, 3:]
    for words, half in (("transposed rotations", transposed),
                        ("the camera's place -R t in place of t", moved)):
        half = np.linalg.inv(half)
        yield "pose half inverted", words, with_poses(views, half)
    for words, order in (("x y z w", (3, 0, 1, 2)), ("w x y z", (1, 2, 3, 0))):
        words = f"quaternions that are stored as {words}"
        reordered = np.linalg.inv(reorder(poses, order))
        yield "quaternion order", words, with_poses(views, reordered)
        reordered = reorder(views.world2cam, order)
        yield "quaternion order", f"{words}, world to camera", with_poses(views, reordered)
    for matrix in axis_changes():
        fault, words = name_axes(matrix, upright)
        yield fault, words, with_poses(views, matrix @ views.world2cam)
    for k in (1, 2, 3):
        def turn(images):
            return np.rot90(images, k, (1, 2))
        words = f"images turned by {90 * k} degrees counterclockwise"
        yield "images turned", words, edit(views, ["depth", "gray"], turn)
        yield "color images turned", f"color {words}", edit(views, ["gray"], turn)
    mirrored = views.gray[:, :, ::-1]
    words = "color images flipped left to right"
    yield "color images mirrored", words, views._replace(gray=mirrored)
    for fault, fields in (("color intrinsics", COLOR), ("depth intrinsics", DEPTH),
                          ("intrinsics of both", BOTH)):
        if all(np.abs(off_center(views, field)).max() > 0.1 for field in fields):
            words = "intrinsics that are rescaled to the images"
            yield fault, words, fit_to_images(views, fields)
    for what, fields in (("both images", BOTH), ("depth", DEPTH), ("color", COLOR)):
        fx, fy = np.concatenate([getattr(views, field)[:, [0, 1], [0, 1]] for field in fields]).T
        if np.abs(fx / fy - 1).max() > 0.01:
            yield "focal length", f"fx and fy of {what} swapped", edit(views, fields, swap_focal)
    for offset, which in ((1, "next"), (-1, "previous")):
        words = f"the pose of the {which} frame"
        yield "poses off by one frame", words, neighboring(views, POSES, offset)
        for image, fields in (("depth", ["depth", *DEPTH]), ("color", ["gray", *COLOR])):
            words = f"the {image} of the {which} frame"
            yield "depth and color shifted in time", words, neighboring(views, fields, offset)


# ---------------------------------------------------------------------------------------------- weighed


class Weighed(NamedTuple):
    """An alternative against what is given; neither helps nor worse: the pairs cannot tell."""
    fault: str
    words: str
    x: object = None  # value of a continuous alternative
    gain: float = -np.inf  # log units by which it explains a pair better; -inf: too few pairs
    share: float = 0.0  # of points that are confirmed under it
    fits: bool = False  # it explains the frames as well as clean ones are
    helps: bool = False  # it explains them better, perhaps not well
    worse: bool = False
    gains: np.ndarray = np.nan  # (P,) of the pairs; NaN: not to be compared
    late: bool = False  # another is preferred if both explain equally much

    def rivaled_by(self, other):
        """Whether the pairs cannot tell this alternative from another, or the other explains them better.

        A late one, or one with a value that was searched for, must explain them better than one without.
        """
        lead = self.gain - other.gain
        if other.late or self.x is None and other.x is not None:
            return lead < -0.1
        leads = np.atleast_1d(self.gains - other.gains)
        leads = leads[np.isfinite(leads)]
        error = leads.std() / np.sqrt(len(leads)) if len(leads) else 0
        return lead < max(0.1, 2 * error)


class Judge:
    """Weighs alternatives to `views` over pairs (P, 2)."""

    def __init__(self, views, pairs):
        self.views = views
        self.pairs = pairs
        self.median_depth = np.median(views.depth[views.depth > 0])
        self.given = fit(views, pairs)
        still = np.broadcast_to(np.eye(4), views.world2cam.shape)
        self.still = self.fit_strictly(with_poses(views, still))

    def fit_strictly(self, views):
        """`fit` with a tolerance that does not depend on the unit of depth."""
        tolerance = min(0.05, 0.02 * self.median_depth)
        return fit(views, self.pairs, tolerance=tolerance)

    def overlapping(self):
        """Number of pairs that overlap with the cameras as given."""
        return np.count_nonzero(self.given.overlap >= OVERLAP)

    def noisy(self):
        """Whether poses that do not move explain the frames better than their own, so that noise hides faults."""
        return self.still.share() >= CLEAN and self.given.cost() - self.still.cost() > MARGIN

    def look_alikes(self, fit):
        """Number of pairs that show the same, though by a Fit they do not overlap."""
        still = self.still
        judged = still.confirmed + still.contradicted
        alike = still.confirmed >= CLEAN * judged
        alike &= (still.overlap >= 0.5) & (still.costs[1] < np.log(0.5))
        return np.count_nonzero(alike & (fit.overlap == 0))

    def share_of(self, place):
        """Share of confirmed points in the pairs of one frame; 1 without any."""
        own = (self.pairs == place).any(1)
        overlaps = own & (self.given.overlap >= OVERLAP)
        return self.given.share(overlaps) if overlaps.any() else 1

    def weigh(self, fault, words, views, x=None):
        """-> Weighed."""
        given = self.given
        other = fit(views, self.pairs, radius=0)
        own = other.overlap >= OVERLAP
        either = own | (given.overlap >= OVERLAP) & np.isfinite(other.overlap)
        if either.sum() < MIN_PAIRS:
            return Weighed(fault, words, x)
        gains = given.costs - other.costs  # (2, P)
        of_pairs = np.where(either, gains.sum(0), np.nan)
        total = of_pairs[either]
        gain = total.mean()
        if gain < MARGIN or own.sum() < MIN_PAIRS:
            return Weighed(fault, words, x, gain, worse=gain < -0.05, gains=of_pairs)

        share = self.fit_strictly(views).share(own)
        gains = gains[:, own]
        parts = gains.mean(1)  # of depth and of color
        costs = other.costs[:, own]
        still = self.still.costs[:, own]
        beats_still = (still - costs).sum(0).mean() > MARGIN
        no_part_worse = parts.min() > -0.05 and share > given.share() - 0.02
        changed = np.abs(gains).max(1) > 1e-9  # not the depth if only colors change
        changed_costs = costs[changed].sum(0)
        low, high = np.percentile(changed_costs, (25, 75))
        spread = (high - low) / 1.35  # a standard deviation without outliers
        lost = -total.clip(max=0).sum()
        least = max(MARGIN + 1 / own.sum(), 1.2 * spread)
        alike = parts.sum() > least and total.sum() > 2 * lost
        hinted = parts.sum() > max(HINT, 0.7 * gains.sum(0).std())
        better = beats_still and no_part_worse
        fits = better and share >= CLEAN and alike and self.look_alikes(other) < MIN_PAIRS
        return Weighed(fault, words, x, gain, share, fits, better and hinted, gains=of_pairs)

    def search(self, change, starts, step, fault, words):
        """The best value x of a continuous alternative change(views, x) -> Weighed.

        Begins at the best of `starts` and goes on by steps that halve. words: a function of x.
        """
        def weigh(x):
            return self.weigh(fault, words(x), change(self.views, x), x)
        best = max(map(weigh, starts), key=lambda one: one.gain)
        if best.gain < -0.3:
            return best
        axes = np.eye(np.size(best.x))
        axes = axes.reshape(-1, *np.shape(best.x))
        for _ in range(6):
            x = best.x
            around = [x + step * axis for axis in (*axes, *-axes)]
            best = max(best, *map(weigh, around), key=lambda one: one.gain)
            step /= 2
        return best

    def weigh_scale(self, log_factor):
        """Translations times exp(log_factor) -> Weighed."""
        return self.weigh("units", "", scale_motion(self.views, log_factor), log_factor)

    def search_scale(self):
        """The factor of the translations."""
        logs = np.append(0.35 * np.arange(1, 27), [0.1, 0.2])
        best = self.search(scale_motion, [*-logs, *logs], 0.17, "units", lambda x: "")
        shrinks = best.gain > MARGIN and best.x < 0
        if shrinks and best.gain < self.weigh_scale(-20).gain + 0.8:
            return best._replace(fits=False, helps=False)  # no translation at all is as good
        return best

    def search_focal(self, fields, what):
        """The factor of focal lengths."""
        def words(x):
            return f"focal lengths of {what} times {np.exp(x):.3g}"
        scale = partial(scale_focal, fields=fields)
        logs = (0.1, -0.1, 0.2, -0.2, 0.35, -0.35, 0.5, -0.5)
        return self.search(scale, logs, 0.08, "focal length", words)

    def search_center(self):
        """The offset of the principal points."""
        shares = (0, -0.1, 0.1, -0.2, 0.2)
        starts = [np.array(offset) for offset in itertools.product(shares, repeat=2) if any(offset)]
        words = "principal points {:.1f} % of the width to the right and {:.1f} % of the height down"
        return self.search(shift_center, starts, 0.05, "cropped images",
                           lambda x: words.format(*100 * x))

    def weigh_all(self, upright=True):
        """All alternatives -> list of Weighed, the one to prefer first if two explain equally much.

        upright: whether the cameras stand upright in the world as given. Then it is the images that are
        turned, and not the axes of the cameras.
        """
        tried = [self.weigh(*one) for one in alternatives(self.views, upright)]
        tried += [self.search_scale(), self.search_center()]
        for fields, what in ((BOTH, "both images"), (DEPTH, "depth"), (COLOR, "color")):
            tried.append(self.search_focal(fields, what))
        late = ["mirrored", "depth and color shifted in time"]
        if not upright:
            late.append("images turned")
        tried = [one._replace(late=one.fault in late) for one in tried]
        return sorted(tried, key=lambda one: one.late)
