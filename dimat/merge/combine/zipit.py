"""ZipIt: units that fire alike are merged wherever they are, two of one model too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dimat.errors import MergeError
from dimat.merge.matching.activation_statistics import CrossStatistics, PositionSampler, average_correlation
from dimat.merge.matching.correlation import Sampling, activity, choose_points
from dimat.merge.matching.units import labels_of, merge_units, taken_axes
from dimat.merge.matching.zip_units import keep_places, zip_units
from dimat.merge.models.batches import device_of, first_inputs
from dimat.merge.models.functional import tensors_for
from dimat.merge.registry import combine_registry
from dimat.merge.stages import Data, Inputs, Points, StageTimer, Weights
from dimat.merge.tensors.streaming import combine_tensors
from dimat.merge.tensors.task_vectors import copy_of
from dimat.merge.weight_views import axes_by_name, content_hash
from dimat.symmetry import Observer
from dimat.symmetry.spec import Layout, ObservationPoint, SymmetrySpec, groups_in

SAMPLING = Sampling(max_images=1000)
"""The default of ZipIt."""


@combine_registry.register("zipit")
def zipit(
    own: Weights,
    peers: Sequence[Weights],
    weights: Sequence[float],
    *,
    model: nn.Module | None = None,
    spec: SymmetrySpec | None = None,
    data: Data | None = None,
    observer: Callable[[Inputs], Observer] | None = None,
    points: Points | None = None,
    a: Annotated[float, Field(ge=0, le=1)] = 0.3,
    b: Annotated[float, Field(ge=0, le=1)] = 0.125,
    within: bool = True,
    sampling: Sampling = SAMPLING,
) -> Weights:
    """Return W = Σ_k M_out,k W_k U_in,k: each symmetry group's units of all models, merged to as many as one has.

    **Matching.** corr[i, j], (n·units)² for n models, is the correlation of two units of whatever models over images
    and positions of `data`, averaged over the group's points (chosen as by align = "activations"; unlike there, one
    model against itself too). Pairs are merged from the highest on until `units` are left. A merged unit goes with
    others as the worse of its halves, times `a`; each model may merge about units · `b` / 2 pairs of its own (see
    `zip_units` for both, and for how little that differs from the authors' program). `within` = False: pairs across
    models only. Two models are then merged one to one, as by align and average, but matched greedily.

    **Merging** (see `merge_units`). Where a layer makes the units (rows, biases, norms, and running statistics, which
    repair = "batchnorm" then measures anew), a merged unit is the mean of its members: unit i of model k enters with
    w_k over the sum of w over the members; with equal weights 1 / members, and pairs of two models with w_own and
    w_peer. Where a layer takes the units in, its columns add up. Axes without units keep the weights w_k. A merged
    unit stands where its lowest unit of own's stood, so that results go on in own's basis.

    Groups that cannot be observed are paired by index, and so are all where the model has no groups: an average.
    Units inside heads are paired by index too. A merged unit needs a layer that takes its members in, whose columns
    add up. The units of queries have none: they meet those of keys in a product, and Σ q_i k_i over the members is not
    what the members' means give. Those of values have one, but which of them fire alike means something only within
    heads that belong together, so heads must be paired first: align = "activations" pairs both, one to one.

    Models that are equal, bit by bit, are one with their weights' sum; a model of weight 0 takes no part. Integers are
    own's. The order of peers does not matter: they are taken in that of their content hashes. Memory: all models'
    weights, and (n·units)² numbers in float64 per point.

    `max_images`: look at no more examples (None: all). `positions`: of each image, drawn from a fixed seed; None: all.
    Raises MergeError without model, data and the model's symmetry spec.

    Paper: Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", ICLR 2024, arXiv 2305.03053
    (all layers zipped; α there is `a`, β `b`, with the defaults of its program).
    """
    if not any(weights[1:]):
        return copy_of(own)
    if model is None or data is None or spec is None or observer is None:
        raise MergeError("combine method 'zipit' needs the model and data to run it on: pass model= and data=")
    parties, mass = _distinct(own, peers, weights)
    plain = _plain(spec)
    chosen = {
        group: at for group, at in choose_points(spec, points, sampling.points_per_group)[0].items() if group in plain
    }
    labels: dict[str, Tensor] = {}
    if chosen and len(parties) > 1:
        device = device_of(model)
        shown = activity(
            observer(first_inputs(data)),
            [tensors_for(model, party, device) for party in parties],
            data,
            chosen,
            device=device,
            sampler=PositionSampler(sampling.positions, torch.Generator().manual_seed(0)),
            max_images=sampling.max_images,
            clock=StageTimer(),
        )
        seen = _Correlations(chosen)
        for _, outputs in shown:
            seen.add(outputs)
        for group in chosen:
            found = zip_units(seen.of(group), len(parties), a, b, within=within)
            labels[group] = keep_places(found, len(found) // len(parties))
    becomes = [*labels_of(labels, len(parties))]
    taken = taken_axes(model, spec)
    axes = axes_by_name(spec)

    def merge(name: str, start: Tensor, others: list[Tensor]) -> Tensor:
        tensors = [start, *others][0 if parties[0] is own else 1 :]
        if len(tensors) == 1:
            return tensors[0].clone()
        moving = [axis for axis in axes.get(name, ()) if _holds(axis.layout, labels)]
        return merge_units(tensors, mass, moving, becomes, taken)

    return combine_tensors(own, [party for party in parties if party is not own], merge)


def _plain(spec: SymmetrySpec) -> set[str]:
    """Return the groups that are merged: not those inside heads (see `zipit`)."""
    nested = {
        group
        for axis in spec.axes
        for segment in axis.layout
        for factor in segment
        if factor.parts is not None
        for group in groups_in(factor.parts)
    }
    return {group.id for group in spec.groups if not group.parents} - nested


class _Correlations:
    """Statistics of every group's units, all models' side by side."""

    def __init__(self, chosen: Mapping[str, Sequence[ObservationPoint]]) -> None:
        self._points = {group: [CrossStatistics(1) for _ in at] for group, at in chosen.items()}

    def add(self, seen: Sequence[Mapping[str, Sequence[Tensor]]]) -> None:
        """Add what the models showed on one batch."""
        for group, points in self._points.items():
            for number, point in enumerate(points):
                together = torch.cat([shown[group][number] for shown in seen], 1)
                point.update(together, [together])

    def of(self, group: str) -> Tensor:
        """Return the mean over points of the correlation of all units with all: (models · units)², float64."""
        return average_correlation(self._points[group], 0)


def _distinct(own: Weights, peers: Sequence[Weights], weights: Sequence[float]) -> tuple[list[Weights], list[float]]:
    """Return the models that differ and take part, own first if it does and peers by content, with their weights."""
    found: dict[str, tuple[Weights, float]] = {}
    for party, weight in zip((own, *peers), weights):
        if weight:
            first, before = found.get(digest := content_hash(party), (party, 0.0))
            found[digest] = (first, before + weight)
    ordered = sorted(found, key=lambda digest: (found[digest][0] is not own, digest))
    return [found[digest][0] for digest in ordered], [found[digest][1] for digest in ordered]


def _holds(layout: Layout, labels: Mapping[str, Tensor]) -> bool:
    return any(factor.group in labels for segment in layout for factor in segment)
