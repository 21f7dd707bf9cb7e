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
from typing import NamedTuple

import numpy as np

CLEAN = 0.85  # share of points that clean captures confirm, at least
MARGIN = 0.15  # log units per pair
HINT = 0.5  # log units per pair by which an alternative that does not fit shows that something is wrong
MIN_PAIRS = 3  # overlapping pairs that a test needs
OVERLAP = 0.1  # share of points on known depth, from which on two frames overlap
BOTH = ("depth_intrinsics", "intrinsics")


class Views(NamedTuple):
    """F frames as arrays, padded to one size and small enough for many comparisons."""
    depth: np.ndarray  # (F, H, W) float32 meters, 0 = unknown
    gray: np.ndarray  # (F, h, w) float32, NaN = none
    depth_intrinsics: np.ndarray  # (F, 3, 3)
    intrinsics: np.ndarray  # (F, 3, 3)
    world2cam: np.ndarray  # (F, 4, 4) of the color cameras; NaN: not to be compared
    depth_to_color: np.ndarray  # (F, 4, 4), from the depth camera to the color camera
    following: np.ndarray  # (F,) place of the frame that comes next in time, -1 = not sampled


# ---------------------------------------------------------------------------------------------- frames


def scale_intrinsics(intrinsics, sx, sy):
    """Intrinsics (..., 3, 3) of an image resized by sx and sy: `c -> (c + 0.5) * s - 0.5`."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return np.linalg.inv(half) @ np.diag([sx, sy, 1.0]) @ half @ intrinsics


def small_depth(frame, width):
    """Every k-th pixel of a frame's depth, and the intrinsics (3, 3) of that image."""
    depth = frame["depth"]
    k = max(1, -(-depth.shape[1] // width))
    first = k // 2
    depth = np.where((depth > 0) & np.isfinite(depth), depth, 0)[first::k, first::k]
    to_small = np.array([[1 / k, 0, -first / k], [0, 1 / k, -first / k], [0, 0, 1]])
    return depth.astype(np.float32), to_small @ frame["depth_intrinsics"]


def small_gray(frame, width):
    """Gray means of k x k pixels of a color image, blurred, and the intrinsics (3, 3) of that image.

    Without the blur, samples between pixels would have less noise, and correlate better, than others.
    """
    k = max(1, -(-frame["color"].shape[1] // width))
    height, width = (size // k for size in frame["color"].shape[:2])
    gray = frame["color"][:height * k, :width * k].mean(2, dtype=np.float32)
    gray = gray.reshape(height, k, width, k).mean((1, 3))
    for _ in range(2):
        edge = np.pad(gray, ((1, 1), (0, 0)), mode="edge")
        gray = ((edge[:-2] + 2 * gray + edge[2:]) / 4).T
    return gray, scale_intrinsics(frame["intrinsics"], 1 / k, 1 / k)


def depth_to_color(frame):
    """The motion (4, 4) from a frame's depth camera to its color camera."""
    if "depth_world2cam" not in frame:
        return np.eye(4)
    return frame["world2cam"] @ np.linalg.inv(frame["depth_world2cam"])


def color_pixels(frame, width, intrinsics):
    """Where the pixels of a small depth image (see `small_depth`) lie in a color image (2, h w).

    intrinsics: (3, 3) of that color image. Unknown depth counts as the median.
    """
    depth, depth_intrinsics = small_depth(frame, width)
    depth = np.where(depth > 0, depth, np.median(depth[depth > 0]))
    v, u = np.indices(depth.shape).reshape(2, -1)
    points = np.linalg.inv(depth_intrinsics) @ np.stack([u, v, np.ones_like(u)]) * depth.ravel()
    return project(intrinsics, move(depth_to_color(frame), points)[None])[0][0]


def move(motion, points):
    """Points (..., 3, n) moved by rigid matrices (..., 4, 4)."""
    return motion[..., :3, :3] @ points + motion[..., :3, 3:]


def pad(images, value):
    """Images of any sizes -> one array; the value fills up bottom and right."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    result = np.full((len(images), height, width), value, np.float32)
    for place, image in zip(result, images):
        place[:image.shape[0], :image.shape[1]] = image
    return result


def make_views(runs, width=320):
    """Runs of frames -> Views of all of them, and pairs (P, 2) of places within a run.

    A frame's "position" in its source, if it has one, tells which frame follows in time.
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
                  np.array([frame["world2cam"] for frame in frames]),
                  np.array([depth_to_color(frame) for frame in frames]), following)
    return views, np.array(pairs, np.int64).reshape(-1, 2)


# ----------------------------------------------------------------------------------------------- pairs


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


def look_up(depth, b, uv, radius=0):
    """Depth of frames b at pixels (P, 2, n) -> (P, n), 0 = unknown or outside; radius > 0: also a list of
    the same for pixels around.
    """
    height, width = depth.shape[1:]
    x, y = np.rint(uv).astype(np.int64).transpose(1, 0, 2)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x * inside, y * inside
    flat = depth.reshape(-1)
    first = b[:, None] * (height * width)
    seen = np.where(inside, flat[first + y * width + x], 0)
    around = []
    for dx, dy in itertools.product((-radius, 0, radius), repeat=2) if radius else ():
        row = np.clip(y + dy, 0, height - 1)
        column = np.clip(x + dx, 0, width - 1)
        around.append(flat[first + row * width + column])
    return seen, around


def correlation_cost(x, y, use):
    """log(1 - correlation) of two arrays (P, n) over `use`; 0 if there is nothing to correlate."""
    count = use.sum(1)
    divisor = np.maximum(count, 1)[:, None]
    x, y = np.where(use, x, 0), np.where(use, y, 0)
    x = np.where(use, x - x.sum(1, keepdims=True) / divisor, 0)
    y = np.where(use, y - y.sum(1, keepdims=True) / divisor, 0)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    known = (count >= 30) & (scale > 0)
    r = (x * y).sum(1) / np.where(known, scale, 1)
    return np.where(known, np.log(np.clip(1 - r, 0.005, 1)), 0)


class Fit(NamedTuple):
    """Arrays (P,) over pairs of frames; NaN if a pair is not to be compared."""
    overlap: np.ndarray  # share of a's points that fall on known depth of b
    confirmed: np.ndarray  # number of points that b confirms
    contradicted: np.ndarray  # number of points that b looks through
    costs: np.ndarray  # (2, P) of depth and of color

    def share(self, use=True):
        """Share of confirmed points among those that are confirmed or contradicted; 0 without overlap."""
        use = use & (self.overlap >= OVERLAP)
        confirmed = self.confirmed[use].sum()
        return confirmed / max(confirmed + self.contradicted[use].sum(), 1)

    def cost(self):
        """Mean cost of the pairs that overlap; 0 without any."""
        use = self.overlap >= OVERLAP
        return self.costs[:, use].sum() / max(use.sum(), 1)


def fit(views, pairs, num_points=300, radius=0.0125, tolerance=0.05):
    """Moves about num_points depth pixels of the first frame of every pair into the second -> Fit.

    A point is confirmed if it is within max(tolerance, 2 %) of a depth at most `radius` image widths
    away: that forgives edges and jitter of the poses. tolerance: meters.
    """
    a, b = pairs.T
    height, width = views.depth.shape[1:]
    step = max(1, int(np.sqrt(height * width / num_points)))
    v, u = np.mgrid[step // 2:height:step, step // 2:width:step].reshape(2, -1)
    z = views.depth[a[:, None], v, u]
    rays = np.linalg.inv(views.depth_intrinsics) @ np.stack([u, v, np.ones_like(u)])
    points = rays[a] * z[:, None]  # (P, 3, n)
    motion = views.world2cam[b] @ np.linalg.inv(views.world2cam[a])
    points = move(views.depth_to_color[a], points)  # in the color camera of a
    moved = move(motion, points)
    color_to_depth = np.linalg.inv(views.depth_to_color)
    uv, predicted = project(views.depth_intrinsics[b], move(color_to_depth[b], moved))
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
    use &= np.isfinite(gray_a) & np.isfinite(gray_b) & (predicted < 1.1 * seen)
    color_cost = np.where(enough, correlation_cost(gray_a, gray_b, use), 0)
    known = np.where(np.isfinite(motion).all((1, 2)), 1, np.nan)
    return Fit(overlap * enough * known, confirmed.sum(1) * known, contradicted.sum(1) * known,
               np.stack([depth_cost, color_cost]) * known)


# ---------------------------------------------------------------------------------------- alternatives


def turn_images(views, k, fields):
    """Views whose images are turned k times by 90 degrees counterclockwise."""
    return views._replace(**{field: np.rot90(getattr(views, field), k, (1, 2)) for field in fields})


def change_poses(views, change):
    """Views whose camera-to-world matrices (F, 4, 4), a copy, went through `change`."""
    return views._replace(world2cam=np.linalg.inv(change(np.linalg.inv(views.world2cam))))


def transpose_rotation(poses):
    """Camera-to-world matrices with transposed rotations."""
    poses[:, :3, :3] = poses[:, :3, :3].swapaxes(1, 2).copy()
    return poses


def move_origin(poses):
    """Camera-to-world matrices whose last column is the one of the inverse matrix."""
    poses[:, :3, 3:] = -poses[:, :3, :3] @ poses[:, :3, 3:]
    return poses


def to_quaternion(rotation):
    """Rotation (3, 3) -> quaternion (x, y, z, w): an eigenvector (Bar-Itzhack 2000)."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    lower = [[a - e - i, 0, 0, 0], [d + b, e - a - i, 0, 0], [g + c, h + f, i - a - e, 0],
             [h - f, c - g, d - b, a + e + i]]
    return np.linalg.eigh(lower)[1][:, -1]


def to_rotation(quaternion):
    """Quaternion (x, y, z, w) -> rotation (3, 3)."""
    x, y, z, w = quaternion
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def reorder(matrices, order):
    """Rigid matrices (F, 4, 4), a copy, whose quaternions are read in another order."""
    for matrix in matrices:
        matrix[:3, :3] = to_rotation(to_quaternion(matrix[:3, :3])[list(order)])
    return matrices


def axis_changes():
    """All 47 changes of axes (3, 3) but the identity."""
    signs = itertools.product((1, -1), repeat=3)
    both = itertools.product(itertools.permutations(range(3)), signs)
    changes = [np.eye(3)[list(order)] * np.array(sign)[:, None] for order, sign in both]
    return changes[1:]


def name_axes(matrix, upright):
    """A change of axes (3, 3) -> fault and words."""
    axes = ["-" * bool(row.min() < 0) + "xyz"[np.abs(row).argmax()] for row in matrix]
    words = f"camera axes {', '.join(axes)} for x, y, z"
    if np.linalg.det(matrix) < 0:
        return "mirrored", words
    if axes == ["x", "-y", "-z"]:
        return "OpenGL axes", words
    return "images turned" if upright and axes[2] == "z" else "camera axes", words


def neighboring(views, fields, offset):
    """Views with some fields of the next (1) or previous (-1) frame."""
    source = views.following
    if offset < 0:
        later = np.flatnonzero(source >= 0)
        source = np.full(len(source), -1)
        source[views.following[later]] = later
    views = views._replace(**{field: getattr(views, field)[source] for field in fields})
    return views._replace(world2cam=np.where((source < 0)[:, None, None], np.nan, views.world2cam))


def scale_motion(views, log_factor):
    """Views whose translations are multiplied by exp(log_factor)."""
    world2cam = views.world2cam.copy()
    world2cam[:, :3, 3] *= np.exp(log_factor)
    return views._replace(world2cam=world2cam)


def scale_focal(views, log_factor, fields):
    """Views whose focal lengths are multiplied by exp(log_factor)."""
    zoom = np.diag(np.exp([log_factor, log_factor, 0])) + (1 - np.eye(3))
    return views._replace(**{field: getattr(views, field) * zoom for field in fields})


def shift_center(views, offset):
    """Views whose principal points are moved by offset (2,), in units of the image's size."""
    changed = {}
    for field, image in zip(BOTH, (views.depth, views.gray)):
        changed[field] = getattr(views, field).copy()
        changed[field][:, :2, 2] += offset * np.array(image.shape[:0:-1])
    return views._replace(**changed)


def fit_to_images(views, fields):
    """Views whose intrinsics are rescaled so that principal points are in the middle of the images."""
    changed = {}
    for field in fields:
        image = views.depth if field == "depth_intrinsics" else views.gray
        old = getattr(views, field)
        factors = np.array(image.shape[:0:-1]) / (2 * old[:, :2, 2] + 1)
        changed[field] = np.stack([scale_intrinsics(one, *factor) for one, factor in zip(old, factors)])
    return views._replace(**changed)


def alternatives(views, upright=True):
    """Yields (fault, words, Views). upright: whether the cameras stand upright in the world as given."""
    yield "pose inverted", "the inverse matrices", change_poses(views, np.linalg.inv)
    yield "pose half inverted", "transposed rotations", change_poses(views, transpose_rotation)
    yield "pose half inverted", "the camera's place -R t in place of t", change_poses(views, move_origin)
    for order, words in (((3, 0, 1, 2), "x y z w"), ((1, 2, 3, 0), "w x y z")):
        words = f"quaternions that are stored as {words}"
        yield "quaternion order", words, change_poses(views, lambda poses: reorder(poses, order))
        world2cam = reorder(views.world2cam.copy(), order)
        yield "quaternion order", f"{words}, world to camera", views._replace(world2cam=world2cam)
    for matrix in axis_changes():
        world2cam = views.world2cam.copy()
        world2cam[:, :3] = matrix @ world2cam[:, :3]
        yield *name_axes(matrix, upright), views._replace(world2cam=world2cam)
    for k in (1, 2, 3):
        words = f"images turned by {90 * k} degrees counterclockwise"
        yield "images turned", words, turn_images(views, k, ["depth", "gray"])
        yield "color images turned", f"color {words}", turn_images(views, k, ["gray"])
    mirrored = views._replace(gray=views.gray[..., ::-1])
    yield "color images mirrored", "color images flipped left to right", mirrored
    for fault, fields in (("color intrinsics", BOTH[1:]), ("depth intrinsics", BOTH[:1]),
                          ("intrinsics of both", BOTH)):
        yield fault, "intrinsics that are rescaled to the images", fit_to_images(views, fields)
    for fault, what, fields in (
            ("poses off by one frame", "pose", ["world2cam"]),
            ("depth and color shifted in time", "depth", ["depth", "depth_intrinsics"]),
            ("depth and color shifted in time", "color", ["gray", "intrinsics"])):
        yield fault, f"the {what} of the next frame", neighboring(views, fields, 1)
        yield fault, f"the {what} of the previous frame", neighboring(views, fields, -1)


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


class Judge:
    """Weighs alternatives to `views` over pairs (P, 2). num_points: see `fit`."""

    def __init__(self, views, pairs, num_points=300):
        self.views = views
        self.pairs = pairs
        self.num_points = num_points
        self.median_depth = np.median(views.depth[views.depth > 0])
        self.tolerance = min(0.05, 0.02 * self.median_depth)
        self.given = fit(views, pairs, num_points)
        still = np.broadcast_to(np.eye(4), views.world2cam.shape)
        self.still = fit(views._replace(world2cam=still), pairs, num_points, tolerance=self.tolerance)

    def overlapping(self):
        """Number of pairs that overlap with the cameras as given."""
        return int((self.given.overlap >= OVERLAP).sum())

    def share_of(self, place):
        """Share of confirmed points in the pairs of one frame; 1 without any."""
        own = (self.pairs == place).any(1) & (self.given.overlap >= OVERLAP)
        return self.given.share(own) if own.any() else 1

    def weigh(self, fault, words, views, x=None):
        """-> Weighed."""
        given = self.given
        other = fit(views, self.pairs, self.num_points, radius=0)
        own = other.overlap >= OVERLAP
        either = own | (given.overlap >= OVERLAP) & np.isfinite(other.overlap)
        if either.sum() < MIN_PAIRS:
            return Weighed(fault, words, x)
        gains = given.costs - other.costs  # (2, P)
        total = gains[:, either].sum(0)
        gain = total.mean()
        if gain < MARGIN or own.sum() < MIN_PAIRS:
            return Weighed(fault, words, x, gain, worse=gain < -0.05)

        gains = gains[:, own]
        means = gains.mean(1)
        changed = np.abs(gains).max(1) > 1e-9  # not the depth if only colors change
        spread = other.costs[changed][:, own].sum(0).std()
        moves = (self.still.costs - other.costs)[:, own].sum(0).mean() > MARGIN
        share = fit(views, self.pairs, self.num_points, tolerance=self.tolerance).share(own)
        helps = moves and means.min() > -0.05 and share > given.share() - 0.02
        steady = total.clip(min=0).sum() > -3 * total.clip(max=0).sum()
        fits = helps and steady and share >= CLEAN and means.sum() > 1.2 * spread
        helps = helps and means.sum() > max(HINT, 0.7 * gains.sum(0).std())
        return Weighed(fault, words, x, gain, share, fits, helps)

    def search(self, fault, words, change, starts, step):
        """The best value of a continuous alternative, from `starts` by steps that halve -> Weighed."""
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

    def weigh_scale(self, log_factor):
        """Translations times exp(log_factor) -> Weighed."""
        return self.weigh("units", "", scale_motion(self.views, log_factor), log_factor)

    def search_all(self):
        """Factors of the translations and of the focal lengths, and offsets of the principal points."""
        logs = 0.35 * np.arange(1, 27)
        scale = self.search("units", lambda x: "", scale_motion, [*-logs, *logs], 0.17)
        shrinks = scale.gain > MARGIN and scale.x < 0
        if shrinks and scale.gain < self.weigh_scale(-20).gain + 0.3:  # so would no translation at all
            scale = scale._replace(fits=False, helps=False)
        yield scale
        logs = (0.1, -0.1, 0.2, -0.2, 0.35, -0.35, 0.5, -0.5)
        for fields, what in ((BOTH, "both images"), (BOTH[:1], "depth"), (BOTH[1:], "color")):
            yield self.search("focal length", lambda x: f"focal lengths of {what} times {np.exp(x):.3g}",
                              lambda views, x: scale_focal(views, x, fields), logs, 0.08)
        grid = itertools.product((0, -0.1, 0.1, -0.2, 0.2), repeat=2)
        yield self.search("cropped images", lambda x: "principal points moved to the right by "
                          f"{100 * x[0]:.1f} % of the width and down by {100 * x[1]:.1f} % of the height",
                          shift_center, [np.array(offset) for offset in grid if any(offset)], 0.05)

    def weigh_all(self, upright=True):
        """All alternatives -> list of Weighed, the one to prefer first if two explain equally much.

        upright: whether the cameras stand upright in the world as given. Then it is the images that are
        turned, and not the axes of the cameras.
        """
        tried = [self.weigh(*one) for one in alternatives(self.views, upright)]
        late = ["images turned"] * (not upright) + ["mirrored"]
        return sorted([*tried, *self.search_all()], key=lambda one: one.fault in late)
