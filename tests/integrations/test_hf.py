"""An agent beside Hugging Face's `Trainer`. References: the trainer without it; means of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dimat.agent.attach import Agent
from dimat.errors import ConfigError
from tests.agent.attach.test_own_loops import both
from tests.agent.attach.test_part import of_extra
from tests.agent.own_loop import STEPS, experiment

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]  # the libraries' own advice


class Sentences(Dataset[dict[str, Tensor]]):
    """Token ids of unequal length; the class is whether the first id is large."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 9, (96,), generator=draw).tolist()
        self.ids = [torch.randint(1, 40, (n,), generator=draw) for n in lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": (self.ids[index][0] > 20).long()}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.stack([i["labels"] for i in items])}


def trainer(folder: Path, seed: int, callbacks: list[Any], **more: Any) -> Any:
    transformers = of_extra("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
    )
    args = transformers.TrainingArguments(
        output_dir=str(folder / f"hf{seed}"),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=seed,
        **{"max_steps": 1000, **more},
    )
    return transformers.Trainer(
        model=transformers.BertForSequenceClassification(config),
        args=args,
        train_dataset=Sentences(seed),
        data_collator=collate,
        callbacks=callbacks,
    )


def beside(file: Path, folder: Path, name: str) -> Any:
    from dimat.integrations import TrainerCallback

    return TrainerCallback(file, (f"agent.folder='{folder}'",), name=name, follow=[])


def test_two_trainers_end_with_one_model(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: equal weights after the last merge, of batches by name and of unequal length; each stops when its
    agent is through."""
    of_extra("transformers")
    file = experiment(tmp_path, dict(zip("ab", free_ports)), merge='method = "dimat"')
    # Made one after the other: accelerate keeps one state a process and empties it while a trainer is made.
    ends = {name: trainer(tmp_path, seed, [beside(file, tmp_path / name, name)]) for seed, name in enumerate("ab")}

    def loop(name: str) -> Any:
        def go(_: Agent) -> int:
            ends[name].train()
            return int(ends[name].state.global_step)

        return go

    assert both(file, {name: loop(name) for name in "ab"}) == dict.fromkeys("ab", 3 * STEPS)
    a, b = (dict(ends[name].model.named_parameters()) for name in "ab")
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def test_trainers_with_other_tokenizers_refuse_each_other(tmp_path: Path, free_ports: list[int]) -> None:
    """Two tokens that changed places: the vocabulary of the trainer's `processing_class` is compared, unasked."""
    transformers = of_extra("transformers")
    tokenizers = of_extra("tokenizers")
    words = [f"w{i}" for i in range(40)]
    file = experiment(
        tmp_path,
        dict(zip("ab", free_ports)),
        merge='method = "average"',
        schedule="rounds = 1\nround_deadline_s = 3",
    )
    told: dict[str, list[Any]] = {"a": [], "b": []}
    ends: dict[str, Any] = {}
    for name, order in (("a", words), ("b", [words[1], words[0], *words[2:]])):
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(order, range(40))), unk_token="w39"))
        callback = beside(file, tmp_path / name, name)
        make = callback.beside._make

        def listened(make: Any = make, name: str = name) -> Agent:
            agent = make()
            agent.listeners.append(told[name].append)
            return agent

        callback.beside._make = listened
        ends[name] = trainer(tmp_path, 0, [callback])
        ends[name].processing_class = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
        ends[name].callback_handler.processing_class = ends[name].processing_class
    both(file, {name: lambda _, name=name: ends[name].train() for name in "ab"})
    for events in told.values():
        reasons = [fact.reason for fact in events if type(fact).__name__ == "PeerRefused"]
        assert reasons
        assert all("tokenizer" in reason and "40 tokens, hash" in reason for reason in reasons)


def test_a_trainer_with_an_agent_alone_trains_as_without(tmp_path: Path, free_ports: list[int]) -> None:
    """Reference: the same trainer without the callback, bit for bit: order of batches, dropout and learning rate."""
    of_extra("transformers")
    from dimat.integrations import TrainerCallback

    schedule = "rounds = 2\nround_deadline_s = 0.5"
    file = experiment(tmp_path, dict(zip("ab", free_ports)), schedule=schedule, merge='method = "average"')
    options = (f"agent.folder='{tmp_path / 'a'}'", "agent.linger_s=0.1")
    plain = trainer(tmp_path, 0, [], max_steps=2 * STEPS)
    beside = trainer(tmp_path, 0, [TrainerCallback(file, options, name="a")], max_steps=2 * STEPS)
    for each in (plain, beside):
        torch.manual_seed(7)
        each.train()
    assert beside.state.global_step == 2 * STEPS
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(beside.model.state_dict()[name], tensor), name


def test_a_trainer_of_an_agent_that_is_through_leaves_the_model_as_it_is(tmp_path: Path, free_ports: list[int]) -> None:
    """`Trainer` makes a step before it looks whether to stop: weights, buffers and moments stay the last merge's."""
    of_extra("transformers")
    from dimat.integrations import TrainerCallback

    schedule = "rounds = 2\nround_deadline_s = 0.5"
    file = experiment(tmp_path, dict(zip("ab", free_ports)), schedule=schedule, merge='method = "average"')
    options = (f"agent.folder='{tmp_path / 'a'}'", "agent.linger_s=0.1")
    ends = []

    def count(module: nn.Module, _: Any) -> None:
        module.steps_seen += module.training

    for seed in (0, 1):
        one = trainer(tmp_path, seed, [TrainerCallback(file, options, name="a", follow=[])], weight_decay=0.1)
        one.model.register_buffer("steps_seen", torch.zeros(()))
        one.model.register_forward_pre_hook(count)
        one.train()
        ends.append(one)
    assert ends[0].state.global_step == 2 * STEPS
    for name, tensor in ends[0].model.state_dict().items():
        assert torch.equal(ends[1].model.state_dict()[name], tensor), name
    for (name, a), b in zip(ends[0].model.named_parameters(), ends[1].model.parameters(), strict=True):
        assert torch.equal(ends[0].optimizer.state[a]["exp_avg"], ends[1].optimizer.state[b]["exp_avg"]), name


def test_the_context_leaves_where_training_raises(tmp_path: Path, free_ports: list[int]) -> None:
    """`Trainer` does not tell callbacks of a fault; the agent must not stay behind as one that never publishes."""
    of_extra("transformers")
    from dimat.integrations import TrainerCallback

    class Fails(Sentences):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if self.gone:
                raise KeyError("the disk is gone")
            return super().__getitem__(index)

        gone = False

    file = experiment(tmp_path, dict(zip("ab", free_ports)), merge='method = "average"')
    one = trainer(tmp_path, 0, [])
    one.train_dataset = Fails(0)
    with TrainerCallback(file, (f"agent.folder='{tmp_path / 'a'}'",), name="a") as callback:
        one.add_callback(callback)
        begin = callback.on_train_begin

        def breaks(*args: Any, **named: Any) -> None:
            begin(*args, **named)
            one.train_dataset.gone = True

        callback.on_train_begin = breaks
        with pytest.raises(KeyError, match="the disk is gone"):
            one.train()
        agent = callback.beside.agent
        assert agent is not None
        assert not agent.done
    assert agent.done
    assert callback.beside.agent is None


def test_several_processes_and_a_wrong_file_are_refused(tmp_path: Path) -> None:
    of_extra("transformers")
    from dimat.integrations import TrainerCallback
    from dimat.integrations.beside import Beside

    with pytest.raises(ConfigError, match="cannot read"):
        TrainerCallback(tmp_path / "none.toml", name="a")
    beside = Beside(experiment(tmp_path, {"a": 1}), name="a")
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="4 processes train this model"):
        beside.begin(model, [torch.optim.SGD(model.parameters())], [], 4)
    with pytest.raises(ConfigError, match="give the callback data="):
        beside.begin(model, [torch.optim.SGD(model.parameters())], None, 1)
