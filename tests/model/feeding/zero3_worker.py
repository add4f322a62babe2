"""One of two processes: gradients of a step in which only one of them has media, under ZeRO 3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

import nvila.losses
import nvila.modeling
from nvila.assembly import load_model
from nvila.data.collation import collate
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Sample, vqa_sample
from nvila.training.deepspeed_engine import _import_deepspeed


def samples() -> tuple[Sample, ...]:
    """One with an image, and texts with longer answers than it."""
    return (
        vqa_sample(id="image", source="s", image="a", question="what color?", answer="red"),
        vqa_sample(id="text", source="s", image=None, question="what shape?", answer="the circle is red and blue here"),
        vqa_sample(id="more", source="s", image=None, question="describe the image.", answer="one two three stop"),
    )


def rows(encoder: ConversationEncoder) -> list[list[list[Encoded]]]:
    """What each of the two processes gets: the image, and the texts."""
    image, text, more = map(encoder, samples())
    return [[[image]], [[text], [more]]]


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def inputs(batch_rows: list[list[Encoded]], pad: int) -> dict[str, Any]:
    batch = collate(batch_rows, pad)
    given: dict[str, Any] = {
        name: getattr(batch, name) for name in ("input_ids", "labels", "position_ids", "attention_mask")
    }
    return given | ({"pixel_values": pixels()} if batch.images else {})


def main(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    torch.set_num_threads(1)
    # As with a vocabulary of 150 thousand: the head is called chunk by chunk, once or more often.
    vars(nvila.modeling)["WHOLE_LOGITS"] = 1
    nvila.losses._CHUNK_ELEMENTS = 150
    model, processor = load_model(folder / "model")
    tokenizer = processor.tokenizer
    frozen = (folder / "frozen").exists()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and ("vision" in name or "projector" in name)))
    model.train()
    deepspeed = sys.modules["deepspeed"]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        config={
            "train_micro_batch_size_per_gpu": 1,
            # Small weights too are cut up, as large ones are.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    own = rows(ConversationEncoder(tokenizer, processor.num_image_tokens, 128))
    counts = [sum(one.num_supervised for row in share for one in row) for share in own]
    for _ in range(2):  # what was prefetched in the first pass must fit in the second one
        loss = engine(**inputs(own[rank], 0)).loss
        engine.backward(loss * counts[rank] * 2 / sum(counts))
        gradients = {
            name: gradient.clone().contiguous()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            for gradient in [deepspeed.utils.safe_get_full_grad(parameter)]
            if gradient is not None
        }
        engine.optimizer.zero_grad()
        engine.zero_grad()
    if rank == 0:
        save_file(cast("dict[str, torch.Tensor]", gradients), folder / "gradients.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    main(Path(sys.argv[1]))
