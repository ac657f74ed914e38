"""What several networks show on the same inputs, batch by batch: a few positions of each image, at chosen points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dimat.merge.batches import count, on_device, take
from dimat.merge.clock import Clock
from dimat.merge.stages import Data, Weights
from dimat.merge.statistics import PositionSampler
from dimat.symmetry import Observer
from dimat.symmetry.spec import ObservationPoint

PIECE = 32
"""Images per forward pass: bounds memory, and is no slower than more."""

Shown = list[dict[str, list[Tensor]]]
"""For each network, by group, a matrix (samples, units) per point; the same samples for all."""


def activity(
    watch: Observer,
    networks: Sequence[Weights],
    data: Data,
    chosen: Mapping[str, Sequence[ObservationPoint]],
    *,
    device: torch.device,
    sampler: PositionSampler,
    max_images: int | None,
    clock: Clock,
) -> Iterator[tuple[int, Shown]]:
    """Yield, for pieces of up to 32 examples of `data`, their number and what each network shows at the points."""
    for batch in take(data, max_images, PIECE):
        sampler.next_batch()
        seen: Shown = []
        inputs = on_device(batch, device)
        images = count(inputs)
        for weights in networks:
            outputs = watch.run(weights, inputs, chosen)
            clock.lap("forward")
            # popped, so that no more than one model's activations are held whole
            seen.append({group: [sampler(t, images) for t in outputs.pop(group)] for group in chosen})
            clock.lap("statistics")
        yield images, seen
