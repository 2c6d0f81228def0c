"""What captioning costs: our plain loop, the same on Ray, and `transformers` in batches.

All caption the same images with the same prompt and length, on one thread each, in processes of
their own that take turns. Beside the time there are the seconds of processor time, which tell on a
machine that is busy with something else. A run of few images is taken off each, so that loading a
model and starting Ray count apart. Captions are compared: token for token with `transformers`' own.

Run `python benchmarks/captioning.py IMAGES [--limit N] [--rounds N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastvlm.data.questions import images_in
from fastvlm.evaluation.measuring import rotated
from fastvlm.functional.files import as_json

BATCH = 16
FEW = 16
"""Images of the run that is taken off: a batch."""
COMMAND = "from fastvlm.cli import main; main()"
TICKS = os.sysconf("SC_CLK_TCK")
CONTENDERS: dict[str, tuple[str, ...]] = {
    "plain": ("--workers", "1"),
    "one worker on Ray": ("--workers", "1", "--address", "local"),
    "transformers": (),
}


def descendants(of: int) -> dict[int, float]:
    """Return the processor seconds of a process and all that it started, by process."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    found = {}
    for process, seconds in used.items():
        above = process
        while above not in (0, 1, of):
            above = parents.get(above, 0)
        if above == of:
            found[process] = seconds
    return found


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; its seconds, and those of the processor."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    used: dict[int, float] = {}
    while process.poll() is None:
        used |= descendants(process.pid)
        time.sleep(0.2)
    assert process.returncode == 0, command
    return time.perf_counter() - started, sum(used.values())


def run(contender: str, listing: Path, output: Path, tokens: int) -> tuple[float, float]:
    """Caption the images of a list; see `timed`."""
    if contender == "transformers":
        words = [sys.executable, __file__, str(listing), "--reference", str(output)]
        return timed([*words, "--max-new-tokens", str(tokens)])
    words = ["caption", str(listing), str(output), "--threads", "1"]
    words += ["--max-new-tokens", str(tokens), *CONTENDERS[contender]]
    return timed([sys.executable, "-c", COMMAND, *words])


def caption_with_transformers(listing: Path, output: Path, tokens: int) -> None:
    """Caption a list's images in batches with `transformers`' own `generate`."""
    import torch

    import fastvlm
    import fastvlm_example
    from fastvlm.evaluation.reference import reference_replies
    from fastvlm.prompts import question

    torch.set_num_threads(1)
    vlm = fastvlm.load(packed_bytes=0, prefix_bytes=0)
    paths = listing.read_text().splitlines()
    output.mkdir()
    with (output / "part-000000.jsonl").open("w") as lines:
        for first in range(0, len(paths), BATCH):
            asked = [
                question(fastvlm_example.DESCRIPTION_PROMPT, path)
                for path in paths[first : first + BATCH]
            ]
            for path, reply in zip(
                paths[first : first + BATCH],
                reference_replies(vlm, asked, tokens),
                strict=True,
            ):
                text = vlm.tokenizer.decode(reply, skip_special_tokens=True).strip()
                lines.write(json.dumps({"image": path, "text": text}) + "\n")


def captions(output: Path) -> dict[str, str]:
    """Return the captions of an output by their images."""
    rows = [
        json.loads(line)
        for file in sorted(output.glob("part-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return {row["image"]: row["text"] for row in rows}


def measure(images: list[Path], rounds: int, tokens: int, contenders: list[str]) -> dict[str, Any]:
    """Return the seconds that each contender takes for the images."""
    found: dict[str, Any] = {name: {"seconds": [], "processor_seconds": [], "start_seconds": []}
                             for name in contenders}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, paths in (("few", images[:FEW]), ("all", images)):
            (folder / f"{name}.txt").write_text("\n".join(map(str, paths)))
        said: dict[str, dict[str, str]] = {}
        for number in range(rounds):
            for name in rotated(contenders, number):
                few = run(name, folder / "few.txt", folder / f"few {name} {number}", tokens)
                whole = run(name, folder / "all.txt", folder / f"all {name} {number}", tokens)
                found[name]["seconds"].append(whole[0] - few[0])
                found[name]["processor_seconds"].append(whole[1] - few[1])
                found[name]["start_seconds"].append(few[0])
                said[name] = captions(folder / f"all {name} {number}")
    plain = said["plain"]
    for name in contenders:
        found[name]["different"] = sum(said[name][image] != plain[image] for image in plain)
    return found


def decoding(photo: Path) -> dict[str, float]:
    """Return how many photos a second a core decodes, by their size.

    Args:
        photo: One, which is enlarged.
    """
    from PIL import Image

    from fastvlm.vision.loading import load_image

    found = {}
    for name, size in (("1024 x 768", (1024, 768)), ("4000 x 3000", (4000, 3000))):
        content = io.BytesIO()
        Image.open(photo).resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=90)
        times = []
        for _ in range(5):
            started = time.process_time()
            load_image(content.getvalue())
            times.append(time.process_time() - started)
        found[name] = 1 / statistics.median(times)
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="plain among them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference is not None:
        caption_with_transformers(options.images, options.reference, options.max_new_tokens)
        return
    import torch

    from fastvlm.evaluation.measuring import hardware

    images = [path.absolute() for path in images_in(options.images, options.limit)]
    text = as_json(
        {
            "images": len(images) - FEW,
            "max_new_tokens": options.max_new_tokens,
            "hardware": hardware(torch.device("cpu")),
            "photos_decoded_per_second": decoding(images[0]),
            "contenders": measure(
                images, options.rounds, options.max_new_tokens, options.contenders.split(",")
            ),
        }
    )
    if options.json is None:
        sys.stdout.write(text)
    else:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
