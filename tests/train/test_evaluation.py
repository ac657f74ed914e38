"""Evaluation of a model. References: torch's own loss on the whole data at once, another trainer with the weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dimat.errors import DataError
from tests.train.test_trainer import assert_same, trainer


def test_evaluation_matches_a_plain_computation_and_disturbs_nothing() -> None:
    one = trainer(eval_batch_size=16)
    one.train(1)
    one.model.train()
    one.model.bn.eval()
    before = one.state()
    result = one.evaluate(one.data)
    assert_same(one.state(), before)
    assert one.model.training
    assert not one.model.bn.training
    one.model.eval()
    batch = one.data.batch(torch.arange(70))
    logits = one.model(*batch.inputs)
    nll = F.cross_entropy(logits, batch.targets).item()
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["loss"] == pytest.approx(nll, rel=1e-5)
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == batch.targets).float().mean().item())


def test_evaluating_other_weights_does_not_keep_them() -> None:
    one, other = trainer(), trainer(seed=1)
    other.train(1)
    before = one.state()
    assert one.evaluate(one.data, other.weights()) == other.evaluate(one.data)
    assert_same(one.state(), before)
    short = other.weights()
    del short["bn.running_mean"]
    with pytest.raises(DataError, match=r"lack bn\.running_mean"):
        one.evaluate(one.data, short)
