# SPDX-License-Identifier: MIT
"""How well posed RGB-D frames confirm each other, as given and if they are read in another way.

Depth pixels of frame a are moved into frame b of its scene, x_b = T_b inv(T_a) x_a, where b's own depth
either confirms them, or hides them (they lie behind it, which says nothing), or contradicts them (b looks
through them). Two costs say how well the rest fits, both independent of the scale of a scene:

    depth   mean of log(|z - z_b| / z_b), clipped to 0.0005 .. 0.1
    color   log(1 - r), r the correlation of gray values over points that are not hidden

An *alternative* is another reading of the frames: inverted poses, other axes, another unit, and so on. It is
better if it explains a pair by MARGIN log units better, confirms as many points as a clean capture does, and
beats poses that do not move at all, towards which noise in the poses pulls.

Imports numpy.
"""
import itertools
from typing import NamedTuple

import numpy as np

CLEAN = 0.85  # share of points that clean captures confirm, at least
MARGIN = 0.15  # log units per pair; on clean frames and with jitter of the poses no alternative gains 0.1
MIN_PAIRS = 3  # overlapping pairs that a test needs
OVERLAP = 0.1  # share of points that fall on known depth, from which on two frames overlap


class Views(NamedTuple):
    """F frames as arrays, padded to one size and small enough for many comparisons."""
    depth: np.ndarray  # (F, H, W) float32 meters, 0 = unknown
    gray: np.ndarray  # (F, h, w) float32, NaN = none
    depth_intrinsics: np.ndarray  # (F, 3, 3)
    intrinsics: np.ndarray  # (F, 3, 3)
    world2cam: np.ndarray  # (F, 4, 4); NaN: not to be compared
    following: np.ndarray  # (F,) place of the frame that comes next in time, -1 = not sampled


# ------------------------------------------------------------------------------------------------- frames


def scale_intrinsics(intrinsics, sx, sy):
    """Intrinsics (..., 3, 3) of an image resized by sx and sy: `c -> (c + 0.5) * s - 0.5`."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return np.linalg.inv(half) @ np.diag([sx, sy, 1.0]) @ half @ intrinsics


def small_depth(frame, width):
    """Every k-th pixel of a frame's depth, and the intrinsics (3, 3) of that image."""
    depth = frame["depth"]
    k = max(1, -(-depth.shape[1] // width))
    depth = np.where((depth > 0) & np.isfinite(depth), depth, 0)[k // 2::k, k // 2::k]
    to_small = np.array([[1 / k, 0, -(k // 2) / k], [0, 1 / k, -(k // 2) / k], [0, 0, 1]])
    return depth.astype(np.float32), to_small @ frame["depth_intrinsics"]


def small_gray(frame, width):
    """Gray means of k x k pixels of a frame's color image, blurred, and the intrinsics (3, 3) of that image.

    Without the blur, samples between pixels would have less noise and correlate better than others.
    """
    k = max(1, -(-frame["color"].shape[1] // width))
    height, width = (size // k for size in frame["color"].shape[:2])
    gray = frame["color"][:height * k, :width * k].mean(2, dtype=np.float32)
    gray = gray.reshape(height, k, width, k).mean((1, 3))
    for axis in range(2):
        ends = [(1, 1) if axis == other else (0, 0) for other in range(2)]
        around = np.pad(gray, ends, mode="edge")
        gray = (around.take(range(gray.shape[axis]), axis) + 2 * gray
                + around.take(range(2, gray.shape[axis] + 2), axis)) / 4
    return gray, scale_intrinsics(frame["intrinsics"], 1 / k, 1 / k)


def pad(images, value):
    """Images of any sizes -> one array; the value fills up bottom and right."""
    height, width = (max(image.shape[axis] for image in images) for axis in range(2))
    missing = [((0, height - image.shape[0]), (0, width - image.shape[1])) for image in images]
    return np.stack([np.pad(image, one, constant_values=value) for image, one in zip(images, missing)])


def make_views(runs, width=320):
    """Runs of frames -> Views of all of them, and pairs (P, 2) of places within a run.

    A frame's "position" in its source, where it has one, tells which frame follows in time.
    """
    frames = list(itertools.chain(*runs))
    depth, depth_intrinsics = zip(*(small_depth(frame, width) for frame in frames))
    gray, intrinsics = zip(*(small_gray(frame, width) for frame in frames))
    following = np.full(len(frames), -1)
    pairs = []
    start = 0
    for run in runs:
        places = range(start, start + len(run))
        for i, j in itertools.combinations(places, 2):
            pairs.append((i, j) if (i + j) % 2 else (j, i))
        for i, j in zip(places, places[1:]):
            gap = frames[j].get("position", j) - frames[i].get("position", i)
            following[i] = j if gap == 1 else -1
        start += len(run)
    views = Views(pad(depth, 0), pad(gray, np.nan), np.array(depth_intrinsics), np.array(intrinsics),
                  np.array([frame["world2cam"] for frame in frames]), following)
    return views, np.array(pairs, np.int64).reshape(-1, 2)


# -------------------------------------------------------------------------------------------------- pairs


def project(intrinsics, points):
    """Camera points (P, 3, n) -> pixels (P, 2, n), far outside behind the camera, and depth (P, n)."""
    z = points[:, 2]
    front = z > 1e-6
    uv = (intrinsics @ (points / np.where(front, z, 1)[:, None]))[:, :2]
    return np.where(front[:, None], np.clip(uv, -1e6, 1e6), -1e6), z


def sample(images, places, uv):
    """Bilinear samples (P, n) of images[places] at pixels (P, 2, n), NaN outside."""
    height, width = images.shape[1:]
    u, v = uv[:, 0], uv[:, 1]
    inside = (u >= 0) & (v >= 0) & (u <= width - 1) & (v <= height - 1)
    x = np.clip(u.astype(np.int64), 0, width - 2)
    y = np.clip(v.astype(np.int64), 0, height - 2)
    fx, fy = u - x, v - y
    flat = images.reshape(-1)
    corner = (places[:, None] * height + y) * width + x
    above = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    below = flat[corner + width] * (1 - fx) + flat[corner + width + 1] * fx
    return np.where(inside, above * (1 - fy) + below * fy, np.nan)


class Fit(NamedTuple):
    """Arrays (P,) over pairs of frames; NaN if a pair is not to be compared."""
    overlap: np.ndarray  # share of a's points that fall on known depth of b
    confirmed: np.ndarray  # number of points that b confirms
    contradicted: np.ndarray  # number of points that b looks through
    depth_cost: np.ndarray
    color_cost: np.ndarray

    def share(self, use=True):
        """Share of confirmed points among those that are confirmed or contradicted; 0 without overlap."""
        use = (self.overlap >= OVERLAP) & use
        confirmed = self.confirmed[use].sum()
        return confirmed / max(confirmed + self.contradicted[use].sum(), 1)

    def cost(self):
        """Mean cost of the pairs that overlap; 0 without any."""
        use = self.overlap >= OVERLAP
        return (self.depth_cost + self.color_cost)[use].sum() / max(use.sum(), 1)


def look_up(depth, b, uv, radius):
    """Depth of frames b at pixels (P, 2, n) -> (P, n), 0 = unknown or outside; and, if radius is not 0, a list
    of the same for pixels around.
    """
    height, width = depth.shape[1:]
    x, y = np.rint(uv).astype(np.int64).transpose(1, 0, 2)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x * inside, y * inside
    flat = depth.reshape(-1)
    first = b[:, None] * (height * width)
    seen = np.where(inside, flat[first + y * width + x], 0)
    around = itertools.product((-radius, 0, radius), repeat=2) if radius else ()
    shifted = [(np.clip(x + dx, 0, width - 1), np.clip(y + dy, 0, height - 1)) for dx, dy in around]
    return seen, [flat[first + y * width + x] for x, y in shifted]


def correlation_cost(x, y, use):
    """log(1 - correlation) of two arrays (P, n) over `use`; 0 if there is nothing to correlate."""
    count = np.maximum(use.sum(1), 1)[:, None]
    x, y = np.where(use, x, 0), np.where(use, y, 0)
    x = np.where(use, x - x.sum(1, keepdims=True) / count, 0)
    y = np.where(use, y - y.sum(1, keepdims=True) / count, 0)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    known = (count[:, 0] >= 30) & (scale > 0)
    r = (x * y).sum(1) / np.where(known, scale, 1)
    return np.where(known, np.log(np.clip(1 - r, 0.005, 1)), 0)


def fit(views, pairs, num_points=300, radius=0.0125, tolerance=0.05):
    """Moves about num_points depth pixels of the first frame of every pair into the second -> Fit.

    A point is confirmed if it is within max(tolerance, 2 %) of a depth at most `radius` image widths away: that
    forgives edges and jitter of the poses. tolerance: meters.
    """
    a, b = pairs.T
    height, width = views.depth.shape[1:]
    step = max(1, int(np.sqrt(height * width / num_points)))
    v, u = np.mgrid[step // 2:height:step, step // 2:width:step].reshape(2, -1)
    z = views.depth[a[:, None], v, u]
    rays = np.linalg.inv(views.depth_intrinsics) @ np.stack([u, v, np.ones_like(u)])
    points = rays[a] * z[:, None]  # (P, 3, n)
    motion = views.world2cam[b] @ np.linalg.inv(views.world2cam[a])
    moved = motion[:, :3, :3] @ points + motion[:, :3, 3:]
    uv, predicted = project(views.depth_intrinsics[b], moved)
    seen, around = look_up(views.depth, b, uv, round(radius * width))
    use = (seen > 0) & (z > 0)
    count = use.sum(1)
    overlap = count / np.maximum((z > 0).sum(1), 1)
    enough = (overlap >= OVERLAP) & (count >= 30)

    seen = np.where(use, seen, 1)
    error = np.abs(predicted - seen)
    nearest = error
    for near in around:
        nearest = np.where(near > 0, np.minimum(nearest, np.abs(predicted - near)), nearest)
    confirmed = use & (nearest < np.maximum(tolerance, 0.02 * seen))
    contradicted = use & ~confirmed & (predicted < seen)
    error = np.log(np.clip(error / seen, 0.0005, 0.1))
    depth_cost = np.where(enough, (error * use).sum(1) / np.maximum(count, 1), np.log(0.1))
    gray_a = sample(views.gray, a, project(views.intrinsics[a], points)[0])
    gray_b = sample(views.gray, b, project(views.intrinsics[b], moved)[0])
    use = use & np.isfinite(gray_a) & np.isfinite(gray_b) & (predicted < 1.1 * seen)
    color_cost = np.where(enough, correlation_cost(gray_a, gray_b, use), 0)
    columns = (overlap * enough, confirmed.sum(1), contradicted.sum(1), depth_cost, color_cost)
    known = np.isfinite(motion).all((1, 2))
    return Fit(*(np.where(known, column, np.nan) for column in columns))


# ------------------------------------------------------------------------------------------- alternatives


def moved_cameras(views, change):
    """Views whose camera-to-world matrices (F, 4, 4) went through `change`."""
    return views._replace(world2cam=np.linalg.inv(change(np.linalg.inv(views.world2cam))))


def swap_rotation(poses):
    """Camera-to-world matrices with transposed rotations."""
    poses = poses.copy()
    poses[:, :3, :3] = poses[:, :3, :3].swapaxes(1, 2)
    return poses


def swap_shift(poses):
    """Camera-to-world matrices whose fourth column was that of the inverse."""
    poses = poses.copy()
    poses[:, :3, 3:] = -poses[:, :3, :3] @ poses[:, :3, 3:]
    return poses


def to_quaternion(rotation):
    """Rotation (3, 3) -> quaternion (x, y, z, w), the eigenvector of Bar-Itzhack's symmetric matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    matrix = [[a - e - i, 0, 0, 0], [d + b, e - a - i, 0, 0], [g + c, h + f, i - a - e, 0],
              [h - f, c - g, d - b, a + e + i]]
    return np.linalg.eigh(matrix)[1][:, -1]


def to_rotation(quaternion):
    """Quaternion (x, y, z, w) -> rotation (3, 3)."""
    (x, y, z), w = quaternion[:3], quaternion[3]
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def reorder(matrices, order):
    """Rigid matrices (F, 4, 4) whose quaternions are read in another order."""
    result = matrices.copy()
    for matrix in result:
        matrix[:3, :3] = to_rotation(to_quaternion(matrix[:3, :3])[list(order)])
    return result


def axis_changes():
    """All 47 changes of axes (4, 4) but the identity: rotations first, mirrors last."""
    changes = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        matrix = np.eye(4)
        matrix[:3, :3] = np.eye(3)[list(order)] * np.array(signs)[:, None]
        changes.append(matrix)
    return sorted(changes[1:], key=lambda matrix: -np.linalg.det(matrix))


def depth_along_axis(views):
    """Views whose depth was measured along the ray."""
    height, width = views.depth.shape[1:]
    v, u = np.mgrid[:height, :width].reshape(2, -1)
    rays = np.linalg.inv(views.depth_intrinsics) @ np.stack([u, v, np.ones_like(u)])
    lengths = np.linalg.norm(rays, axis=1).reshape(-1, height, width)
    return views._replace(depth=(views.depth / lengths).astype(np.float32))


def neighboring(views, fields, offset):
    """Views with some fields of the next (1) or previous (-1) frame."""
    source = views.following
    if offset < 0:
        source = np.full(len(source), -1)
        source[views.following[views.following >= 0]] = np.flatnonzero(views.following >= 0)
    views = views._replace(**{field: getattr(views, field)[source] for field in fields})
    world2cam = np.where((source < 0)[:, None, None], np.nan, views.world2cam)
    return views._replace(world2cam=world2cam)


def scale_shifts(views, log_factor):
    """Views whose translations are multiplied by exp(log_factor)."""
    world2cam = views.world2cam.copy()
    world2cam[:, :3, 3] *= np.exp(log_factor)
    return views._replace(world2cam=world2cam)


def scale_focal(views, log_factor, fields):
    """Views whose focal lengths are multiplied by exp(log_factor)."""
    zoom = np.array([[np.exp(log_factor), 1, 1], [1, np.exp(log_factor), 1], [1, 1, 1]])
    return views._replace(**{field: getattr(views, field) * zoom for field in fields})


def shift_center(views, offset):
    """Views whose principal points are moved by offset (2,), in units of the image's size."""
    height, width = views.depth.shape[1:]
    depth_intrinsics, intrinsics = views.depth_intrinsics.copy(), views.intrinsics.copy()
    depth_intrinsics[:, :2, 2] += offset * np.array([width, height])
    height, width = views.gray.shape[1:]
    intrinsics[:, :2, 2] += offset * np.array([width, height])
    return views._replace(depth_intrinsics=depth_intrinsics, intrinsics=intrinsics)


def fit_to_images(views, fields):
    """Views whose intrinsics are rescaled so that principal points lie in the middle of the images."""
    changed = {}
    for field in fields:
        image = views.depth if field == "depth_intrinsics" else views.gray
        size = 2 * getattr(views, field)[:, :2, 2] + 1
        factors = np.array(image.shape[:0:-1]) / size
        changed[field] = np.stack([scale_intrinsics(one, *factor)
                                   for one, factor in zip(getattr(views, field), factors)])
    return views._replace(**changed)


def alternatives(views, upright=True):
    """Yields (fault, words, Views). Of two that explain equally much, the earlier one is told.

    upright: whether the cameras, as given, stand upright in the world.
    """
    yield "pose inverted", "the inverse matrices", moved_cameras(views, np.linalg.inv)
    yield "pose half inverted", "transposed rotations", moved_cameras(views, swap_rotation)
    yield "pose half inverted", "the camera's place -R t in place of t", moved_cameras(views, swap_shift)
    for order, words in (((3, 0, 1, 2), "x y z w"), ((1, 2, 3, 0), "w x y z")):
        words = f"quaternions that are stored as {words}"
        yield "quaternion order", words, moved_cameras(views, lambda poses: reorder(poses, order))
        inverses = views._replace(world2cam=reorder(views.world2cam, order))
        yield "quaternion order", f"{words}, of world-to-camera poses", inverses
    for k, angle in ((1, 90), (3, 270), (2, 180)):
        turned = views._replace(depth=np.rot90(views.depth, k, (1, 2)), gray=np.rot90(views.gray, k, (1, 2)))
        yield "images turned", f"images turned by {angle} degrees counterclockwise", turned
    for matrix in axis_changes():
        axes = [f"{'-' if row.min() < 0 else ''}{'xyz'[np.abs(row).argmax()]}" for row in matrix[:3, :3]]
        words = f"camera axes {', '.join(axes)} for x, y, z"
        fault = "camera axes"
        if np.linalg.det(matrix) < 0:
            fault = "mirrored"
        elif axes == ["x", "-y", "-z"]:
            fault = "OpenGL axes"
        elif axes[2] == "z" and upright:
            fault = "images turned"
        yield fault, words, views._replace(world2cam=matrix @ views.world2cam)
    for fields in (["intrinsics"], ["depth_intrinsics"], ["intrinsics", "depth_intrinsics"]):
        fault = {"intrinsics": "color intrinsics", "depth_intrinsics": "depth intrinsics"}[fields[0]]
        fault = "intrinsics of both" if len(fields) > 1 else fault
        yield fault, "intrinsics that are rescaled to the size of the images", fit_to_images(views, fields)
    yield "depth along the ray", "depth divided by the length of the pixel's ray", depth_along_axis(views)
    for k, angle in ((1, 90), (3, 270), (2, 180)):
        words = f"color images turned by {angle} degrees counterclockwise"
        yield "color images turned", words, views._replace(gray=np.rot90(views.gray, k, (1, 2)))
    yield "color images mirrored", "color images flipped left to right", views._replace(gray=views.gray[..., ::-1])
    for offset, which in ((1, "next"), (-1, "previous")):
        for fault, what, fields in (
                ("poses off by one frame", "pose", ["world2cam"]),
                ("depth and color shifted in time", "depth", ["depth", "depth_intrinsics"]),
                ("depth and color shifted in time", "color", ["gray", "intrinsics"])):
            yield fault, f"the {what} of the {which} frame", neighboring(views, fields, offset)


def continuous_alternatives():
    """Yields (fault, words of x, change of Views by x, values of x to begin with, first step)."""
    logs = 0.35 * np.arange(1, 27)
    yield ("scale", lambda x: f"translations times {np.exp(x):.4g}", scale_shifts,
           np.concatenate([-logs, logs]), 0.17)
    logs = np.array([0.1, 0.2, 0.35, 0.5])
    for fields, what in ((["intrinsics", "depth_intrinsics"], "both images"),
                         (["depth_intrinsics"], "depth"), (["intrinsics"], "color")):
        yield ("focal length", lambda x, what=what: f"focal lengths of {what} times {np.exp(x):.3g}",
               lambda views, x, fields=fields: scale_focal(views, x, fields), np.concatenate([-logs, logs]), 0.08)
    grid = [np.array(offset) for offset in itertools.product((-0.2, -0.1, 0, 0.1, 0.2), repeat=2) if any(offset)]
    yield ("cropped images", lambda x: f"principal points {100 * x[0]:+.1f} % of the width to the right and "
           f"{100 * x[1]:+.1f} % of the height down", shift_center, grid, 0.05)


# ------------------------------------------------------------------------------------------------- weighed


class Weighed(NamedTuple):
    """An alternative against what is given; neither better nor worse: the pairs cannot tell."""
    fault: str
    words: str
    x: object = None  # value of a continuous alternative
    gain: float = -np.inf  # log units by which it explains a pair better; -inf: too few pairs
    share: float = 0.0  # of points that are confirmed under it
    fits: bool = False  # it explains the frames as well as clean ones are
    helps: bool = False  # it explains them better, perhaps not well
    worse: bool = False
    views: Views = None


class Judge:
    """Weighs alternatives to `views` over pairs (P, 2). num_points: see `fit`."""

    def __init__(self, views, pairs, num_points=300):
        self.views = views
        self.pairs = pairs
        self.num_points = num_points
        known = views.depth[views.depth > 0]
        self.tolerance = min(0.05, 0.02 * np.median(known)) if len(known) else 0.05
        self.given = fit(views, pairs, num_points)
        still = np.broadcast_to(np.eye(4), views.world2cam.shape)
        self.still = fit(views._replace(world2cam=still), pairs, num_points)

    def overlapping(self):
        """Number of pairs that overlap with the cameras as given."""
        return int((self.given.overlap >= OVERLAP).sum())

    def weigh(self, fault, words, views, x=None):
        """-> Weighed."""
        given = self.given
        other = fit(views, self.pairs, self.num_points, radius=0)
        either = np.isfinite(other.overlap) & (np.fmax(given.overlap, other.overlap) >= OVERLAP)
        if either.sum() < MIN_PAIRS:
            return Weighed(fault, words, x)
        gains = np.stack([given.depth_cost - other.depth_cost, given.color_cost - other.color_cost])
        gain = gains[:, either].sum(0)
        if gain.mean() < MARGIN:
            return Weighed(fault, words, x, gain.mean(), worse=gain.mean() < -0.05)

        own = either & (other.overlap >= OVERLAP)
        if own.sum() < MIN_PAIRS:
            return Weighed(fault, words, x, gain.mean())
        costs = np.stack([other.depth_cost, other.color_cost])[:, own]
        still = np.stack([self.still.depth_cost, self.still.color_cost])[:, own]
        gains = gains[:, own]
        changed = np.abs(gains).max(1) > 1e-9  # color alone: nothing is said about the spread of depth
        spread = costs[changed].sum(0).std()
        steady = gain.clip(min=0).sum() > -3 * gain.clip(max=0).sum()
        moves = (still - costs).sum(0).mean() > MARGIN
        share = fit(views, self.pairs, self.num_points, tolerance=self.tolerance).share(own)
        helps = steady and moves and gains.mean(1).min() > -0.05 and share > given.share() - 0.02
        fits = helps and share >= CLEAN and gains.sum(0).mean() > 1.2 * spread
        return Weighed(fault, words, x, gain.mean(), share, fits, helps, False, views)

    def search(self, fault, words, change, starts, step):
        """The best value of a continuous alternative, found on a grid and by halving steps -> Weighed."""
        def weigh(x):
            return self.weigh(fault, words(x), change(self.views, x), x)

        best = max((weigh(x) for x in starts), key=lambda one: one.gain)
        if best.gain < -0.3:
            return best
        axes = np.eye(np.size(best.x)).reshape(-1, *np.shape(best.x))
        for _ in range(6):
            around = [weigh(best.x + step * sign * axis) for sign in (1, -1) for axis in axes]
            best = max([best, *around], key=lambda one: one.gain)
            step /= 2
        return best

    def weigh_all(self, upright=True):
        """All alternatives -> list of Weighed, the one to prefer first if two explain equally much.

        upright: whether the cameras stand upright in the world as given. Then it is the images that are
        turned, and not the axes of the cameras.
        """
        tried = [self.weigh(*one) for one in alternatives(self.views, upright)]
        tried += [self.search(*one) for one in continuous_alternatives()]
        return sorted(tried, key=lambda one: (one.fault == "mirrored", one.fault == "images turned" and not upright))
