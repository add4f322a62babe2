"""Peak memory and time of the language-model loss, forward and backward, at 4k tokens and a vocabulary of 150k.

Every variant runs in a process of its own, because memory that one has used would be there for the next. What is
counted is what the loss adds to its inputs: logits, their gradients, and the gradients of head and hidden states.

python benchmarks/model/loss_memory.py            # 4096 tokens, 151,936 words, width 896, three repeats
python benchmarks/model/loss_memory.py --quick    # 2048 tokens, 50,000 words, width 128, one repeat
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

if TYPE_CHECKING:
    from torch import Tensor

_VARIANTS = ("plain", "chunked", "chunked-per-token")
_KEPT_ROWS = 4096  # rows of the head's gradient that are compared


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, one repeat")
    parser.add_argument("--variant", choices=_VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (2048, 50_000, 128) if args.quick else (4096, 151_936, 896)
    if args.variant:
        print(json.dumps(measure(args.variant, *sizes, args.keep)))
        return 0
    runs: list[dict[str, Any]] = []
    for repeat in range(1 if args.quick else 3):
        with tempfile.TemporaryDirectory(prefix="nvila-loss-") as folder:
            for variant in _VARIANTS:
                run = in_own_process(variant, args.quick, Path(folder)) | {"repeat": repeat}
                runs.append(run)
                print(f"{variant:18} {run['peak_mib']:8.0f} MiB {run['seconds']:7.2f} s", flush=True)
            add_differences(runs[-len(_VARIANTS) :], Path(folder))
    name = "model-loss-memory-quick" if args.quick else "model-loss-memory"
    details = dict(zip(("tokens", "vocabulary", "width"), sizes, strict=True)) | {"runs": runs}
    print(f"written: {write_result(name, claims(runs), details)}")
    return 0


def in_own_process(variant: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Measure one variant in a new interpreter."""
    command = [sys.executable, __file__, "--variant", variant, "--keep", str(folder / f"{variant}.safetensors")]
    output = subprocess.run([*command, *(["--quick"] if quick else [])], check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return measured


def measure(variant: str, tokens: int, vocabulary: int, width: int, keep: Path | None) -> dict[str, Any]:
    """Compute one loss and its gradients in this process."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).requires_grad_()
    # Logits of a spread that trained models have, so that the loss has a gradient worth comparing.
    weight = torch.randn(vocabulary, width).mul_(3 / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    _warm_up(variant)
    before = _reset_peak()
    started = time.perf_counter()
    loss = _loss(variant, hidden, weight, targets)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = _status("VmHWM") - before
    assert hidden.grad is not None
    assert weight.grad is not None
    rows = torch.cat([targets, torch.randint(vocabulary, (_KEPT_ROWS,))])[:_KEPT_ROWS]
    if keep is not None:
        kept = {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad[rows]}
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, keep)
    return {"variant": variant, "peak_mib": round(peak / 2**10, 1), "seconds": round(seconds, 3)}


def _loss(variant: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import functional

    from nvila.losses import chunked_cross_entropy

    if variant == "plain":
        return functional.cross_entropy(hidden @ weight.T, targets)
    if variant == "chunked-per-token":
        return chunked_cross_entropy(hidden, weight, targets, reduction="none").mean()
    return chunked_cross_entropy(hidden, weight, targets)


def _warm_up(variant: str) -> None:
    """Load libraries and start threads before anything is counted."""
    import torch

    hidden, weight = (torch.ones(64, 32).requires_grad_() for _ in range(2))
    _loss(variant, hidden, weight, torch.zeros(64, dtype=torch.long)).backward()


def _reset_peak() -> int:
    """Make the peak start over from what is held now, and return that in KiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}")


def add_differences(runs: list[dict[str, Any]], folder: Path) -> None:
    """Note the largest difference of every variant from the plain loss: of the loss, and of any gradient.

    Gradients are compared in units of the largest one, as the mean over 4096 tokens makes all of them tiny.
    """
    from safetensors.torch import load_file

    plain = load_file(folder / "plain.safetensors")
    for run in runs:
        found = load_file(folder / f"{run['variant']}.safetensors")
        run["loss_difference"] = float((found["loss"] - plain["loss"]).abs())
        run["gradient_difference"] = max(
            float((found[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in ("hidden", "weight")
        )


def claims(runs: list[dict[str, Any]]) -> list[Claim]:
    """Turn runs into claims."""

    def of(variant: str, field: str) -> list[float]:
        return [run[field] for run in runs if run["variant"] == variant]

    found = []
    for variant in ("chunked", "chunked-per-token"):
        less, faster = (
            [plain / chunked for plain, chunked in zip(of("plain", field), of(variant, field), strict=True)]
            for field in ("peak_mib", "seconds")
        )
        what = f"peak memory of the plain loss over that of {variant}"
        found.append(claim(f"{variant}-memory", what, less, "at least 5", min(less) >= 5))
        what = f"time of the plain loss over that of {variant}"
        found.append(claim(f"{variant}-time", what, faster, "reported", True))
        # Rounded figures would read as zero, so these are in millionths.
        loss, gradient = (
            [value * 1e6 for value in of(variant, field)] for field in ("loss_difference", "gradient_difference")
        )
        what = f"difference of {variant} from the plain loss, fp32, in millionths"
        found.append(claim(f"{variant}-difference", what, loss, "at most 10", max(loss) <= 10))
        what = f"largest difference of its gradients from those of the plain loss over the largest gradient, {variant}"
        notes = "in millionths; both are sums in fp32, in another order"
        found.append(claim(f"{variant}-gradients", what, gradient, "reported", True, notes))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
