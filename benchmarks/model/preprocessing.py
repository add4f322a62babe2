"""Times image and video preprocessing against the image processor of transformers in a plain Python loop.

Both sides start from the same images or the same file and end with the same normalised tiles; how far those differ is
written beside the times. Besides, the peak memory of sampling 64 frames of a ten-minute clip in full HD.

python benchmarks/model/preprocessing.py            # 16 images, a minute of 720p, ten minutes of 1080p; nine repeats
python benchmarks/model/preprocessing.py --quick    # 4 images, four seconds, twenty seconds; three repeats
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from nvila.image_processing import NVILAImageProcessor

_TILE = 448
_GIB = 2**30
_GOAL = 1.5
_SIZES = ((1280, 720), (640, 480), (1000, 1000), (768, 1024))
_KEY_EVERY_S = 10  # as encoders do unless told otherwise
_MODES: dict[str, tuple[int, ...]] = {"resize": (), "dynamic": (), "dynamic_s2": (448, 896, 1344)}
Pixels = Callable[[], "Tensor"]


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, three repeats")
    parser.add_argument("--peak-of", nargs=2, metavar=("FILE", "FRAMES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(sample_once(Path(args.peak_of[0]), int(args.peak_of[1]))))
        return 0
    repeats = 3 if args.quick else 9
    with tempfile.TemporaryDirectory(prefix="nvila-pre-") as folder:
        runs = {name: compare(*sides, repeats) for name, sides in workloads(Path(folder), args.quick).items()}
        for name, run in runs.items():
            print(f"{name:12} {min(run['loop_ms']):9.1f} ms {min(run['ours_ms']):9.1f} ms {max(run['ratio']):6.2f}x")
        memory = long_clip(Path(folder), args.quick)
    print(f"{memory['seconds']:.0f} s of 1080p, {memory['frames']} frames: peak {memory['peak_gib']:.2f} GiB")
    name = "model-preprocessing-quick" if args.quick else "model-preprocessing"
    print(f"written: {write_result(name, claims(runs, memory), {'runs': runs, 'long_clip': memory})}")
    return 0


def workloads(folder: Path, quick: bool) -> dict[str, tuple[Pixels, Pixels]]:
    """Return for every workload the plain loop and ours, with their inputs made."""
    from nvila.image_processing import NVILAImageProcessor

    theirs = auto_processor(folder)
    images = photographs(4 if quick else 16)
    found: dict[str, tuple[Pixels, Pixels]] = {}
    for mode, scales in _MODES.items():
        ours = NVILAImageProcessor(image_aspect_ratio=mode, s2_scales=scales)
        found[mode] = partial(loop_images, theirs, ours, images), partial(our_images, ours, images)
    clip = write_clip(folder / "clip.mp4", 4 if quick else 60, (1280, 720), rate=24, preset="veryfast")
    for frames in (4,) if quick else (8, 64):
        found[f"video, {frames} frames"] = partial(loop_video, theirs, clip, frames), partial(our_video, clip, frames)
    return found


def auto_processor(folder: Path) -> Any:
    """Load the SigLIP processor the way users do."""
    from transformers import AutoImageProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    half = [0.5, 0.5, 0.5]
    size = {"height": _TILE, "width": _TILE}
    SiglipImageProcessorPil(size=size, image_mean=half, image_std=half, do_convert_rgb=True).save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)


def photographs(count: int) -> list[Image.Image]:
    """Make images with detail at every scale, of usual sizes."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    images = []
    for index in range(count):
        size = _SIZES[index % len(_SIZES)]
        layers = [noise.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (4, 32, 256)]
        scaled = [np.asarray(Image.fromarray(layer).resize(size)) / len(layers) for layer in layers]
        images.append(Image.fromarray(np.sum(scaled, axis=0).astype(np.uint8)))
    return images


def loop_images(theirs: Any, ours: NVILAImageProcessor, images: list[Image.Image]) -> Tensor:
    """Tile in Python, one crop after the other, and give every tile to the processor of transformers."""
    import torch

    tiles = []
    for image in images:
        for grid in ours.plan(*image.size).grids:
            if ours.image_aspect_ratio == "resize":
                pieces = [image]
            else:
                sheet = image.resize((grid.columns * _TILE, grid.rows * _TILE))
                corners = [(x * _TILE, y * _TILE) for y in range(grid.rows) for x in range(grid.columns)]
                pieces = [sheet.crop((x, y, x + _TILE, y + _TILE)) for x, y in corners]
            tiles += [theirs(images=piece, return_tensors="pt")["pixel_values"] for piece in pieces]
    return torch.cat(tiles)


def our_images(ours: NVILAImageProcessor, images: list[Image.Image]) -> Tensor:
    """Process all images in one call."""
    pixels: Tensor = ours(images)["pixel_values"]
    return pixels


def loop_video(theirs: Any, path: Path, num_frames: int) -> Tensor:
    """Decode frame after frame, keep those at the wanted places, give each to the processor of transformers."""
    import av
    import numpy as np
    import torch

    with av.open(str(path)) as container:
        total = container.streams.video[0].frames
        wanted = set(np.round(np.linspace(0, total - 1, num_frames)).astype(int).tolist())
        frames = [
            frame.to_ndarray(format="rgb24") for index, frame in enumerate(container.decode(video=0)) if index in wanted
        ]
    return torch.cat([theirs(images=frame, return_tensors="pt")["pixel_values"] for frame in frames])


def our_video(path: Path, num_frames: int) -> Tensor:
    """Sample and process one file."""
    from nvila.video_processing import NVILAVideoProcessor

    pixels: Tensor = NVILAVideoProcessor(num_frames=num_frames)(path)["pixel_values_videos"]
    return pixels


def write_clip(path: Path, seconds: int, size: tuple[int, int], *, rate: int, preset: str) -> Path:
    """Encode a moving pattern; every frame differs from the others."""
    import av
    import numpy as np

    width, height = size
    down, across = np.mgrid[0 : height * 3 // 2, 0:width]
    pattern = ((down * 3 + across * 2) % 256 // 2 + 64).astype(np.uint8)  # planes of YUV 4:2:0, one below the other
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"preset": preset})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = _KEY_EVERY_S * rate
        for index in range(seconds * rate):
            frame = av.VideoFrame.from_ndarray(np.roll(pattern, 8 * index, axis=1), format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def compare(loop: Pixels, ours: Pixels, repeats: int) -> dict[str, Any]:
    """Time both in turns, after a first run that is compared and not counted."""
    expected, found = loop(), ours()
    if expected.shape != found.shape:
        raise SystemExit(f"the loop made {tuple(expected.shape)}, we made {tuple(found.shape)}")
    run: dict[str, Any] = {"largest_difference": float((expected - found).abs().max()), "tiles": len(found)}
    run |= {"loop_ms": [], "ours_ms": [], "ratio": [], "processor_ratio": []}
    for _ in range(repeats):
        loop_ms, loop_cpu_ms = _milliseconds(loop)
        ours_ms, ours_cpu_ms = _milliseconds(ours)
        run["loop_ms"].append(loop_ms)
        run["ours_ms"].append(ours_ms)
        run["ratio"].append(round(loop_ms / ours_ms, 3))
        run["processor_ratio"].append(round(loop_cpu_ms / ours_cpu_ms, 3))
    return run


def _milliseconds(step: Pixels) -> tuple[float, float]:
    """Time of the clock, and of all threads on the processor."""
    started, started_cpu = time.perf_counter(), time.process_time()
    step()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return round(seconds * 1000, 3), round(cpu_seconds * 1000, 3)


def long_clip(folder: Path, quick: bool) -> dict[str, Any]:
    """Sample a long clip in a process of its own, whose peak memory is all that it ever held."""
    seconds, frames = (20, 8) if quick else (600, 64)
    started = time.perf_counter()
    # Few frames a second and little compression, so that it is made in a minute.
    clip = write_clip(folder / "long.mp4", seconds, (1920, 1080), rate=10, preset="ultrafast")
    made_s = time.perf_counter() - started
    command = [sys.executable, __file__, "--peak-of", str(clip), str(frames)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    facts: dict[str, Any] = json.loads(output.splitlines()[-1])
    size_mib = round(clip.stat().st_size / 2**20, 1)
    return facts | {"seconds": seconds, "frames": frames, "made_s": round(made_s, 1), "size_mib": size_mib}


def sample_once(path: Path, num_frames: int) -> dict[str, float]:
    """Sample and process one clip in this process."""
    started = time.perf_counter()
    our_video(path, num_frames)
    seconds = time.perf_counter() - started
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return {"peak_gib": round(int(line.split()[1]) * 1024 / _GIB, 3), "sampled_s": round(seconds, 2)}
    raise SystemExit("/proc/self/status has no VmHWM")


def claims(runs: dict[str, dict[str, Any]], memory: dict[str, Any]) -> list[Claim]:
    """Turn runs into claims."""
    found = []
    for name, run in runs.items():
        what = f"time of the plain loop over ours, {name}"
        notes = (
            f"{run['tiles']} tiles; processor time {median(run['processor_ratio']):.2f}x; values differ by at most "
            f"{run['largest_difference']:.4f} of a range of 2"
        )
        found.append(
            claim(
                name.replace("_", "-").replace(", ", "-").replace(" ", "-"),
                what,
                run["ratio"],
                f"at least {_GOAL}",
                median(run["ratio"]) >= _GOAL,
                notes,
            )
        )
    what = f"peak memory of a process that samples {memory['frames']} frames of {memory['seconds']} s of 1080p, GiB"
    found.append(claim("long-clip-peak", what, [memory["peak_gib"]], "below 1.5", memory["peak_gib"] < _GOAL))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
