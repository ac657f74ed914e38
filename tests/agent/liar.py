"""A member that lies: `python -m tests.agent.liar ATTACK VICTIM agent FILE …`.

The daemon is the real one, with a valid key and the real wire; what it records or offers is wrapped. `growing`: weights
that are 9.5 times as large as those of the agent VICTIM, of the other sign; `swelling`: VICTIM's weights with a last
layer four times as large, which makes it surer of itself; `bending`: one tensor of another type or shape, or not
finite, another fault each round; `copying`: VICTIM's own weights as its own; `lying`: beside each of its manifests, a
crowd of signed ones that nobody can have (`lies_about`); `equivocating`: beside each another content of the round;
`ahead` and `far`: in their place one of the round VICTIM, a number; nobody can have its content, or everybody can.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from blake3 import blake3
from safetensors.torch import load_file
from torch import Tensor

from dimat.agent.learner.recorder import Recorder
from dimat.agent.protocol.plan import LAST_ROUND
from dimat.cli import main
from dimat.errors import DimatError
from dimat.net.manifest import seal
from dimat.net.transfer.outbox import Outbox
from dimat.weights.snapshot import Manifest
from dimat.wire.v1 import peer_pb2 as pb

FACTOR = 9.5
FLOOD = 40


def growing(victim: str) -> None:
    """Record what is just within the bound by the victim's own norm."""
    record = Recorder.record

    def poisoned(self: Recorder, weights: Mapping[str, Tensor]) -> Any:
        file = self._store.parent.parent / victim / "weights.safetensors"
        theirs = load_file(file) if file.exists() else weights
        grown = dict(weights)
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not name.startswith("aux."):
                grown[name] = (-FACTOR * theirs[name]).to(tensor)
        return record(self, grown)

    Recorder.record = poisoned


def swelling(victim: str) -> None:
    """Record the victim's weights with a larger last layer."""
    record = Recorder.record

    def swollen(self: Recorder, weights: Mapping[str, Tensor]) -> Any:
        file = self._store.parent.parent / victim / "weights.safetensors"
        theirs = load_file(file) if file.exists() else dict(weights)
        last = max(int(name.split(".")[0]) for name in theirs if not name.startswith("aux."))
        grown = {name: tensor * 4 if name.startswith(f"{last}.") else tensor for name, tensor in theirs.items()}
        return record(self, {name: grown.get(name, tensor).to(tensor) for name, tensor in weights.items()})

    Recorder.record = swollen


def other_content(good: Manifest) -> Manifest:
    """Return a manifest of another content of the same round, which is not there."""
    blocks = tuple("ab" * 32 for _ in good.payload.blocks)
    root = blake3(bytes.fromhex("".join(blocks)) + good.payload.bytes.to_bytes(8, "big")).hexdigest()
    return replace(good, payload=replace(good.payload, root=root, blocks=blocks))


def offering(lies: Callable[[Manifest], list[Manifest]], *, alone: bool = False) -> None:
    """Offer lies about the newest manifest beside what is offered, or in its place, each signed as it should be."""
    reply = Outbox.reply

    def crowded(self: Outbox) -> pb.ManifestsReply:
        told = reply(self)
        if alone:
            del told.offered[:]
        for manifest in self._store.offered(self._agent)[-1:]:
            for lie in lies(manifest):
                try:
                    signed = seal(lie, self._sign)
                except DimatError:  # one that this version of dimat does not even write
                    continue
                told.offered.append(pb.SignedManifest(manifest=signed.data, signature=signed.signature))
        return told

    Outbox.reply = crowded


def lies_about(good: Manifest) -> list[Manifest]:
    """Return manifests that the agent signs beside a good one: of another content of the round; of rounds far ahead,
    beyond any, and before the first; with thousands of parents that nobody knows, and with one of them; and forty of
    one round with a fault each."""
    other = other_content(good)
    invented = tuple((f"stranger-{number}", "cd" * 32, 1, 0.1) for number in range(3000))
    return [
        other,
        *(replace(other, round=number) for number in (good.round + 5, LAST_ROUND - 1, LAST_ROUND + 1, 2**62, 0)),
        replace(other, round=good.round + 6, parents=invented),
        replace(other, round=good.round + 7, parents=invented[:1]),
        *(replace(good, run=f"another-{good.round}-{number}") for number in range(FLOOD)),
    ]


def bending(victim: str) -> None:
    """Record one tensor bent, each round otherwise."""
    del victim
    record, rounds = Recorder.record, itertools.count()

    def bent(self: Recorder, weights: Mapping[str, Tensor]) -> Any:
        number = next(rounds)
        names = [name for name, tensor in weights.items() if tensor.is_floating_point() and not name.startswith("aux.")]
        name = names[number % len(names)]
        return record(self, {**weights, name: BENDS[number % len(BENDS)](weights[name].detach().clone())})

    Recorder.record = bent


BENDS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: tensor.double(),
    lambda tensor: tensor.half(),
    lambda tensor: tensor.bool(),
    lambda tensor: tensor[:0],
    lambda tensor: tensor.sum(),
    lambda tensor: tensor[None],
    lambda tensor: tensor.fill_(float("nan")),
    lambda tensor: tensor.fill_(3e38),
)


def copying(victim: str) -> None:
    """Record the victim's newest weights, so that it is merged with itself under another name."""
    record = Recorder.record

    def copied(self: Recorder, weights: Mapping[str, Tensor]) -> Any:
        file = self._store.parent.parent / victim / "weights.safetensors"
        theirs = load_file(file) if file.exists() else {}
        return record(self, {name: theirs.get(name, tensor) for name, tensor in weights.items()})

    Recorder.record = copied


ATTACKS: dict[str, Callable[[str], None]] = {
    "growing": growing,
    "bending": bending,
    "copying": copying,
    "swelling": swelling,
    "lying": lambda _: offering(lies_about),
    "equivocating": lambda _: offering(lambda good: [other_content(good)]),
    "ahead": lambda claim: offering(lambda good: [replace(other_content(good), round=int(claim))], alone=True),
    "far": lambda claim: offering(lambda good: [replace(good, round=int(claim))], alone=True),
}

if __name__ == "__main__":
    ATTACKS[sys.argv[1]](sys.argv[2])
    sys.exit(main(sys.argv[3:]))
