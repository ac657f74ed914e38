"""Turns an agent's weights into a snapshot, through the encoding in which they are sent.

So every reader has the same content, whatever form it received.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dimat.config import ExchangeConfig
from dimat.weights.encodings import encode_weights
from dimat.weights.snapshot import Form, Payload, record_bytes
from dimat.weights.tensors import record_tensors


class Recorder:
    """Records snapshots of one agent, one after the other.

    `store`: folder in which they are recorded.

    The encoding's error is kept, and added to the next snapshot (error feedback); with `delta` the next snapshot
    is a change to the one before, which includes the error by itself.
    """

    def __init__(self, store: Path, config: ExchangeConfig, *, durable: bool = True) -> None:
        self._store = store
        self._config = config
        self._durable = durable
        self._before: Path | None = None
        self._residual: dict[str, Tensor] = {}

    def record(self, weights: Mapping[str, Tensor]) -> tuple[Payload, tuple[Form, ...]]:
        """Record weights; return their payload, and the cheaper forms of it.

        Raises DataError if they cannot be written.
        """
        config = self._config
        if config.encoding == "fp32":
            return record_tensors(self._store, weights, durable=self._durable), ()
        before = self._before if config.delta and self._before is not None and self._before.exists() else None
        encoded = encode_weights(
            weights,
            config.encoding,
            after=before,
            residual=self._residual or None,
        )
        payload = record_tensors(self._store, encoded.weights, durable=self._durable)
        forms: tuple[Form, ...] = ()
        if encoded.data is not None:
            form = record_bytes(self._store, encoded.data, durable=self._durable)
            forms = (Form(config.encoding, form, "" if before is None else before.stem),)
        self._before = self._store / f"{payload.root}.safetensors"
        self._residual = {} if config.delta else encoded.residual
        return payload, forms

    def forget(self) -> None:
        """Start again: the weights do not continue those sent before."""
        self._before = None
        self._residual = {}
