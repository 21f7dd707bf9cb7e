# SPDX-License-Identifier: MIT
"""Posed RGB-D frames that are right, and the same with a planted fault: what `check.py` is measured on.

Imports numpy, and of this repository data, sources.rooms and support.reprojection.
"""
import numpy as np

from data import crop_intrinsics, resize_intrinsics
from sources.rooms import CLASSES, draw_camera, look_at, make_room, render
from support.reprojection import reorder

SIZE = (120, 160)
CAMERA = np.array([[141.0, 0, 81], [0, 141, 58], [0, 0, 1]])  # a scene's files hold one
QUARTER_TURN = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])  # z-up world -> y-up
TILT = np.array([[1, 0, 0, 0], [0, 0.9, -0.436, 0], [0, 0.436, 0.9, 0], [0, 0, 0, 1.0]])  # by 26 degrees
CAMERA_FIELDS = ("intrinsics", "depth_intrinsics")
IMAGES = ("color", "depth", "label", "instance")


class Frames(list):
    """A source in memory."""

    def __init__(self, frames, class_names=tuple(CLASSES)):
        super().__init__(frames)
        self.class_names = list(class_names)

    def edited(self, **fields):
        """A copy with some fields replaced by functions of the frame."""
        frames = [{**frame, **{key: change(frame) for key, change in fields.items()}} for frame in self]
        return Frames(frames, self.class_names)

    def without_labels(self):
        return self.edited(label=lambda frame: None, instance=lambda frame: None)

    def with_poses(self, change):
        """A copy whose stored camera-to-world matrices went through `change`."""
        return self.edited(world2cam=lambda frame: np.linalg.inv(change(np.linalg.inv(frame["world2cam"]))))

    def with_depth(self, change):
        """A copy whose known depth went through `change`, a function of depth and frame."""
        def edit(frame):
            depth = np.where(frame["depth"] > 0, change(frame["depth"], frame), 0)
            return depth.astype(np.float32)
        return self.edited(depth=edit)

    def with_intrinsics(self, change, fields=CAMERA_FIELDS):
        """A copy whose intrinsics went through `change`."""
        return self.edited(**{field: lambda frame, field=field: change(frame[field]) for field in fields})

    def with_images(self, change, images=IMAGES):
        """A copy whose images went through `change`."""
        return self.edited(**{key: lambda frame, key=key: change(frame[key]).copy() for key in images})

    def with_next(self, *keys):
        """A copy whose frames have some fields of the next frame of their scene."""
        pairs = [(a, b) for a, b in zip(self, self[1:]) if scene_of(a) == scene_of(b)]
        return Frames([{**a, **{key: b[key] for key in keys}} for a, b in pairs], self.class_names)


def scene_of(frame):
    return frame["name"].split("/")[0]


# ------------------------------------------------------------------------------------------ clean frames


def make_rooms(seed=0, num_rooms=2, frames_per_room=6, size=SIZE):
    """Rooms that are seen from all sides."""
    frames = []
    for room in range(num_rooms):
        rng = np.random.default_rng([seed, room])
        scene = make_room([0, room, 8, seed])
        for number in range(frames_per_room):
            world2cam = draw_camera(scene, rng)
            frame = render(scene, world2cam, CAMERA, size, rng)
            frames.append({**frame, "name": f"room{room}/{number}", "world2cam": world2cam,
                           "intrinsics": CAMERA, "depth_intrinsics": CAMERA})
    return Frames(frames)


def make_video(count=7, seed=1, offset=np.eye(4), speed=1.0):
    """A camera that walks through a room; offset: from the depth camera to the color camera."""
    rng = np.random.default_rng(seed)
    scene = make_room([0, 0, 7, seed])
    start = draw_camera(scene, rng)
    eye = -start[:3, :3].T @ start[:3, 3]
    yaw, pitch = np.arctan2(start[2, 1], start[2, 0]), -0.35
    velocity, spin = rng.normal(0, 0.06, 3), rng.choice([-0.06, 0.06])
    frames = []
    for i in range(count):
        velocity = 0.6 * velocity + rng.normal(0, 0.03, 3)
        spin = 0.9 * spin + rng.normal(0, 0.02)
        eye, yaw, pitch = eye + speed * velocity, yaw + speed * spin, pitch + speed * rng.normal(0, 0.015)
        forward = [np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)]
        world2cam = look_at(eye, eye + forward, 0.03 * np.sin(speed * i))
        frame = render(scene, world2cam, CAMERA, SIZE, rng)
        if not np.array_equal(offset, np.eye(4)):
            frame["depth"] = render(scene, np.linalg.inv(offset) @ world2cam, CAMERA, SIZE, rng)["depth"]
        frames.append({**frame, "name": f"video/{i}", "world2cam": world2cam, "intrinsics": CAMERA,
                       "depth_intrinsics": CAMERA})
    return Frames(frames)


def with_noise(share, seed=0, meters=0.0):
    """Noise in the depth: a share of it, and meters."""
    def plant(frames):
        rng = np.random.default_rng(seed)
        return frames.with_depth(lambda depth, frame: depth + (share * depth + meters)
                                 * rng.standard_normal(depth.shape))
    return plant


def with_jitter(meters, degrees, seed):
    """Noise in the poses."""
    def plant(frames):
        rng = np.random.default_rng(seed)

        def move(pose):
            u, _, v = np.linalg.svd(np.eye(3) + np.cross(np.eye(3), rng.normal(0, np.radians(degrees), 3)))
            noise = np.eye(4)
            noise[:3, :3] = u @ v
            noise[:3, 3] = rng.normal(0, meters, 3)
            return pose @ noise
        return frames.with_poses(move)
    return plant


def decimate(frames):
    """Depth images of a third of the size."""
    small = np.array([[1 / 3, 0, -1 / 3], [0, 1 / 3, -1 / 3], [0, 0, 1]])
    thirds = frames.with_images(lambda image: image[1::3, 1::3], ["depth"])
    return thirds.with_intrinsics(lambda matrix: small @ matrix, ["depth_intrinsics"])


def crop_with_intrinsics(frames):
    """Images without their left third, and the intrinsics of what is left."""
    columns = frames[0]["depth"].shape[1] // 3
    cropped = frames.with_images(lambda image: image[:, columns:])
    return cropped.with_intrinsics(lambda matrix: crop_intrinsics(matrix, 0, columns))


def every(keep):
    """Frames whose number in the set `keep` wants."""
    return lambda frames: Frames([x for i, x in enumerate(frames) if keep(i)], frames.class_names)


def renamed(name):
    """Frames with another name, a function of theirs."""
    return lambda frames: frames.edited(name=lambda frame: name(*frame["name"].split("/")))


def with_holes(value):
    """Every second row and column of depth is unknown."""
    return lambda frames: frames.edited(depth=lambda frame: np.where(
        np.indices(frame["depth"].shape).prod(0) % 2, frame["depth"], value).astype(np.float32))


CLEAN = {
    "as they are": lambda frames: frames,
    **{f"noise of 1 %, seed {seed}": with_noise(0.01, seed) for seed in range(3)},
    "noise of 2 cm": with_noise(0, meters=0.02),
    "every fifth frame left out": every(lambda i: i % 5),
    "every second frame": every(lambda i: i % 2 == 0),
    "every third frame": every(lambda i: i % 3 == 0),
    "backward": renamed(lambda scene, stem: f"{scene}/{999 - int(stem)}"),
    "small depth images": decimate,
    "nothing beyond 3 m": lambda frames: frames.with_depth(lambda depth, frame: np.where(depth > 3, 0, depth)),
    "one frame per scene": renamed(lambda scene, stem: f"{scene}-{stem}/0"),
    "cropped with their intrinsics": crop_with_intrinsics,
    "holes of 0": with_holes(0),
}
JITTER = {f"{words}, seed {seed}": with_jitter(meters, degrees, seed)
          for words, meters, degrees in (("5 mm and 0.1 degrees", 0.005, 0.1), ("2 cm and 0.5 degrees", 0.02, 0.5))
          for seed in range(2)}


# ---------------------------------------------------------------------------------------------- faults


def axes(*signs):
    return np.diag([*signs, 1.0])


def scaled(factor):
    """Translations of poses times a factor."""
    return lambda pose: np.block([[pose[:3, :3], factor * pose[:3, 3:]], [pose[3:]]])


def ray_length(frame):
    """Length of the rays (u, v, 1) of depth pixels, (H, W)."""
    v, u = np.indices(frame["depth"].shape)
    rays = np.linalg.inv(frame["depth_intrinsics"]) @ np.stack([u, v, np.ones_like(u)]).reshape(3, -1)
    return np.linalg.norm(rays, axis=0).reshape(u.shape)


def stretched(top, levels):
    """Depth between an image's smallest and largest -> 0 .. top, in so many levels."""
    def change(depth, frame):
        known = depth[depth > 0]
        share = (depth - known.min()) / np.ptp(known)
        return np.round(share * levels) / levels * top
    return change


def filled(share, value):
    """The farthest pixels, a share of all, hold a value."""
    return lambda depth, frame: np.where(depth > np.quantile(depth, 1 - share), value, depth)


def clamped(frames):
    """No depth beyond that of 70 % of the pixels of all images."""
    top = np.quantile([frame["depth"] for frame in frames], 0.7).round(1)
    return frames.with_depth(lambda depth, frame: np.minimum(depth, top))


def cropped(left, top, right=0.0, bottom=0.0):
    """Images without margins, in shares of their size."""
    def change(image):
        height, width = image.shape[:2]
        rows = slice(int(top * height), height - int(bottom * height))
        return image[rows, int(left * width):width - int(right * width)]
    return change


def zoomed(factor):
    """Intrinsics of another focal length."""
    return lambda intrinsics: intrinsics * [[factor, 1, 1], [1, factor, 1], [1, 1, 1]]


def resized(factor):
    """Intrinsics of images of another size."""
    return lambda intrinsics: resize_intrinsics(intrinsics, (1, 1), (factor, factor))


def mixed_up(order):
    """Rotations whose quaternions were stored in another order than they are read in."""
    return lambda pose: reorder(pose[None].copy(), order)[0]


def of_poses(change):
    return lambda frames: frames.with_poses(change)


def of_depth(change):
    return lambda frames: frames.with_depth(change)


def of_intrinsics(change, *fields):
    return lambda frames: frames.with_intrinsics(change, fields or CAMERA_FIELDS)


def of_images(change, *images):
    return lambda frames: frames.with_images(change, images or IMAGES)


def with_poses_of(place):
    """Frame i has the pose of frame place(i, number of frames)."""
    return lambda frames: Frames([{**frame, "world2cam": frames[place(i, len(frames))]["world2cam"]}
                                  for i, frame in enumerate(frames)], frames.class_names)


def every_second(plant):
    """A fault in every second frame only."""
    return lambda frames: Frames([b if i % 2 else a for i, (a, b) in enumerate(zip(frames, plant(frames)))],
                                 frames.class_names)


def in_first_scene(plant):
    """A fault in the first scene only."""
    return lambda frames: Frames([b if scene_of(a) == scene_of(frames[0]) else a
                                  for a, b in zip(frames, plant(frames))], frames.class_names)


FAULTS = [  # fault, what is in its words (text, or text and a number), and how it is planted
    ("pose inverted", "inverse", of_poses(np.linalg.inv)),
    ("pose half inverted", "transposed", of_poses(
        lambda pose: np.block([[pose[:3, :3].T, pose[:3, 3:]], [pose[3:]]]))),
    ("pose half inverted", "-R t", of_poses(
        lambda pose: np.block([[pose[:3, :3], np.linalg.inv(pose)[:3, 3:]], [pose[3:]]]))),
    ("OpenGL axes", "x, -y, -z", of_poses(lambda pose: pose @ axes(1, -1, -1))),
    ("camera axes", "-x, y, -z", of_poses(lambda pose: pose @ axes(-1, 1, -1))),
    ("camera axes", "-x, -y, z", of_poses(lambda pose: pose @ axes(-1, -1, 1))),
    ("camera axes", "-y, -z, x", of_poses(
        lambda pose: pose[:, [2, 0, 1, 3]] * [-1, 1, -1, 1] @ axes(-1, -1, 1))),
    ("mirrored", "x, -y, z", of_poses(lambda pose: pose @ axes(1, -1, 1))),
    ("mirrored", "", of_poses(lambda pose: axes(1, -1, 1) @ pose)),
    ("mirrored", "x, -y, z", of_poses(lambda pose: axes(1, -1, 1) @ pose @ axes(1, -1, 1))),
    ("quaternion order", "x y z w", of_poses(mixed_up((1, 2, 3, 0)))),
    ("quaternion order", "w x y z", of_poses(mixed_up((3, 0, 1, 2)))),
    ("units of poses", "millimeters", of_poses(scaled(1000))),
    ("units of poses", "centimeters", of_poses(scaled(100))),
    ("units of depth", "TUM", of_depth(lambda depth, frame: 5 * depth)),
    ("units of depth", "6553.5", of_depth(lambda depth, frame: 6.5535 * depth)),
    ("units of depth", "100 units", of_depth(lambda depth, frame: 0.1 * depth)),
    ("units of depth", "0.002 m", of_depth(lambda depth, frame: 0.001 * depth)),
    ("units", ("translations times", 2.7), of_poses(scaled(1 / 2.7))),
    ("units", ("translations times", 0.34), of_poses(scaled(1 / 0.34))),
    ("units", ("translations times", 1 / 1.37), of_poses(scaled(1.37))),
    ("depth along the ray", "", of_depth(lambda depth, frame: depth * ray_length(frame))),
    ("inverse depth", "", of_depth(lambda depth, frame: 1 / np.maximum(depth, 0.01))),
    ("far plane", "65.534 m", of_depth(filled(0.04, 65.534))),
    ("far plane", "10 m", of_depth(filled(0.1, 10))),
    ("far plane", "0.25 m", of_depth(filled(0.05, 0.25))),
    ("far plane", "in many pixels", clamped),
    ("normalized depth", "65.534 m", of_depth(stretched(65.534, 65534))),
    ("normalized depth", "0.255 m", of_depth(stretched(0.255, 255))),
    ("normalized depth", "same in all", of_depth(lambda depth, frame: depth / depth.max() * 8)),
    ("8-bit depth", "", of_depth(
        lambda depth, frame: 0.001 * ((1000 * depth).astype(np.uint32) >> 5).astype(np.uint8))),
    ("no depth", "", of_depth(lambda depth, frame: 0 * depth)),
    ("color intrinsics", "of 326", of_intrinsics(resized(2), "intrinsics")),
    ("depth intrinsics", "", of_intrinsics(resized(0.5), "depth_intrinsics")),
    ("intrinsics of both", "", of_intrinsics(resized(2.1))),
    ("focal length", ("both images times", 0.8), of_intrinsics(zoomed(1.25))),
    ("focal length", ("depth times", 1.25), of_intrinsics(zoomed(0.8), "depth_intrinsics")),
    ("cropped images", "", of_images(cropped(0.15, 0.1))),
    ("cropped images", "", of_images(cropped(0.12, 0.12, 0.12, 0.12))),
    ("images turned", "by 270 degrees", of_images(np.rot90)),
    ("images turned", "by 90 degrees", of_images(lambda image: np.rot90(image, 3))),
    ("images turned", "", of_images(lambda image: np.rot90(image, 2))),
    ("mirrored", "", of_images(np.fliplr)),
    ("color images turned", "by 270 degrees", of_images(np.rot90, "color")),
    ("color images turned", "by 180 degrees", of_images(lambda image: image[::-1, ::-1], "color")),
    ("color images mirrored", "", of_images(np.fliplr, "color")),
    ("colors", "black", of_images(lambda image: image >> 6, "color")),
    ("colors", "white", of_images(lambda image: image | 255, "color")),
    ("poses off by one frame", "previous", lambda frames: frames.with_next("world2cam")),
    ("depth and color shifted in time", "depth of the previous", lambda frames: frames.with_next("depth")),
    ("depth and color shifted in time", "color of the previous", lambda frames: frames.with_next("color")),
    ("equal poses", "", lambda frames: frames.edited(world2cam=lambda frame: frames[0]["world2cam"])),
    ("refused", "subtract an offset", of_poses(lambda pose: pose + [[0, 0, 0, 5e5], [0, 0, 0, 4e6], [0] * 4, [0] * 4])),
    ("refused", "transposed", lambda frames: frames.edited(world2cam=lambda frame: frame["world2cam"].T)),
    ("up axis", "--up=y", of_poses(lambda pose: QUARTER_TURN @ pose)),
    ("up axis", "--up=-y", of_poses(lambda pose: QUARTER_TURN.T @ pose)),
    ("up axis", "26 degrees", of_poses(lambda pose: TILT @ pose)),
    ("units", ("translations times", 1.12), of_poses(scaled(1 / 1.12))),
    ("far plane", "8 m", of_depth(filled(0.015, 8))),
    ("unconfirmed", "No known cause fits", with_poses_of(lambda i, count: 4 * i % count)),
    ("unconfirmed", "No known cause fits", with_poses_of(lambda i, count: count - 1 - i)),
    ("unconfirmed", "No known cause fits", with_poses_of(lambda i, count: (i + 3) % count)),
    ("unconfirmed", "No known cause fits", every_second(of_poses(np.linalg.inv))),
    ("unconfirmed", "No known cause fits", of_poses(
        lambda pose: np.linalg.inv(scaled(3.3)(pose)) @ axes(-1, 1, -1))),
]
