"""PLeaS: layers against `torch.linalg.lstsq` on inputs read by hand, and what it promises on networks of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dimat import merge_weights
from dimat.errors import MergeError
from dimat.merge.combine.average import average
from dimat.merge.models.patches import Affine, as_blocks, blocks_of, input_rows
from dimat.merge.registry import combine_registry
from dimat.tasks.digits import digits
from tests.merge.methods import assert_same_bits, worst
from tests.merge.networks import LeNet, ResNet, UNet, Vgg, mlp, randomise
from tests.symmetry.zoo import Grouped, TiedText

Model = dict[str, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def random_weights(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Model:
    g = generator(seed)
    return {
        name: torch.randn(t.shape, generator=g).to(dtype) * (0.3 if t.ndim > 1 else 0.1) if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }


def pleas(model: nn.Module, data: list[Tensor], models: list[Model], mixing: list[float], **options: Any) -> Model:
    batches = [(x,) for x in data]
    return dict(combine_registry.call("pleas", options, models[0], models[1:], mixing, model=model, data=batches))


EXACT: dict[str, Any] = {"ridge": 0.0, "positions": None, "max_images": None}
"""Options under which nothing is left out."""


def fit(inputs: Tensor, outputs: Tensor, bias: bool) -> Tensor:
    """Return the least-squares map from rows to rows, its constant last: (in [+ 1], out)."""
    rows = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1) if bias else inputs
    return torch.linalg.lstsq(rows, outputs).solution


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_the_closed_form(bias: bool) -> None:
    """Reference: lstsq on the models' mean inputs and mean outputs, both layers, three models, unequal weights."""
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias)).double()
    models = [random_weights(model, seed, torch.float64) for seed in (1, 2, 3)]
    mixing = [0.5, 0.3, 0.2]
    data = [torch.randn(n, 5, generator=generator(n), dtype=torch.float64) for n in (40, 23)]
    found = pleas(model, data, models, mixing, **EXACT)
    x = torch.cat(data)
    hidden = [torch.tanh(F.linear(x, m["0.weight"], m.get("0.bias"))) for m in models]
    into = {"0": [x] * 3, "2": hidden}
    for layer, inputs in into.items():
        out = [F.linear(z, m[f"{layer}.weight"], m.get(f"{layer}.bias")) for z, m in zip(inputs, models)]
        mean = [sum(w * part for w, part in zip(mixing, parts)) for parts in (inputs, out)]
        expected = fit(*mean, bias)
        width = inputs[0].shape[1]
        torch.testing.assert_close(found[f"{layer}.weight"], expected[:width].T, rtol=1e-8, atol=1e-9)
        if bias:
            torch.testing.assert_close(found[f"{layer}.bias"], expected[width], rtol=1e-8, atol=1e-9)


CONVOLUTIONS: dict[str, Callable[[], Affine]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same"),  # one side of it is padded more, which torch warns of
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv1d(4, 8, 3, groups=4),
    "volume": lambda: nn.Conv3d(4, 6, 2, stride=2),
    "linear": lambda: nn.Linear(7, 6),
}


def image(layer: Affine, examples: int, seed: int) -> Tensor:
    dims = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    return torch.randn(examples, 4, *[7] * dims, generator=generator(seed), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_are_what_the_layer_s_matrix_is_applied_to(kind: str) -> None:
    """Reference: the layer itself; kept rows are those of all rows."""
    layer = built(CONVOLUTIONS[kind]).double()
    assert isinstance(layer, Affine)
    x = image(layer, 3, 0)
    rows = input_rows(layer, x, lambda numbers: numbers)
    out = (rows @ as_blocks(layer.weight, blocks_of(layer)).mT).transpose(0, 1).flatten(1)
    out = out if layer.bias is None else out + layer.bias
    expected = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    torch.testing.assert_close(out, expected.reshape(out.shape), rtol=1e-10, atol=1e-12)
    assert torch.equal(input_rows(layer, x, lambda numbers: numbers[1::3]), rows[:, 1::3])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_the_closed_form(kind: str) -> None:
    """Reference: the gradient of Σ ‖W Z̃ + c − Ỹ‖², taken through the layer itself by autograd, is zero.

    The first layer makes the inputs of the second differ between the models.
    """
    second = CONVOLUTIONS[kind]()
    first: nn.Module = nn.Linear(7, 7) if isinstance(second, nn.Linear) else type(second)(4, 4, 1)  # type: ignore
    model = built(lambda: nn.Sequential(first, nn.Tanh(), second)).double()
    models = [random_weights(model, seed, torch.float64) for seed in (1, 2)]
    x = image(second, 40, 1)
    found = pleas(model, [*x.split(15)], models, [0.6, 0.4], **EXACT)

    def into(weights: Model) -> Tensor:
        return torch.tanh(functional_call(first, {k[2:]: t for k, t in weights.items() if k.startswith("0.")}, x))

    def out(weights: Model, z: Tensor) -> Tensor:
        return functional_call(second, {k[2:]: t for k, t in weights.items() if k.startswith("2.")}, z)

    z = 0.6 * into(models[0]) + 0.4 * into(models[1])
    target = 0.6 * out(models[0], into(models[0])) + 0.4 * out(models[1], into(models[1]))

    def gradient(weights: Model) -> float:
        free = {k: t.clone().requires_grad_() for k, t in weights.items() if k.startswith("2.")}
        loss = (out(free, z) - target).square().sum()
        return max(float(g.abs().max()) for g in torch.autograd.grad(loss, [*free.values()]))

    start = gradient(dict(average(models[0], models[1:], [0.6, 0.4])))
    assert start > 1e-3
    assert gradient(found) < 1e-9 * start


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3, 4, 4)),
    "lenet": (LeNet, (3, 16, 16)),
    "vgg": (lambda: Vgg([8, "M", 12]), (3, 8, 8)),
    "resnet": (lambda: ResNet(1, (6, 8, 10)), (3, 8, 8)),
    "unet": (UNet, (3, 8, 8)),
    "grouped": (Grouped, (3, 16)),
}


def layer_errors(model: nn.Module, data: Tensor, models: list[Model], merged: Model) -> dict[str, float]:
    """Return ‖W Z̃ + c − Ỹ‖² of every layer that PLeaS fits, equal weights, by hooks of its own."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Affine)}
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []
    for weights in models:
        read: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            layer.register_forward_hook(lambda _, x, y, n=name, r=read: r.update({n: (x[0].double(), y.double())}))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            functional_call(model, weights, (data,))
        for handle in handles:
            handle.remove()
        seen.append(read)
    errors: dict[str, float] = {}
    for name, layer in layers.items():
        z, y = (sum(read[name][side] for read in seen) / len(seen) for side in (0, 1))
        own = {k.removeprefix(f"{name}."): t.double() for k, t in merged.items() if k.rpartition(".")[0] == name}
        with torch.no_grad():
            errors[name] = float((functional_call(layer, own, z) - y).square().sum())
    return errors


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_errs_less_than_the_average_s(name: str) -> None:
    """Its own objective, on the data that it saw; a model of weight 0 is ignored, and all else is averaged."""
    make, shape = NETWORKS[name]
    model = built(make)
    models = [{k: t.clone() for k, t in randomise(make(), seed).state_dict().items()} for seed in (1, 2, 3)]
    data = torch.randn(64, *shape, generator=generator())
    found = pleas(model, [data], models, [0.5, 0.5, 0.0], **EXACT)
    plain = dict(average(models[0], [models[1]], [0.5, 0.5]))
    before, after = (layer_errors(model, data, models[:2], weights) for weights in (plain, found))
    moved = {key.rpartition(".")[0] for key, tensor in found.items() if not torch.equal(tensor, plain[key])}
    assert moved == after.keys() - {next(iter(after))}  # the first layer takes in the same in all models
    for layer, error in after.items():
        assert error <= before[layer] * (1 + 1e-6) + 1e-6, layer
    assert sum(after.values()) < 0.9 * sum(before.values())
    sampled = pleas(model, [data], models, [0.5, 0.5, 0.0])
    assert sum(layer_errors(model, data, models[:2], sampled).values()) < sum(before.values())


def test_presets_merge_networks_of_different_classes_better_than_averaging() -> None:
    """Digits 0 to 4 and 5 to 9, two initialisations: accuracy on all ten. Both know 49 % at most on their own.

    Measured over three pairs of longer trained networks: average .43 to .58, dimat .45 to .48, zipit with a = b = 1
    .72 to .80, pleas .69 to .83.
    """
    task = digits(model="mlp")
    train, test = task.data("train"), task.data("test")
    everything = torch.arange(len(train))
    x, y = train.batch(everything)
    inputs, labels = test.batch(torch.arange(len(test)))
    models: list[Model] = []
    for seed, part in enumerate([(y < 5).nonzero()[:, 0], (y >= 5).nonzero()[:, 0]]):
        model = task.build_model(generator(seed))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for epoch in range(6):
            for batch in part[torch.randperm(len(part), generator=generator(epoch))].split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[0][batch]), y[batch]).backward()
                optimizer.step()
        models.append({k: t.detach().clone() for k, t in model.state_dict().items()})
    model = task.build_model(generator(9)).eval()
    data = list(x[0][torch.randperm(len(y), generator=generator(3))][:512].split(64))

    def accuracy(method: str, **options: Any) -> float:
        merged = merge_weights(models[0], [models[1]], [0.5, 0.5], method, model=model, data=data, **options)
        with torch.no_grad():
            return float((functional_call(model, merged, (inputs[0],)).argmax(1) == labels).float().mean())

    plain = max(accuracy("average"), accuracy("dimat"))
    assert accuracy("pleas") > plain + 0.1
    assert accuracy("zipit", a=1.0, b=1.0) > plain + 0.1


def test_layers_that_run_twice_and_shared_weights_gather_all_inputs() -> None:
    """Reference: lstsq on the rows of both runs; a weight that two layers share, each with a bias of its own, too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.more = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.more(torch.tanh(self.more(torch.tanh(self.two(torch.tanh(self.one(x)))))))

    model = Twice().double()
    models = [random_weights(model, seed, torch.float64) for seed in (1, 2)]
    for weights in models:
        weights["two.weight"] = weights["one.weight"]
    x = torch.randn(60, 4, generator=generator(), dtype=torch.float64)
    found = pleas(model, [*x.split(25)], models, [0.5, 0.5], **EXACT)
    assert torch.equal(found["one.weight"], found["two.weight"])

    def apply(z: Tensor, weights: Model, layer: str) -> Tensor:
        return F.linear(z, weights[f"{layer}.weight"], weights[f"{layer}.bias"])

    runs: list[list[tuple[Tensor, Tensor]]] = []
    for weights in models:
        z, steps = x, []
        for layer in ("one", "two", "more", "more"):
            steps.append((z, apply(z, weights, layer)))
            z = torch.tanh(steps[-1][1])
        runs.append(steps)
    mean = [tuple((a + b) / 2 for a, b in zip(*step)) for step in zip(*runs)]
    more = fit(*(torch.cat(side) for side in zip(*mean[2:])), bias=True)
    torch.testing.assert_close(found["more.weight"], more[:4].T, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found["more.bias"], more[4], rtol=1e-8, atol=1e-9)
    which = torch.eye(2, dtype=torch.float64).repeat_interleave(60, 0)  # one constant for each of the two layers
    shared = fit(torch.cat([torch.cat([mean[0][0], mean[1][0]]), which], 1), torch.cat([mean[0][1], mean[1][1]]), False)
    torch.testing.assert_close(found["one.weight"], shared[:4].T, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found["one.bias"], shared[4], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found["two.bias"], shared[5], rtol=1e-8, atol=1e-9)


def test_an_output_layer_tied_to_an_embedding_is_averaged() -> None:
    """An embedding is no linear map of what enters it; the other layers are fitted."""
    model = built(TiedText)
    models = [random_weights(model, seed) for seed in (1, 2)]
    for weights in models:
        weights["out.weight"] = weights["embedding.weight"]
    data = [torch.randint(0, 20, (50, 7), generator=generator())]
    found = pleas(model, data, models, [0.5, 0.5])
    plain = dict(average(models[0], models[1:], [0.5, 0.5]))
    assert torch.equal(found["out.weight"], plain["out.weight"])
    assert torch.equal(found["embedding.weight"], plain["embedding.weight"])
    assert worst({"up.weight": found["up.weight"]}, {"up.weight": plain["up.weight"]}) > 1e-3


def test_inputs_that_nobody_sees_keep_the_average() -> None:
    """A dead input, two equal ones, and fewer examples than inputs: no ridge, and still nothing blows up."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)).double()
    models = [random_weights(model, seed, torch.float64) for seed in (1, 2)]
    x = torch.randn(30, 6, generator=generator(), dtype=torch.float64)
    x[:, 2], x[:, 4] = 0, x[:, 3]
    plain = dict(average(models[0], models[1:], [0.5, 0.5]))
    found = pleas(model, [x], models, [0.5, 0.5], **EXACT)
    torch.testing.assert_close(found["0.weight"], plain["0.weight"], rtol=1e-9, atol=1e-9)  # all models see one input
    few = pleas(model, [x[:2]], models, [0.5, 0.5], **EXACT)
    assert all(t.abs().max() < 10 for t in few.values())


def test_equal_models_are_returned_as_they_are() -> None:
    """The difference is what is solved for: bit for bit, whatever the ridge."""
    make, shape = NETWORKS["resnet"]
    own = {k: t.clone() for k, t in randomise(make(), 1).state_dict().items()}
    data = [torch.randn(32, *shape, generator=generator())]
    assert_same_bits(pleas(built(make), data, [own, own, own], [0.4, 0.3, 0.3], ridge=0.0), own)


def test_the_model_is_left_as_it_is() -> None:
    """Mode, weights, running statistics, hooks, gradients wanted, and the global random state."""
    make, shape = NETWORKS["resnet"]
    model = built(make).train()
    next(model.parameters()).requires_grad_(False)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    models = [{k: t.clone() for k, t in randomise(make(), seed).state_dict().items()} for seed in (1, 2)]
    copies = [{k: t.clone() for k, t in weights.items()} for weights in models]
    state = torch.get_rng_state()
    pleas(model, [torch.randn(20, *shape, generator=generator())], models, [0.5, 0.5])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert_same_bits(model.state_dict(), before)
    for weights, copy in zip(models, copies):
        assert_same_bits(weights, copy)


def test_bad_data_are_said_in_one_line() -> None:
    """None at all, and values that are not finite: the error names a tensor."""
    model = built(mlp)
    models = [random_weights(model, seed) for seed in (1, 2)]
    with pytest.raises(MergeError, match="empty"):
        pleas(model, [], models, [0.5, 0.5])
    x = torch.randn(8, 3, 4, 4, generator=generator())
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(MergeError, match=r"'1\.weight' are not finite"):
        pleas(model, [x], models, [0.5, 0.5])
