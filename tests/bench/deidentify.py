"""What de-identification leaves, breaks and costs, beside other libraries where they are installed.

    python tests/bench/deidentify.py [--seed 7] [--repeats 25] [--json FILE]

Survivors: identifiers of ``shared_models.phantoms.identifiers`` that ``survivors.search``, which
knows no profile, finds again in the bytes written. "Listed" are those whose own attribute, or one
that holds it, is in table E.1-1, and what stands outside the data set; the standard names them all.
Cost: CPU time of one thread, read + de-identify + write over read + write, in alternation; medians.
"decode all" is what reading every value costs, which de-identification cannot do without where
images lie in sequences (multi-frame objects).
Burned-in text: how many pictures of ``shared_models.phantoms.lettering`` are seen to hold text by
their pixels alone, whatever the header says, and how many that hold none: their twins, and the
frames of all real files but those with text in them.
Conformance: errors of dciodvfy after that were not there before.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from time import thread_time

from pydicom import config, dcmread, dcmwrite
from pydicom.datadict import tag_for_keyword
from rich.console import Console
from rich.table import Table

from client.ingest.deid import Refused, deidentify
from client.ingest.keys import Key
from client.ingest.pixels import NoDecoder, shows_text
from client.ingest.profile import Terms, table
from shared_models.phantoms import HOSPITALS, write_hospitals
from shared_models.phantoms.identifiers import Corpus, Planted, write_identifiers
from shared_models.phantoms.lettering import write_lettered
from shared_models.phantoms.survivors import search

Tool = Callable[[Path, Path], None]
KEY = Key(bytes(range(32)))
#: Sets of real images, where there are any: a few files of each.
REAL = (
    "ct_siemens_sensation10_chest",
    "ct_philips_ingenuity_phantom",
    "mr_ge_mr750_epi",
    "mr_ge_signa_hdxt_deidentified",
    "mr_toshiba_galan_dwi",
    "mr_uih_umr770_dwi",
    "mr_siemens_skyra_epi",
    "mr_siemens_vida_enhanced_multiframe",
)
#: Sets of real images in whose pixels there is no text, all files.
PLAIN = (*REAL, "mr_siemens_trio_9_transfer_syntaxes")


def consilia(source: Path, target: Path) -> None:
    found = deidentify(dcmread(source), Terms(), KEY)
    if isinstance(found, Refused):
        raise ValueError(f"refused: {found.reason}")
    dcmwrite(target, found)


def read_write(source: Path, target: Path) -> None:
    dcmwrite(target, dcmread(source))


def read_all_write(source: Path, target: Path) -> None:
    """Read, decode every value at every depth, which pydicom puts off otherwise, and write."""
    dataset = dcmread(source)
    for _ in dataset.iterall():
        pass
    dcmwrite(target, dataset)


def others() -> dict[str, Tool]:
    """Return the libraries that are installed, each with the defaults its documentation gives."""
    found: dict[str, Tool] = {}
    try:
        simple = importlib.import_module("dicomanonymizer.simpledicomanonymizer")
    except ModuleNotFoundError:
        pass
    else:
        found["dicom-anonymizer 2026c"] = lambda source, target: simple.anonymize_dicom_file(
            str(source),
            str(target),
            base_rules_gen=lambda: simple.initialize_actions("dicomfields_2026c"),
        )
        found["dicom-anonymizer default"] = lambda source, target: simple.anonymize_dicom_file(
            str(source), str(target)
        )
    try:
        module = importlib.import_module("dicognito.anonymizer")
    except ModuleNotFoundError:
        pass
    else:
        anonymizer = module.Anonymizer(seed="bench")

        def dicognito(source: Path, target: Path) -> None:
            dataset = dcmread(source)
            anonymizer.anonymize(dataset)
            dcmwrite(target, dataset)

        found["dicognito"] = dicognito
    return found


def is_listed(one: Planted) -> bool:
    if one.kind in ("private", "graphics", "meta", "preamble", "padding"):
        return True
    tags = (tag_for_keyword(keyword) for keyword in one.where.split(">"))
    return any(tag in table() for tag in tags)


def count_survivors(tool: Tool, corpus: Corpus, folder: Path) -> dict[str, object]:
    """Return what survives, in all and of the listed, and the recall by attribute of E.1-1."""
    left: list[Planted] = []
    planted: Counter[str] = Counter()
    for file in corpus.files:
        answers = corpus.planted[file.name]
        planted.update(_attribute(one) for one in answers if is_listed(one))
        target = folder / "out.dcm"
        try:
            tool(file, target)
        except Exception as problem:
            return {"failed": type(problem).__name__}
        left += [survivor.planted for survivor in search(target.read_bytes(), answers)]
    leaked = Counter(_attribute(one) for one in left if is_listed(one))
    recall = {name: 1 - leaked[name] / planted[name] for name in planted}
    return {
        "survivors": len(left),
        "listed": sum(leaked.values()),
        "kinds": dict(Counter(one.kind for one in left if is_listed(one))),
        "attributes": len(recall),
        "attributes_clean": sum(value == 1 for value in recall.values()),
        "recall": {name: round(value, 3) for name, value in sorted(recall.items())},
        "leaks": {name: round(recall[name], 3) for name in sorted(leaked)},
    }


def _attribute(one: Planted) -> str:
    return one.keyword if one.kind in ("attribute", "nested") else one.kind


def manages(tool: Tool, source: Path, target: Path) -> bool:
    """Return whether the tool writes this file at all; some fall over what real headers hold."""
    try:
        tool(source, target)
    except Exception:
        return False
    return True


def measure(tools: dict[str, Tool], source: Path, folder: Path, repeats: int) -> dict[str, float]:
    """Return the CPU time of each tool over that of reading and writing alone."""
    target = folder / "out.dcm"
    tools = {name: tool for name, tool in tools.items() if manages(tool, source, target)}
    taken: dict[str, list[float]] = {"read_write": []} | {name: [] for name in tools}
    for _ in range(repeats + 1):
        for name, tool in ({"read_write": read_write} | tools).items():
            begun = thread_time()
            tool(source, target)
            taken[name].append(thread_time() - begun)
    floor = median(taken["read_write"][1:])  # the first warms
    ratios = {name: round(median(taken[name][1:]) / floor, 2) for name in tools}
    return ratios | {"read_write_ms": round(1000 * floor, 2)}


def count_errors(file: Path) -> Counter[str]:
    """Return dciodvfy's errors without the values in them."""
    done = subprocess.run(
        ["dciodvfy", str(file)], capture_output=True, text=True, errors="replace", check=False
    )
    lines = done.stderr.splitlines()
    return Counter(re.sub(r"=?\s*<[^>]*>", "", line) for line in lines if line.startswith("Error"))


def new_errors(tool: Tool, files: Iterable[Path], folder: Path) -> dict[str, int]:
    """Return by kind which errors a tool brings in."""
    found: Counter[str] = Counter()
    for file in files:
        if not manages(tool, file, folder / "out.dcm"):
            found["no file written"] += 1
            continue
        found += count_errors(folder / "out.dcm") - count_errors(file)
    return dict(found)


def is_consistent(files: Iterable[Path], folder: Path) -> bool:
    """Return whether another process writes the very same bytes with the same key."""
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[3:];"
        "from deidentify import consilia; consilia(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for file in files:
        ours, theirs = folder / "ours.dcm", folder / "theirs.dcm"
        consilia(file, ours)
        paths = [str(Path(__file__).parent), *sys.path]
        subprocess.run([sys.executable, "-c", code, file, theirs, *paths], check=True)
        if ours.read_bytes() != theirs.read_bytes():
            return False
    return True


def phantom(folder: Path) -> Path:
    """Return one CT slice of half a megabyte, 512 x 512."""
    (hospital,) = write_hospitals(folder, seed=1, profiles=HOSPITALS[:1], num_patients=1, size=512)
    return min((hospital / "series").rglob("*.dcm"))


def real_files() -> list[Path]:
    root = Path(os.environ.get("CONSILIA_DATA", "../shared/data")) / "dicom"
    found = []
    for name in REAL:
        files = [f for f in sorted((root / name).rglob("*")) if f.is_file()]
        images = [f for f in files if f.read_bytes()[128:132] == b"DICM"]
        found += images[:: max(1, len(images) // 3)][:3]
    return found


def count_lettered(folder: Path, seed: int) -> dict[str, object]:
    """Return by font and style, place and kind which share of burned-in text is found."""
    found: dict[str, dict[str, list[bool]]] = {"font": {}, "place": {}, "kind": {}}
    false_alarms = num_twins = 0
    for one in (o for n in range(3) for o in write_lettered(folder / str(n), seed=seed + n)):
        is_found = shows_text(dcmread(one.file))
        font = f"{one.lettering.font} {one.lettering.height}, {one.lettering.style}"
        for key, value in (("font", font), ("place", one.lettering.place), ("kind", one.kind)):
            found[key].setdefault(value, []).append(is_found)
        false_alarms, num_twins = false_alarms + shows_text(dcmread(one.twin)), num_twins + 1
    every = [is_found for founds in found["place"].values() for is_found in founds]
    real, real_alarms = real_frames()
    return {
        "recall": round(sum(every) / len(every), 3),
        "num_pictures": len(every),
        "false_alarms": false_alarms,
        "num_twins": num_twins,
        "real_frames": real,
        "real_false_alarms": real_alarms,
        **{
            f"by_{key}": {name: round(sum(v) / len(v), 2) for name, v in values.items()}
            for key, values in found.items()
        },
    }


def real_frames() -> tuple[int, int]:
    """Return how many frames of real images without text there are, and how many are taken for it.

    Those whose pixels nothing here decodes are refused unseen, and are not counted.
    """
    root = Path(os.environ.get("CONSILIA_DATA", "../shared/data")) / "dicom"
    num_frames = num_alarms = 0
    for file in sorted(f for name in PLAIN for f in (root / name).rglob("*") if f.is_file()):
        if file.read_bytes()[128:132] != b"DICM":
            continue
        dataset = dcmread(file)
        try:
            num_alarms += shows_text(dataset)
            num_frames += int(dataset.get("NumberOfFrames", 1) or 1)
        except NoDecoder:
            continue
    return num_frames, num_alarms


def run(seed: int, repeats: int, folder: Path) -> dict[str, object]:
    corpus = write_identifiers(folder / "corpus", seed=seed)
    tools = {"consilia": consilia} | others()
    left = {name: count_survivors(tool, corpus, folder) for name, tool in tools.items()}
    slice_, real = phantom(folder), real_files()
    timed = {"decode all": read_all_write} | tools
    costs = {"phantom CT 512": measure(timed, slice_, folder, repeats)}
    first = {file.parent.name: file for file in reversed(real)}
    costs |= {name: measure(timed, file, folder, repeats) for name, file in first.items()}
    lettered = count_lettered(folder / "lettered", seed)
    errors: dict[str, object] = {}
    if shutil.which("dciodvfy"):
        errors = {name: new_errors(tool, [slice_, *real], folder) for name, tool in tools.items()}
    return {
        "planted": sum(len(answers) for answers in corpus.planted.values()),
        "planted_listed": sum(is_listed(o) for a in corpus.planted.values() for o in a),
        "survivors": left["consilia"].get("survivors"),
        "over_read_write": costs["phantom CT 512"]["consilia"],
        "new_dciodvfy_errors": sum(errors["consilia"].values()) if errors else None,
        "same_bytes_in_another_process": is_consistent([slice_, *corpus.files], folder),
        "burned_in": lettered,
        "tools": left,
        "costs": costs,
        "errors": errors,
    }


def show(found: dict[str, object]) -> None:
    console = Console(width=120)
    console.print(f"{found['planted']} planted, {found['planted_listed']} of them listed by E.1-1")
    left = Table("tool", "survivors", "of the listed", "attributes clean", "new dciodvfy errors")
    for name, figures in found["tools"].items():
        errors = found["errors"].get(name)
        left.add_row(
            name,
            str(figures.get("survivors", figures.get("failed"))),
            str(figures.get("listed", "")),
            f"{figures.get('attributes_clean', '')}/{figures.get('attributes', '')}",
            "" if errors is None else str(sum(errors.values())),
        )
    console.print(left)
    names = list(found["tools"])
    timed = ["decode all", *names]
    costs = Table("image", "read + write, ms", *timed, title="CPU time over read + write")
    for name, figures in found["costs"].items():
        costs.add_row(
            name, str(figures["read_write_ms"]), *(str(figures.get(n, "fails")) for n in timed)
        )
    console.print(costs)
    leaking = sorted({k for f in found["tools"].values() for k in f.get("leaks", {})})
    recall = Table("attribute of E.1-1", *names, title="Recall, where some tool leaves any")
    for attribute in leaking:
        leaks = (f.get("leaks", {}) for f in found["tools"].values())
        recall.add_row(attribute, *(f"{leak.get(attribute, 1):.3f}" for leak in leaks))
    console.print(recall)
    show_lettered(console, found["burned_in"])


def show_lettered(console: Console, found: dict[str, object]) -> None:
    console.print(
        f"text found in {found['recall']:.1%} of {found['num_pictures']} pictures by their pixels "
        f"alone; false alarms: {found['false_alarms']} of {found['num_twins']} without text, "
        f"{found['real_false_alarms']} in {found['real_frames']} real frames"
    )
    styles = sorted({name.partition(", ")[2] for name in found["by_font"]})
    table = Table("font", *styles, title="Recall of text in pixels")
    for font in dict.fromkeys(name.partition(", ")[0] for name in found["by_font"]):
        table.add_row(font, *(f"{found['by_font'][f'{font}, {s}']:.2f}" for s in styles))
    console.print(table)
    console.print(found["by_place"] | found["by_kind"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    config.settings.reading_validation_mode = config.IGNORE
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.seed, args.repeats, Path(folder))
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
