"""Scale, then compress: latency of a prefill and visual tokens, over tilings, projectors, frames and pooling.

One model of the proportions of NVILA-8B, where the language model costs some twenty times what the tower does for
the same tokens, with random weights. An image of 1920x1080 goes through every tiling and projector, videos through
every number of frames and temporal pooling. Only the projector and the tiling differ between rows. Processor time of
one thread is measured, so that what else runs on the machine counts little.

python benchmarks/model/scale_compress.py            # tiles of 224 pixels, 8 to 128 frames, three repeats
python benchmarks/model/scale_compress.py --quick    # tiles of 112 pixels, 8 and 16 frames, two repeats
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import RESULTS, Claim, claim, write_result

if TYPE_CHECKING:
    from torch import Tensor

    from nvila.modeling import NVILAForConditionalGeneration

_TILINGS = {"1 tile": "resize", "dynamic": "dynamic", "dynamic_s2": "dynamic_s2"}
_PROJECTORS = {"none": "mlp2x_gelu", "2x2": "mlp_downsample_2x2_fix", "3x3": "mlp_downsample_3x3_fix"}
_POOLING = (1, 4, 8)
_IMAGE_SIZE = (1920, 1080)
_GOAL = 2.2
_PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "scale-compress.png"
_VOCABULARY, _IMAGE_ID, _VIDEO_ID, _LINE_FEED = 1024, 1000, 1001, 10
_TEXT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    tile: int
    tower: tuple[int, int]  # width, blocks
    decoder: tuple[int, int]
    frames: tuple[int, ...]
    repeats: int


_FULL = Scale(tile=224, tower=(192, 6), decoder=(512, 12), frames=(8, 32, 128), repeats=3)
_QUICK = Scale(tile=112, tower=(64, 3), decoder=(192, 4), frames=(8, 16), repeats=2)


def main() -> int:
    """Run, print a table, draw it, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, two repeats")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    scale = _QUICK if args.quick else _FULL
    name = "model-scale-compress-quick" if args.quick else "model-scale-compress"
    print(f"{'input':12} {'compression':12} {'tiles':>6} {'tokens':>7} {'tower':>10} {'prefill':>10}")
    rows = []
    for row in (*image_rows(scale), *video_rows(scale)):
        rows.append(row)
        media, total = median(row["media_ms"]), median(row["prefill_ms"])
        print(
            f"{row['input']:12} {row['compression']:12} {row['tiles']:6} {row['visual_tokens']:7} "
            f"{media:7.1f} ms {total:7.1f} ms",
            flush=True,
        )
    path = write_result(name, claims(rows), {"image": _IMAGE_SIZE, "tile": scale.tile, "rows": rows})
    print(f"written: {path}, {draw(rows, RESULTS / f'{name}.png' if args.quick else _PICTURE)}")
    return 0


def image_rows(scale: Scale) -> list[dict[str, Any]]:
    """Measure every tiling with every projector; the projectors of one tiling in turns."""
    import numpy as np
    from PIL import Image

    from nvila.image_processing import NVILAImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (_IMAGE_SIZE[1], _IMAGE_SIZE[0], 3), dtype=np.uint8)
    rows = []
    for tiling, mode in _TILINGS.items():
        cases = {}
        for compression, projector in _PROJECTORS.items():
            model = build(scale, mode, projector)
            config: Any = model.config
            inputs = dict(NVILAImageProcessor.from_config(config)(Image.fromarray(pixels)))
            tiles = len(inputs["pixel_values"])
            if config.uses_s2:
                tokens = [config.num_image_tokens * int(inputs["image_blocks"].prod())]
            else:
                tokens = [config.num_image_tokens] * tiles
            cases[compression] = Case(model, inputs, _IMAGE_ID, tokens, tiles)
        rows += measure(tiling, cases, scale.repeats)
    return rows


def video_rows(scale: Scale) -> list[dict[str, Any]]:
    """Measure every number of frames with every temporal pooling, at 2x2 compression."""
    import torch

    rows = []
    for frames in scale.frames:
        cases = {}
        for pool in _POOLING:
            model = build(scale, "resize", _PROJECTORS["2x2"], pool)
            noise = torch.Generator().manual_seed(0)
            pixels = torch.rand(frames, 3, scale.tile, scale.tile, generator=noise).mul_(2).sub_(1)
            inputs = {"pixel_values_videos": pixels, "video_frames": torch.tensor([frames])}
            tokens = [model.config.num_image_tokens] * (frames // pool)
            cases[f"pooling {pool}"] = Case(model, inputs, _VIDEO_ID, tokens, frames)
        rows += measure(f"{frames} frames", cases, scale.repeats)
    return rows


def build(scale: Scale, mode: str, projector: str, pool: int = 1) -> NVILAForConditionalGeneration:
    """Build a model with random weights."""
    import torch

    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": scale.tower[0],
        "intermediate_size": 4 * scale.tower[0],
        "num_hidden_layers": scale.tower[1],
        "num_attention_heads": scale.tower[0] // 32,
        "image_size": scale.tile,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": _VOCABULARY,
        "hidden_size": scale.decoder[0],
        "intermediate_size": 4 * scale.decoder[0],
        "num_hidden_layers": scale.decoder[1],
        "num_attention_heads": scale.decoder[0] // 64,
        "num_key_value_heads": max(1, scale.decoder[0] // 256),
        "tie_word_embeddings": True,
    }
    config = NVILAConfig(
        vision_config=vision,
        text_config=text,
        mm_projector_type=projector,
        image_aspect_ratio=mode,
        image_token_id=_IMAGE_ID,
        video_token_id=_VIDEO_ID,
        image_end_token_id=_LINE_FEED,
        video_pool_sizes=[[pool, 1, 1]],
    )
    model: NVILAForConditionalGeneration = NVILAForConditionalGeneration(config).eval()
    return model


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt of one model: a line feed after every run of visual tokens, then text."""

    model: NVILAForConditionalGeneration
    media: dict[str, Tensor]
    placeholder: int
    runs: list[int]
    tiles: int

    @property
    def input_ids(self) -> Tensor:
        """The prompt, of shape (1, L)."""
        import torch

        media = [token for run in self.runs for token in ([self.placeholder] * run + [_LINE_FEED])]
        return torch.tensor([media + [1] * _TEXT_TOKENS])

    def encode(self) -> None:
        """Run the tower and the projector alone."""
        self.model.model.encode_media(**({"pixel_values": None} | self.media))

    def prefill(self) -> None:
        """Run everything, up to the logits of the first answer token."""
        self.model(input_ids=self.input_ids, **self.media, use_cache=True, logits_to_keep=1)


def measure(name: str, cases: dict[str, Case], repeats: int) -> list[dict[str, Any]]:
    """Time cases in turns, after a first run of each that is not counted."""
    import torch

    rows: dict[str, dict[str, Any]] = {
        compression: {
            "input": name,
            "compression": compression,
            "tiles": case.tiles,
            "visual_tokens": sum(case.runs),
            "media_ms": [],
            "prefill_ms": [],
        }
        for compression, case in cases.items()
    }
    with torch.inference_mode():
        for case in cases.values():
            case.prefill()
        for _ in range(repeats):
            for compression, case in cases.items():
                rows[compression]["media_ms"].append(_milliseconds(case.encode))
                rows[compression]["prefill_ms"].append(_milliseconds(case.prefill))
    return list(rows.values())


def _milliseconds(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return round((time.process_time() - started) * 1000, 3)


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Compare compressed rows with those of the same input that are not."""

    def pairs(plain: str, other: str) -> list[tuple[str, list[float]]]:
        of = {(row["input"], row["compression"]): row["prefill_ms"] for row in rows}
        names = [row["input"] for row in rows if row["compression"] == plain]
        return [
            (name, [a / b for a, b in zip(of[name, plain], of[name, other], strict=True)])
            for name in names
            if (name, other) in of
        ]

    found = []
    for name, ratios in pairs("none", "3x3"):
        what = f"prefill without compression over prefill with 3x3, {name}"
        goal = f"at least {_GOAL}"
        found.append(claim(f"3x3-{_id(name)}", what, ratios, goal, median(ratios) >= _GOAL))
    for plain, other in (("none", "2x2"), ("pooling 1", "pooling 4"), ("pooling 1", "pooling 8")):
        for name, ratios in pairs(plain, other):
            what = f"prefill with {plain} over prefill with {other}, {name}"
            found.append(claim(f"{_id(other)}-{_id(name)}", what, ratios, "reported", True))
    for row in rows:
        what = f"prefill in ms of one core, {row['input']}, {row['compression']}: {row['visual_tokens']} visual tokens"
        found.append(
            claim(f"ms-{_id(row['input'])}-{_id(row['compression'])}", what, row["prefill_ms"], "reported", True)
        )
    return found


def _id(name: str) -> str:
    return name.replace(" ", "-").replace("_", "-")


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw latency over visual tokens, images beside videos, one line for every input."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    groups: dict[str, list[str]] = {"images: tiling and projector": [], "videos: frames and pooling": []}
    for name in dict.fromkeys(row["input"] for row in rows):
        groups[list(groups)["frames" in name]].append(name)
    for panel, (title, names) in zip(panels, groups.items(), strict=True):
        for name in names:
            mine = [row for row in rows if row["input"] == name]
            tokens = [row["visual_tokens"] for row in mine]
            panel.plot(tokens, [median(row["prefill_ms"]) for row in mine], marker="o", label=name)
            for row in mine:
                at = (row["visual_tokens"], median(row["prefill_ms"]))
                panel.annotate(row["compression"], at, textcoords="offset points", xytext=(5, -10), fontsize=8)
        panel.set(title=title, xlabel="visual tokens", ylabel="prefill, ms of one core")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        panel.margins(0.15)
        panel.grid(visible=True, which="both", alpha=0.25)
        panel.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
