"""Series to volume: what reading costs, and who returns a wrong volume without a word.

    python tests/bench/ingest.py [--slices 200] [--repeats 7] [--data DIR] [--json FILE]

Speed: CPU seconds of one thread from a folder of 512 x 512 CT slices to a float32 volume, readers
in alternation, medians. The floor parses each header with pydicom (the same tags, no value looked
at), reads the pixel bytes and rescales them into a float32 volume: what no reader can do without.
All run with a heap that keeps its pages, or page faults would outweigh the work.

Correctness: each reader gets every hard series of ``phantoms.hard``. A volume where the series must
be refused, or one that differs from what was written, is a silent error, warnings or none. Others
are judged kindly: any order of axes and any direction of an axis will do, spacings are not looked
at, and who leaves a foreign file out has done right.
Patches: CPU time of one patch of 16 x 96 x 96 with its label, drawn around the foreground as often
as beside it, from six volumes of 64 x 512 x 512: ours from mapped arrays with secure randomness,
MONAI's CacheDataset with everything in memory and RandCropByPosNegLabeld, with and without its
indices of the foreground made beforehand. ``tests/client/test_patches.py`` shows it is one law.

With ``--data`` (or CONSILIA_DATA) also the real series: ours must give SimpleITK's voxels where it
accepts, and reach the verdicts known of them.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median
from time import thread_time

import numpy as np
import pydicom
from rich.console import Console
from rich.table import Table

from client.noise import secure
from client.patches import corner, cut, foreground_of
from shared_models.phantoms import bulk
from shared_models.phantoms.anatomy import Grid
from shared_models.phantoms.files import describe_series, write_series
from shared_models.phantoms.hard import Case, write_hard_cases
from shared_models.phantoms.profiles import HOSPITALS, VENDORS
from shared_models.phantoms.seeds import make_generator
from shared_models.series import SeriesRefused, read, read_files, scan, verdict
from shared_models.slices import READ

Reader = Callable[[Path], np.ndarray]
FOREIGN = ("empty-file", "foreign-file")
HEAP = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}
SIZE, PATCH = 512, (16, 96, 96)
DATA = Path(os.environ["CONSILIA_DATA"]) if "CONSILIA_DATA" in os.environ else None


def ours(folder: Path) -> np.ndarray:
    return read_files(sorted(folder.iterdir())).data


def headers(folder: Path) -> list[tuple[Path, int]]:
    """Parse every header as ours does, and look at nothing but where the pixels begin."""
    found = []
    for file in folder.iterdir():
        with file.open("rb") as stream:
            pydicom.dcmread(stream, specific_tags=READ, stop_before_pixels=True)
            found.append((file, stream.tell() + 12))
    return found


def floor(folder: Path) -> np.ndarray:
    """Headers and bytes; the slices come in no order."""
    found, scratch = headers(folder), np.empty((SIZE, SIZE), "<u2")
    volume = np.empty((len(found), SIZE, SIZE), np.float32)
    for z, (file, begin) in enumerate(found):
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            stream.readinto(scratch.data)
        np.subtract(scratch, np.float32(1024), out=volume[z])
    return volume


def plain_pydicom(folder: Path) -> np.ndarray:
    """What most scripts do: every file, by position, stacked."""
    slices = [pydicom.dcmread(file, force=True) for file in folder.iterdir()]
    slices = [s for s in slices if "PixelData" in s]
    slices.sort(key=lambda s: float(s.ImagePositionPatient[2]))
    planes = [
        s.pixel_array * float(s.get("RescaleSlope", 1)) + float(s.get("RescaleIntercept", 0))
        for s in slices
    ]
    return np.stack(planes).astype(np.float32)


def monai_pydicom(folder: Path) -> np.ndarray:
    from monai.transforms import LoadImage

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it announces codecs
        return np.asarray(LoadImage(reader="PydicomReader", image_only=True)(folder))


def simple_itk(folder: Path) -> np.ndarray:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(folder))
    if not names:
        raise ValueError("no series")
    reader.SetFileNames(names)
    return SimpleITK.GetArrayFromImage(reader.Execute()).astype(np.float32)


def highdicom_series(folder: Path) -> np.ndarray:
    import highdicom

    datasets = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    if len(datasets) == 1 and "NumberOfFrames" in datasets[0]:
        return highdicom.Image.from_dataset(datasets[0]).get_volume(dtype=np.float32).array
    return highdicom.get_volume_from_series(datasets, dtype=np.float32).array


PEERS: dict[str, tuple[str, Reader]] = {
    "plain pydicom": ("pydicom", plain_pydicom),
    "SimpleITK": ("SimpleITK", simple_itk),
    "MONAI PydicomReader": ("monai", monai_pydicom),
    "highdicom": ("highdicom", highdicom_series),
}


def available() -> dict[str, Reader]:
    from importlib.util import find_spec

    return {name: reader for name, (module, reader) in PEERS.items() if find_spec(module)}


def measure(folder: Path, readers: dict[str, Reader], repeats: int) -> dict[str, float]:
    """Return each reader's median CPU seconds, in alternation; the first turn warms."""
    taken: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats + 1):
        for name, reader in readers.items():
            begun = thread_time()
            reader(folder)
            taken[name].append(thread_time() - begun)
    return {name: median(times[1:]) for name, times in taken.items()}


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the voxels are the expected ones along any axes, in any directions."""
    found = np.squeeze(found).astype(np.float64)
    expected = np.squeeze(expected).astype(np.float64)
    if found.ndim != expected.ndim:
        return False
    for order in itertools.permutations(range(found.ndim)):
        turned = found.transpose(order)
        if turned.shape != expected.shape:
            continue
        for ways in itertools.product((1, -1), repeat=found.ndim):
            if np.allclose(turned[tuple(slice(None, None, w) for w in ways)], expected, atol=0.01):
                return True
    return False


def judge(case: Case, reader: Reader) -> str:
    """Return right, refused (too much), or the silent errors: accepted, wrong."""
    try:
        found = reader(case.files[0].parent)
    except Exception:  # whatever a reader raises is a refusal
        return "refused" if case.expected is not None else "right"
    if case.expected is None:
        return "right" if case.name in FOREIGN else "accepted"
    return "right" if same(found, case.expected.data) else "wrong"


def judge_ours(case: Case) -> str:
    """As ``judge``, and strictly: the exact voxels and place, or the reason of the case."""
    try:
        found = read_files(case.files)
    except SeriesRefused as refusal:
        if case.expected is not None:
            return "refused"
        return "right" if refusal.reason == case.reason else "reason"
    if case.expected is None:
        return "accepted"
    is_right = np.array_equal(found.data, case.expected.data) and np.allclose(
        found.affine, case.expected.affine, atol=0.01
    )
    return "right" if is_right else "wrong"


def real_errors(data: Path) -> dict[str, int]:
    """Return how many real series ours accepts, and on how many SimpleITK says otherwise."""
    import SimpleITK

    counts = {"series": 0, "accepted": 0, "compared": 0, "different": 0}
    for folder in sorted(p for p in data.iterdir() if p.is_dir()):
        files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        for series in scan(f for f in files if f.suffix not in (".txt", ".csv", ".xml", ".md")):
            counts["series"] += 1
            if not verdict(series).is_ok:
                continue
            counts["accepted"] += 1
            volume = read(series)
            if volume.modality in ("CR", "DX"):
                continue  # MONOCHROME1, which SimpleITK leaves as it is
            ordered = sorted(series.slices, key=lambda s: float(np.dot(s.position, normal(s))))
            names = [str(s.file) for s in ordered]
            theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(list(dict.fromkeys(names))))
            counts["compared"] += 1
            counts["different"] += not same(theirs.astype(np.float32), volume.data)
    return counts


def normal(one: object) -> np.ndarray:
    across, down = np.reshape(one.orientation, (2, 3))
    return np.cross(across, down)


def time_readers(args: argparse.Namespace, console: Console, scratch: Path) -> dict[str, float]:
    folder = scratch / "ct"
    grid = Grid(args.slices, SIZE, 0.7, 2.0, (-100.0, -100.0, -300.0))
    noise = np.random.default_rng(0).normal(0, 300, (args.slices, SIZE, SIZE)).astype(np.float32)
    write_series(folder, noise, grid=grid, profile=HOSPITALS[0], patient="bench", seed=1)
    del noise
    readers = {"headers": headers, "floor": floor, "ours": ours} | available()
    taken = measure(folder, readers, args.repeats)
    table = Table("reader", "CPU, s", "x floor", title=f"{args.slices} slices of {SIZE} x {SIZE}")
    for name, seconds in taken.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / taken['floor']:.2f}")
    console.print(table)
    return taken


def count_errors(console: Console, scratch: Path) -> dict[str, dict[str, int]]:
    cases = write_hard_cases(scratch / "hard", 1)
    found = {"ours": [judge_ours(case) for case in cases]}
    found |= {name: [judge(c, reader) for c in cases] for name, reader in available().items()}
    kinds = ("right", "refused", "reason", "accepted", "wrong")
    table = Table(
        *("reader", "right", "refused, readable", "refused, other reason"),
        *("accepted, unreadable", "wrong volume"),
        title=f"{len(cases)} hard series; the last two columns are silent errors",
    )
    counts = {name: {k: said.count(k) for k in kinds} for name, said in found.items()}
    for name, count in counts.items():
        table.add_row(name, *(str(count[k]) for k in kinds))
    console.print(table)
    for name in found:
        silent = [c.name for c, said in zip(cases, found[name], strict=True) if said in kinds[3:]]
        console.print(f"{name}, silent: {', '.join(silent) or 'none'}", soft_wrap=True)
    return counts


def patch_volumes(scratch: Path, count: int = 6) -> list[dict[str, str]]:
    """Write volumes of noise with a ball in each, and their label maps."""
    found, shape = [], (64, SIZE, SIZE)
    z, y, x = np.ogrid[:64, :SIZE, :SIZE]
    for number in range(count):
        names = {part: scratch / f"volume-{number}" / f"{part}.npy" for part in ("image", "label")}
        names["image"].parent.mkdir()
        noise = np.random.default_rng(number).standard_normal(shape, np.float32)
        ball = 9 * (z - 30) ** 2 + (y - 150 - 20 * number) ** 2 + (x - 300) ** 2 < 70**2
        np.save(names["image"], noise)
        np.save(names["label"], ball.astype(np.float32))
        found.append({part: str(file) for part, file in names.items()})
    return found


def our_patches(volumes: list[dict[str, str]]) -> Callable[[int], object]:
    """Return what cuts a patch of the n-th volume, both copied as for a batch."""
    import torch

    randomness, opened = secure(), []
    for names in volumes:
        image, label = (np.load(names[part], mmap_mode="c") for part in ("image", "label"))
        image.max(), label.max()  # once through, as the first epoch does: MONAI has read all, too
        opened.append((torch.from_numpy(image), torch.from_numpy(label), foreground_of(label)))

    def one(number: int) -> object:
        image, label, foreground = opened[number % len(opened)]
        begin = corner(image.shape, PATCH, randomness, foreground=foreground, share=0.5)
        return cut(image, begin, PATCH).clone(), cut(label, begin, PATCH).clone()

    return one


def monais_patches(volumes: list[dict[str, str]], *, indexed: bool) -> Callable[[int], object]:
    """Return the same by MONAI's CacheDataset, as its tutorials have it."""
    from monai import transforms as t
    from monai.data import CacheDataset

    keys, rest = ["image", "label"], {}
    steps = [
        t.LoadImaged(keys, reader="NumpyReader"),
        t.EnsureChannelFirstd(keys, channel_dim="no_channel"),
    ]
    if indexed:
        steps.append(t.FgBgToIndicesd("label"))
        rest = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
    steps.append(t.RandCropByPosNegLabeld(keys, "label", PATCH, pos=1, neg=1, **rest))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        dataset = CacheDataset(volumes, t.Compose(steps), progress=False)
    return lambda number: dataset[number % len(dataset)]


def time_patches(console: Console, scratch: Path) -> dict[str, float]:
    """Return the median CPU milliseconds of a patch, batches of twelve each way in alternation."""
    volumes = patch_volumes(scratch)
    ways = {"ours": our_patches(volumes)}
    if "MONAI PydicomReader" in available():
        ways["MONAI CacheDataset"] = monais_patches(volumes, indexed=False)
        ways["MONAI CacheDataset, indices kept"] = monais_patches(volumes, indexed=True)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, way), number in itertools.product(range(4), ways.items(), range(12)):
        begun = thread_time()
        way(number)
        taken[name].append(1000 * (thread_time() - begun))
    found = {name: median(times[12:]) for name, times in taken.items()}  # the first batch warms
    table = Table("patches", "CPU, ms each", "x ours", title="16 x 96 x 96 of 64 x 512 x 512")
    for name, ms in found.items():
        table.add_row(name, f"{ms:.3f}", f"{ms / found['ours']:.0f}")
    console.print(table)
    return found


def time_phantoms(console: Console, scratch: Path, repeats: int) -> float:
    """Return the CPU seconds of 1,000 slices: four vendors' series of 250, drawn and written."""
    taken = []
    for turn in range(repeats):
        begun = thread_time()
        for profile in VENDORS:
            grid = Grid(250, SIZE, 0.6, 1.0, (-150.0, -150.0, -300.0))
            body = bulk.draw_long(profile, grid, person=(turn, profile.name), has_lesion=True)
            rng = make_generator(turn, profile.name)
            slices = bulk.make_slices(body, profile, num_slices=250, rng=rng)
            dataset = describe_series(grid, profile, patient="bench", seed=turn)
            folder = scratch / f"long-{turn}-{profile.name}"
            bulk.write_long(folder, dataset, slices, grid=grid, names=(turn, profile.name))
        taken.append(thread_time() - begun)
        for profile in VENDORS:
            shutil.rmtree(scratch / f"long-{turn}-{profile.name}")
    console.print(f"1,000 phantom slices drawn and written: {median(taken):.2f} CPU s")
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | HEAP)
    warnings.filterwarnings("ignore")
    pydicom.config.logger.setLevel("ERROR")
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        taken = time_readers(args, console, Path(name))
        counts = count_errors(console, Path(name))
        phantoms_s = time_phantoms(console, Path(name), 3)
        patches = time_patches(console, Path(name))
    found: dict[str, object] = {
        "read_over_floor": round(taken["ours"] / taken["floor"], 3),
        "read_vs_monai": round(taken["MONAI PydicomReader"] / taken["ours"], 2),
        "silent_errors": counts["ours"]["accepted"] + counts["ours"]["wrong"],
        "patch_vs_cachedataset": round(patches["MONAI CacheDataset"] / patches["ours"], 1),
        "patch_ms": {name: round(ms, 4) for name, ms in patches.items()},
        "cpu_s": {name: round(seconds, 4) for name, seconds in taken.items()},
        "phantoms_1000_cpu_s": round(phantoms_s, 2),
        "hard": counts,
    }
    if args.data and (args.data / "dicom").is_dir() and "SimpleITK" in available():
        found["real"] = real_errors(args.data / "dicom")
        found["silent_errors"] += found["real"]["different"]
        console.print(f"real series: {found['real']}")
    console.print(
        {
            name: found[name]
            for name in (
                *("read_over_floor", "read_vs_monai", "silent_errors"),
                "patch_vs_cachedataset",
            )
        }
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
