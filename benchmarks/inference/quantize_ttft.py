"""Time to the first token with compression and a W8A8 tower against neither: a tiled image, and a video of 64 frames.

One model of the proportions of NVILA-8B with random weights, that of benchmarks/model/scale_compress.py. Without
compression every patch of an image is a token, and the frames of a video are not pooled over time; with it, the
projector takes 3x3 patches together, or eight frames are pooled into one. All forms of one prompt are timed in turns in
one process; processor time of one thread is measured, so that what else runs on the machine counts little.

python benchmarks/inference/quantize_ttft.py            # tiles of 224 pixels, three repeats
python benchmarks/inference/quantize_ttft.py --quick    # tiles of 112 pixels, two repeats
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result
from model.scale_compress import Case, Scale, build

_FULL = Scale(tile=224, tower=(192, 6), decoder=(512, 12), frames=(64,), repeats=3)
_QUICK = Scale(tile=112, tower=(64, 3), decoder=(192, 4), frames=(64,), repeats=2)
_IMAGE_SIZE = (1920, 1080)
_GOALS = {"image": 2.2, "video": 3.0}
_IMAGE_ID, _VIDEO_ID = 1000, 1001


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, two repeats")
    args = parser.parse_args()
    import torch

    for name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    scale = _QUICK if args.quick else _FULL
    seconds = {"image": measure(image_cases(scale), scale.repeats), "video": measure(video_cases(scale), scale.repeats)}
    for prompt, forms in seconds.items():
        for form, values in forms.items():
            print(f"{prompt:6} {form:24} {median(values):8.3f} s", flush=True)
    name = "inference-quantize-ttft-quick" if args.quick else "inference-quantize-ttft"
    print(f"written: {write_result(name, claims(seconds), {'tile': scale.tile, 'seconds': seconds})}")
    return 0


def image_cases(scale: Scale) -> dict[str, Case]:
    """An image in tiles: every patch a token, and 3x3 patches a token."""
    import numpy as np
    from PIL import Image

    from nvila.image_processing import NVILAImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (_IMAGE_SIZE[1], _IMAGE_SIZE[0], 3), dtype=np.uint8)
    cases: dict[str, Case] = {}
    for form, projector in (("none", "mlp2x_gelu"), ("compressed", "mlp_downsample_3x3_fix")):
        model = build(scale, "dynamic", projector)
        config: Any = model.config
        inputs = dict(NVILAImageProcessor.from_config(config)(Image.fromarray(pixels)))
        tiles = len(inputs["pixel_values"])
        cases |= with_int8(form, Case(model, inputs, _IMAGE_ID, [config.num_image_tokens] * tiles, tiles))
    return cases


def video_cases(scale: Scale) -> dict[str, Case]:
    """64 frames at 2x2 patches a token: none pooled, and eight pooled into one."""
    import torch

    frames = scale.frames[0]
    cases: dict[str, Case] = {}
    pixels = torch.rand(frames, 3, scale.tile, scale.tile, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    for form, pool in (("none", 1), ("compressed", 8)):
        model = build(scale, "resize", "mlp_downsample_2x2_fix", pool)
        inputs = {"pixel_values_videos": pixels, "video_frames": torch.tensor([frames])}
        runs = [model.config.num_image_tokens] * (frames // pool)
        cases |= with_int8(form, Case(model, inputs, _VIDEO_ID, runs, frames))
    return cases


def with_int8(form: str, case: Case) -> dict[str, Case]:
    """A case, and the same with a W8A8 tower."""
    import copy

    from nvila.quantization.config import QuantizationConfig
    from nvila.quantization.quantize import quantize_model

    model = copy.deepcopy(case.model)
    quantize_model(model, QuantizationConfig(vision="w8a8", language="none"))
    narrow = Case(model, case.media, case.placeholder, case.runs, case.tiles)
    return {form: case, f"{form}, W8A8 tower": narrow}


def measure(cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
    """Time prefills in turns, after one each that does not count."""
    import torch

    found: dict[str, list[float]] = {form: [] for form in cases}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for form, case in cases.items():
                started = time.process_time()
                case.prefill()
                if repeat:
                    found[form].append(round(time.process_time() - started, 4))
    return found


def claims(seconds: dict[str, dict[str, list[float]]]) -> list[Claim]:
    """Compare every form with neither compression nor W8A8."""
    found = []
    for prompt, forms in seconds.items():
        plain = forms["none"]
        for form, values in forms.items():
            if form == "none":
                continue
            ratios = [a / b for a, b in zip(plain, values, strict=True)]
            both = form == "compressed, W8A8 tower"
            goal = _GOALS[prompt]
            notes = "the shares of compression and of W8A8 stand in the claims beside this one" if both else ""
            what = f"time to the first token with neither over that with {form}, {prompt} prompt"
            met = not both or median(ratios) >= goal
            id = f"{prompt}-{form.replace(',', '').replace(' ', '-').lower()}"
            found.append(claim(id, what, ratios, f"at least {goal}" if both else "reported", met, notes))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
