# SPDX-License-Identifier: MIT
"""What a command needs of its process: signals, loader workers, device settings, errors of one line.

    if __name__ == "__main__":
        run_command(main)

Imports numpy, torch and tqdm.
"""
import argparse
import ctypes
import errno
import math
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

WORKER_TIMEOUT = 600  # seconds without a batch after which a run ends
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class StopRequest:
    """A request to stop, made by a signal.

    Until `armed` is set, a signal raises SystemExit, which ends the program and removes its temporary
    files. Afterwards the first one is only remembered in `signum`, for the training loop to save and
    leave, and the second one ends the process at once. The exit status is 128 + the number of the
    signal.
    """

    def __init__(self):
        self.signum = 0
        self.armed = False

    def install(self):
        """Begins to listen, but not to signals that are ignored, as nohup does -> itself."""
        for name in STOP_SIGNALS:
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.receive)
        return self

    def receive(self, signum, frame):
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum
        if not self.armed:
            raise SystemExit(128 + signum)


def init_worker(worker_id):
    """worker_init_fn of a DataLoader: a worker ends with its process, and not by a signal to stop.

    Schedulers and terminals signal every process of a job, and without workers the training could not
    finish its step. On Linux a worker is killed when its process ends, however that ends: with a full
    pipe it would otherwise wait forever for somebody to read it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != multiprocessing.parent_process().pid:  # it ended before that was set
            os._exit(1)
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(error, item):
    """Ends a worker that cannot send a batch; its process would wait for it until the timeout."""
    if "No space left" in str(error):
        signal.raise_signal(signal.SIGBUS)  # as memory that is mapped and then lacks
    print(f"{error} ({advice_for(error) or 'it could not be sent'})", file=sys.stderr, flush=True)
    os._exit(1)


def loader_options(workers):
    """Keyword arguments of every DataLoader: its processes, how they end, how long a batch may take."""
    return dict(num_workers=workers, worker_init_fn=init_worker, timeout=WORKER_TIMEOUT if workers else 0,
                generator=torch.Generator())  # a separate one leaves the global one untouched


def kill_workers():
    """Ends workers of loaders that an error has left behind."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader raises for every one that is killed
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------- device


def configure_device(device, deterministic=False):
    """Settings of this process that suit a torch.device; call it before the first tensor is made there.

    deterministic: a run on a GPU gives the same numbers every time, as on a CPU, if torch has such
    kernels; it warns if not. Sums then take sorted instead of atomic additions, which is slower.
    """
    if device.type != "cuda":
        keep_buffers()
        return
    # Products of float32 round their factors to TF32. The image tower turns that off, because a cache
    # stores its features.
    torch.set_float32_matmul_precision("high")
    # Sums of half-precision products stay in float32, also between the parts into which a long product
    # is split.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # cuDNN's attention plans anew for each shape; the numbers of queries and superpoints are new in
    # each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without a fixed workspace, cuBLAS varies
        torch.use_deterministic_algorithms(True, warn_only=True)


def busy_cores(seconds=0.5):
    """How many of the machine's cores are at work meanwhile; without Linux, its load average."""
    if not os.path.exists("/proc/stat"):
        return os.getloadavg()[0]

    def jiffies():
        with open("/proc/stat") as file:
            user, nice, system, idle, wait, *_ = map(int, file.readline().split()[1:])
        return user + nice + system, idle + wait

    busy_before, idle_before = jiffies()
    time.sleep(seconds)
    busy, idle = jiffies()
    total = busy + idle - busy_before - idle_before
    return (busy - busy_before) / max(total, 1) * os.cpu_count()


def num_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def choose_threads(workers=0, before=None):
    """Sets how many threads torch computes with on a CPU -> a line about it; OMP_NUM_THREADS overrules.

    A pool whose threads wait for cores that others use is many times slower than fewer threads, so these
    are the cores that are free at the start, without one per loader on larger machines. before: the number
    of a run that is resumed, with which it stays bit-exact.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return f"CPU threads: {torch.get_num_threads()}, by OMP_NUM_THREADS"
    cores = num_cores()
    busy = busy_cores()
    free = cores - round(busy)
    if cores > 4:
        free -= workers
    torch.set_num_threads(before or max(1, free))
    reason = "as before" if before else f"{cores} cores, {busy:.1f} of them busy with other work"
    return f"CPU threads: {torch.get_num_threads()} ({reason}; OMP_NUM_THREADS overrules)"


def keep_buffers():
    """Makes glibc keep the memory of large buffers for the next ones; without glibc it does nothing.

    By default glibc hands them back to the system, which clears them page by page when they are asked
    for again: a sixth of a training step or of a prediction on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        if libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25):  # M_MMAP_THRESHOLD; old versions refuse above 2^25
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------------------- commands


class Console:
    """What a command says: lines, and warnings that nobody overlooks, said again at the end.

    main_process: the others say nothing. warnings: those of a checkpoint to go on from.
    """

    def __init__(self, main_process=True, warnings=()):
        self.main_process = main_process
        self.warnings = list(warnings)

    def print(self, text):
        if self.main_process:
            tqdm.write(text)

    def warn(self, text):
        self.warnings.append(text)
        self.print(f"\n{'!' * 100}\n{text}\n{'!' * 100}\n")

    def notes(self):
        """The warnings as lines."""
        return [f"note: {text}" for text in self.warnings]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose help shows defaults, and that has --debug (`run_command`)."""

    def __init__(self, prog, description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options):
        super().__init__(prog, description=description, formatter_class=formatter_class, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def keep_apart(self, option, out, data):
        """An error if the folder `out` of an option is or holds the path `data`; either may be None."""
        if out and data and Path(data).resolve().is_relative_to(Path(out).resolve()):
            self.error(f"{option} {out} is or holds {data}: nothing is written among data")

    def parse_args(self, args=None, namespace=None, defaults=()):
        """argparse's, which also refuses an empty text, as an unset variable of a script gives it.

        defaults: {name: value} of an earlier result, for options not given. They are checked like
        these; names that the parser does not know are ignored.
        """
        words = sys.argv[1:] if args is None else list(args)
        for option, word in zip(["", *words], words):
            if word == "" or word.startswith("--") and word.endswith("="):
                self.error(f"{word.rstrip('=') or option or 'an argument'} is empty")
        known = vars(super().parse_args([])).keys() & defaults if defaults else ()
        for name in known:
            value = defaults[name]
            text = re.sub(r"[][() ]|,\)", "", str(value))
            if value is not None and value is not False:
                words.insert(0, f"--{name.replace('_', '-')}" + f"={text}" * (value is not True))
        return super().parse_args(words, namespace)


def number_in(kind, low, high=math.inf, open_low=False):
    """An argparse type: a finite number of a kind in [low, high], or in (low, high]."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        inside = low < value <= high if open_low else low <= value <= high
        if not inside or not math.isfinite(value):
            limit = f"above {low}" if open_low else f"at least {low}"
            limit += "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be finite and {limit}, got {text}")
        return value
    return convert


positive_int = number_in(int, 1, 10 ** 9)
nonnegative_int = number_in(int, 0)
worker_count = number_in(int, 0, 256)
positive_float = number_in(float, 0.0, open_low=True)
nonnegative_float = number_in(float, 0.0)


def list_of(convert):
    """An argparse type: comma-separated values -> tuple."""
    def convert_list(text):
        try:
            return tuple(convert(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
    return convert_list


def mean_std(text):
    """An argparse type: six numbers "m,m,m,s,s,s" -> ((m, m, m), (s, s, s)); a tag stays as it is."""
    if "," not in text:
        return text
    numbers = list_of(float)(text)
    if len(numbers) != 6:
        raise argparse.ArgumentTypeError(f"expected 3 means and 3 standard deviations, or a tag, got {text!r}")
    return numbers[:3], numbers[3:]


def image_size(text):
    """An argparse type: "240,320" -> (240, 320)."""
    size = list_of(number_in(int, 1, 2048))(text)  # attention takes the fourth power of a side
    if len(size) != 2:
        raise argparse.ArgumentTypeError(f"expected height,width such as 240,320, got {text!r}")
    return size


def pinhole(text):
    """An argparse type: "fx,fy,cx,cy" in pixels -> intrinsics (3, 3)."""
    numbers = list_of(float)(text)
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(numbers[:2]) < 1:
        raise argparse.ArgumentTypeError(f"expected fx,fy,cx,cy in pixels, got {text!r}")
    fx, fy, cx, cy = numbers
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def add_capture_options(parser, formats, poses):
    """Options of all commands that read captures: how, if not as what lies there says."""
    add = parser.add_argument
    add("--format", choices=tuple(formats), help="of a capture; not given: what lies in the folder decides")
    add("--pose", choices=poses, help="of a capture: overrules direction and quaternion order")
    add("--depth-scale", type=positive_float, help="of a capture: units of depth per meter, if no file tells")
    add("--intrinsics", type=pinhole, metavar="FX,FY,CX,CY", help="of a capture: pixels, of color, if no file tells")


def checked_by(check):
    """An argparse type: the text as it is, if check(text) raises no ValueError."""
    def convert(text):
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text
    return convert


def folder_that(fault, attempt):
    """An argparse type: the path of a folder, or of one to be made in it, for which attempt works."""
    def convert(text):
        existing = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
        try:
            attempt(existing)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{existing} {fault}: {error.strerror}") from None
        return text
    return convert


def png_file(text):
    """An argparse type: the path of a .png file in a folder that exists and can be written to."""
    path = Path(text)
    folder = path.absolute().parent
    if path.suffix != ".png" or path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError("expected the name of a .png file in a folder that exists and can be "
                                         f"written to, got {text!r}")
    return path


readable_folder = folder_that("is not a folder that can be read", os.listdir)
# permissions alone do not tell
writable_folder = folder_that("is not a folder that can be written to",
                              lambda folder: tempfile.TemporaryFile(dir=folder).close())

# what an error of torch or of the system says, and what helps
ADVICE = {
    "Too many open files": "raise the limit with `ulimit -n 65536`, or give fewer --workers",
    "out of memory": "give a smaller --batch-size, --num-points or --num-views",
    "can't allocate memory": "give a smaller --batch-size, --num-points or --num-views",
    "is killed by signal: Killed": "the system ended a data-loading process, probably for want of memory: give fewer "
                                   "--workers",
    "is killed by signal: Bus error": "shared memory (/dev/shm) is full: enlarge it, or give --workers 0",
    "shared memory": "shared memory (/dev/shm) is full: enlarge it, or give --workers 0",
    "exited unexpectedly": "a data-loading process ended: --workers 0 shows why",
    "DataLoader timed out": "reading a batch took too long: --workers 0 shows where it hangs",
    "received 0 items of ancdata": "too many files are open: raise the limit with `ulimit -n 65536`, or give fewer "
                                   "--workers"}

FULL = "the disk that is written to is full, or shared memory (/dev/shm): enlarge it, or give --workers 0"


def advice_for(error):
    """What helps against an error, or None if its cause is not known."""
    if isinstance(error, MemoryError):
        return ADVICE["out of memory"]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return FULL  # the error does not say what
    text = f"{error} {error.__cause__ or ''}"
    return next((advice for words, advice in ADVICE.items() if words in text), None)


def run_command(main):
    """Runs the `main` of a script and exits with the status that it returns, if that is an integer.

    What a user can fix is one line on stderr and exit status 2, a training that diverges status 1;
    --debug shows the traceback.
    """
    try:
        status = main()
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        advice = advice_for(error)
        is_expected = advice or isinstance(error, (ValueError, OSError, FloatingPointError))
        if "--debug" in sys.argv or not is_expected:
            raise
        text = str(error) or type(error).__name__
        if "Original Traceback" in text:  # of a worker; it ends with "type: message"
            text = text.strip().splitlines()[-1].partition(": ")[2]
        if advice:
            text = f"{text.strip().splitlines()[0]} ({advice})"
        sys.unraisablehook = lambda unraisable: None  # a loader that could not begin complains when it is deleted
        newline = "\n" if sys.stderr.isatty() else ""  # a progress bar may stand in this line
        print(f"{newline}{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from None
    finally:
        kill_workers()
    if isinstance(status, int):
        raise SystemExit(status)
