"""Learn To be Efficient: its losses by hand, its routing, and that a model trained with it reads less the more it
should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the `train` extra")

import torch

from fewfire import reference
from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.config import ModelConfig
from fewfire.model import Model
from fewfire.pack import pack
from fewfire.packed import open_packed
from fewfire.selectors.scores import Linear
from fewfire.train.corpus import Corpus
from fewfire.train.export import write
from fewfire.train.log import NAME as LOG
from fewfire.train.lte import Lte, Routed, efficiency, fitted, separability
from fewfire.train.method import Method
from fewfire.train.network import Network
from fewfire.train.teacher import TeacherCache
from fewfire.train.trainer import Plan, Trainer
from tiny import prompt, write_tiny

# --- losses and routing -----------------------------------------------------------------------------------------------


def test_efficiency_by_hand() -> None:
    """Two tokens, two experts: (0.5² + 1² + 0² + 0.2²) / 4; its gradient is 2 G / 4."""
    scores = torch.tensor([[0.5, 1.0], [0.0, 0.2]], requires_grad=True)
    loss = efficiency(scores)
    loss.backward()
    assert loss.item() == pytest.approx(1.29 / 4)
    assert scores.grad is not None
    np.testing.assert_allclose(scores.grad, [[0.25, 0.5], [0.0, 0.1]], atol=1e-7)


def test_separability_by_hand() -> None:
    """1 / ((G - 0.5)² + 0.01): 100 on the threshold, 50 at a distance of 0.1, and away from there on either side."""
    scores = torch.tensor([0.5, 0.6, 0.4, 1.0], requires_grad=True)
    loss = separability(scores)
    loss.backward()
    assert loss.item() == pytest.approx((100 + 50 + 50 + 1 / 0.26) / 4, rel=1e-5)
    # -2 (G - 0.5) / ((G - 0.5)² + 0.01)² / 4
    expected = [0, -2 * 0.1 / 0.02**2 / 4, 2 * 0.1 / 0.02**2 / 4, -2 * 0.5 / 0.26**2 / 4]
    assert scores.grad is not None
    np.testing.assert_allclose(scores.grad, expected, rtol=1e-4)


def test_routing_by_hand() -> None:
    """Three neurons in two groups, (2, 0) and (1,), one token with scores of log 3 and of -log 4."""
    scores = Linear(np.array([[1, 0], [0, 1]], np.float32), np.array([0, 0], np.float32))
    part = Routed(torch.nn.ReLU(), np.array([2, 0, 1]), scores)
    x, gate = torch.tensor([[np.log(3.0), -np.log(4.0)]], dtype=torch.float32), torch.tensor([[10.0, 100.0, -1.0]])
    part.train()
    part.look(x)
    np.testing.assert_allclose(part(gate).detach(), [[7.5, 20.0, 0.0]], rtol=1e-6)
    part.look(x)
    part.hard = True
    np.testing.assert_array_equal(part(gate).detach(), [[10.0, 0.0, 0.0]])
    part.hard = False
    part.eval()
    part.look(x)
    np.testing.assert_array_equal(part(gate).detach(), [[10.0, 0.0, 0.0]])
    np.testing.assert_array_equal(part(gate).detach(), [[10.0, 100.0, 0.0]], "up values are not routed again")


class Ffn(torch.nn.Module):
    """What a layer does with its router."""

    def __init__(self, part: Routed) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        self.part.look(x)
        return self.part(gate)


def test_gradients_of_soft_routing(random: np.random.Generator) -> None:
    """By all that it depends on, against differences."""
    scores = Linear(random.standard_normal((3, 4)), random.standard_normal(3))
    ffn = Ffn(Routed(torch.nn.SiLU(), random.permutation(7), scores)).double().train()
    inputs = [torch.tensor(random.standard_normal(shape), requires_grad=True) for shape in ((2, 4), (2, 7))]

    def routed(x: torch.Tensor, gate: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(("part.weight", "part.bias"), weights, strict=True))
        return torch.func.functional_call(ffn, named, (x, gate))

    assert torch.autograd.gradcheck(routed, (*inputs, ffn.part.weight, ffn.part.bias))


# --- training ---------------------------------------------------------------------------------------------------------

TOKENS, WINDOW = 64, 24
SHAPES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 2}


def sentences(count: int, seed: int) -> np.ndarray:
    """A little language, `(count, WINDOW)`: on each of four topics, every word is followed by one of two others."""
    follow = np.random.default_rng(1).integers(3, TOKENS, (4, TOKENS, 2))
    random = np.random.default_rng(seed)
    topic, found = random.integers(4, size=count), np.zeros((count, WINDOW), np.int32)
    found[:, 0] = 3 + topic
    for i in range(1, WINDOW):
        found[:, i] = follow[topic, found[:, i - 1], random.integers(2, size=count)]
    return found


CORPUS = Corpus(sentences(800, seed=2), sentences(32, seed=3))


def tensors_of(network: Network) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy().copy() for k, v in network.state_dict().items()}


def run(network: Network, method: Method, directory: Path, steps: int, rate: float, stop: int = 0) -> list[Any]:
    """Trains on the text itself; returns the log."""
    teacher = TeacherCache(directory / "teacher", network, CORPUS.windows, 1, "none")
    plan = Plan(steps=steps, rate=rate, batch=16, at_once=16, labels=1.0, measured=1)
    trainer = Trainer(network, CORPUS, teacher, method, plan, directory / "run", {})
    if stop:
        real, done = trainer._train, 0

        def until() -> None:
            nonlocal done
            if done == stop:
                raise KeyboardInterrupt
            real()
            done += 1

        trainer._train = until  # type: ignore[method-assign]
    trainer.run()
    return [json.loads(line) for line in (directory / "run" / LOG).read_text().splitlines()]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, np.ndarray], float]:
    """A tiny model that was trained from scratch: the checkpoint it began as, its weights, its perplexity."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("learnt")
    checkpoint = open_checkpoint(write_tiny("llama-tied", directory / "model", **SHAPES))
    network = Network.from_checkpoint(checkpoint)
    log = run(network, Method(), directory, 150, 4e-3)
    return checkpoint, tensors_of(network), log[-1]["perplexity"]


Lesson = Callable[..., tuple[Network, Lte, list[Any]]]


@pytest.fixture
def lesson(learnt: tuple[Checkpoint, dict[str, np.ndarray], float], tmp_path: Path) -> Lesson:
    """Trains it on with LTE."""

    def teach(name: str, steps: int = 40, stop: int = 0, **weights: float) -> tuple[Network, Lte, list[Any]]:
        torch.manual_seed(0)
        network = Network(learnt[0].config, {k: v.copy() for k, v in learnt[1].items()})
        method = Lte(network, CORPUS.windows[:64], steps, **weights)
        return network, method, run(network, method, tmp_path / name, steps, 2e-3, stop)

    return teach


def undecided(method: Lte) -> float:
    """The share of scores near the threshold, of the last measured windows."""
    scores = torch.cat([part.scores.flatten() for part in method._parts])
    return float(((scores - 0.5).abs() < 0.2).float().mean())


def test_it_learns_to_be_efficient(learnt: Any, lesson: Lesson) -> None:
    """The more efficiency weighs, the fewer groups are kept; the model learns to do without the others."""
    assert learnt[2] < 4
    density, perplexity = [], []
    for weight in (0.0, 1.0, 4.0):
        _, _, log = lesson(f"efficiency-{weight}", efficiency=weight)
        density.append(1 - log[-1]["zeros"])
        perplexity.append(log[-1]["perplexity"])
        before, first, last = log[0], log[1], log[-2]
        assert perplexity[-1] < before["perplexity"] * (1 if weight < 4 else 1.1)
        assert "efficiency" in first
        assert "efficiency" not in last, "stage 2 has the task's loss alone"
        assert last["density"] == pytest.approx(density[-1], abs=0.06)
    print(density, perplexity, learnt[2])
    assert density[0] > density[1] + 0.05
    assert density[1] > density[2] + 0.05
    assert perplexity[1] < 1.05 * learnt[2]


def test_scores_keep_away_from_the_threshold(lesson: Lesson) -> None:
    without, with_ = (undecided(lesson(f"s{w}", efficiency=0.5, separability=w)[1]) for w in (0.0, 0.02))
    print(without, with_)
    assert with_ < 0.8 * without


def test_routers_stay_as_they_are_in_the_second_stage(lesson: Lesson) -> None:
    """And all else goes on learning."""
    network, method, _ = lesson("half", steps=20, stop=0, efficiency=1.0)
    assert all(part.hard for part in method._parts)
    before = {k: v.clone() for k, v in network.named_parameters()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network.train()
    hidden = network.hidden(torch.from_numpy(CORPUS.windows[:4].astype(np.int64)), method.observe)
    network.logits(hidden).square().mean().backward()
    optimizer.step()
    for name, value in network.named_parameters():
        same = torch.equal(value, before[name])
        assert same == (".activation." in name), name


@pytest.mark.parametrize("stop", [5, 14])
def test_a_killed_run_goes_on_as_if_nothing_was(stop: int, lesson: Lesson) -> None:
    """In either stage."""
    whole = lesson("whole", steps=20, efficiency=1.0)[2]
    with pytest.raises(KeyboardInterrupt):
        lesson("killed", steps=20, stop=stop, efficiency=1.0)
    again = lesson("killed", steps=20, efficiency=1.0)[2]
    for one, other in zip(whole, again, strict=True):
        one.pop("seconds", None), other.pop("seconds", None)
        assert one == other


def test_what_comes_out_runs_in_the_engine(lesson: Lesson, learnt: Any, tmp_path: Path) -> None:
    """Prefill and decode of the packed model give what the network gives, and read no more than the routers ask for."""
    network, method, _ = lesson("engine", efficiency=2.0)
    write(network, learnt[0], method.result(), tmp_path / "out")
    model = Model(open_packed(pack(tmp_path / "out", tmp_path / "packed", "f32")), 1)
    ids = CORPUS.held_out[0].tolist()
    network.eval()
    with torch.no_grad():
        theirs = network(torch.tensor([ids]))[0].numpy()
    assert np.abs(model.logits(ids) - theirs).max() < 0.02, "matrices are stored in float16"
    session = model.session()
    assert np.abs([session.feed([i]) for i in ids] - theirs).max() < 0.02
    kept = [int((part.scores[0, -1] > 0.5).sum()) for part in method._parts]
    assert model.engine.neurons_read()[:, 0].tolist() == [32 * n for n in kept]
    assert sum(kept) < 16


@pytest.mark.parametrize("family", ["llama", "bamboo", "opt", "gemma3", "llama-norm-relu", "llama-fatsilu"])
def test_routers_of_every_family(family: str, tmp_path: Path) -> None:
    """At first about the wanted share is on, and a network routes as the reference does with groups left out."""
    checkpoint = open_checkpoint(write_tiny(family, tmp_path, intermediate_size=160))
    network = Network.from_checkpoint(checkpoint)
    windows = np.array([prompt(64, seed=seed) for seed in range(4)])
    method = Lte(network, windows, 10, density=0.5)
    network.eval()
    ids = prompt(20)
    with torch.no_grad():
        ours = network(torch.tensor([ids]))[0].numpy()
    real, weights = reference.neurons, {k: checkpoint.read(k) for k in checkpoint.config.shapes()}

    def chosen(config: ModelConfig, tensors: Any, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        gate, up = real(config, tensors, layer, x)
        part = method._parts[layer]
        scores = x @ part.weight.detach().numpy().T + part.bias.detach().numpy()
        return np.where((scores > 0) @ part.belongs.numpy() > 0, gate, 0), up

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "neurons", chosen)
        theirs = reference.forward(checkpoint.config, weights, ids)
    assert np.abs(ours - theirs).max() < 2e-4
    on = np.mean([(part.scores > 0.5).float().mean() for part in method._parts])
    assert 0.3 < on < 0.8


def test_what_is_fitted(tmp_path: Path) -> None:
    """A share of the groups in all layers together; a layer in which little matters keeps less."""
    source = write_tiny("llama", tmp_path, intermediate_size=160)
    network = Network.from_checkpoint(open_checkpoint(source))
    with torch.no_grad():
        network.layers[1].down.weight *= 0.05
    windows = np.array([prompt(64, seed=seed) for seed in range(6)])
    found = fitted(network, windows, 0.5)
    assert [len(members) for members, _ in found] == [160] * 3
    assert all((np.sort(members) == np.arange(160)).all() for members, _ in found)
    assert [scores.rows.shape for _, scores in found] == [(5, 64)] * 3
    assert found[1][1].bias.max() < min(found[0][1].bias.min(), found[2][1].bias.min())
