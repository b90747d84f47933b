"""The analysis against activations made by hand, and against what the engine reads."""

import json

import numpy as np
import pytest

import fewfire
from fewfire.analyze import MAGNITUDES, Analysis, analyze, measure
from fewfire.observe import Layer, Observation
from fewfire.packed import Packed, open_packed
from fewfire.quantize import encode
from fewfire.selectors import Predictor, Selection
from fewfire.selectors.predicted import predicted
from tiny import FAMILIES, prompt

WINDOWS = [prompt(40), prompt(9, seed=1)]


def layer(fired: np.ndarray, down: np.ndarray | None = None, gate: np.ndarray | None = None) -> Layer:
    nothing = np.zeros((len(fired), 2), np.float32)
    down = np.ones((2, fired.shape[1]), np.float32) if down is None else down
    gate = fired if gate is None else gate
    return Layer(3, nothing, nothing, nothing, gate, None, fired, nothing, {"down.weight": down})


def test_a_layer_by_hand():
    fired = np.array([[10, 0, 0, 0.05], [0, 3, 0, 4], [0, 0, 0, 0]], np.float32)
    found = measure(layer(fired), [3], exact=True)
    assert (found.number, found.zeros, found.gate_zeros) == (3, 8 / 12, 8 / 12)
    assert found.small == pytest.approx(5 / 12)  # three of the first token, two of the second; none of nothing
    assert found.energy == pytest.approx((2 / 12, 3 / 12, 3 / 12))
    assert found.output_energy == found.energy
    assert found.active == pytest.approx(4 / 12)
    assert (found.never, found.often) == (1 / 4, 1 / 4)
    assert found.kept == 1 / 2
    assert found.jaccard == pytest.approx(1 / 5)
    assert found.aggregated == pytest.approx({1: 4 / 12, 2: 3 / 4})
    assert found.by_position == pytest.approx({"0": 1 / 2, "1-7": 1 / 4})
    assert sum(found.magnitudes) == pytest.approx(4 / 12)
    assert len(found.energy_curve) == 101


def test_active_means_holding_the_energy_where_nothing_is_zero():
    fired = np.array([[10, 0.1, 0.1, 0.05], [-3, 3, 0.1, -3]], np.float32)
    found = measure(layer(fired), [2], exact=False)
    assert found.zeros == 0
    assert found.active == pytest.approx((1 + 3) / 8)
    assert found.energy[1] == found.active
    assert found.kept == 1 / 3


def test_the_outputs_energy_counts_the_down_rows():
    fired = np.array([[1, 1, 1, 1]] * 2, np.float32)
    found = measure(layer(fired, np.array([[10, 0, 1, 0], [0, 1, 0, 1]], np.float32)), [2], exact=False)
    assert found.energy == (0.5, 1, 1)
    assert found.output_energy == (0.25, 0.25, 0.75)


def test_zeros_of_the_gate_and_of_both():
    gate = np.array([[1, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    up = np.array([[0, 1, 1, 1], [1, 1, 0, 1]], np.float32)
    found = measure(layer(gate * up, gate=gate), [2], exact=True)
    assert found.gate_zeros == 3 / 8
    assert found.zeros == 5 / 8


@pytest.mark.parametrize("family", ["llama-relu", "sparsellama", "opt", "bamboo"])
def test_zeros_are_what_the_engine_does_not_read(family, packed_path):
    model = fewfire.load(packed_path(family, "f32"), threads=1)
    found = analyze(model.packed, WINDOWS[:1])
    assert found.exact
    session, read = model.session(), []
    for token in WINDOWS[0]:
        session.feed([token])
        read.append(model.engine.neurons_read()[:, 1] / found.neurons)
    assert [1 - row.gate_zeros for row in found.layers] == pytest.approx(np.mean(read, axis=0), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, packed_path):
    packed = open_packed(packed_path(family, "q4"))
    found = analyze(packed, WINDOWS)
    assert (found.tokens, found.windows, found.weights, found.neurons) == (49, 2, "q4", 96)
    assert found.exact == (found.layers[0].zeros > 0.2)
    assert [row.number for row in found.layers] == [0, 1, 2]
    for row in found.layers:
        assert 0 < row.energy[0] < row.energy[1] < row.energy[2] <= 1
        assert row.active == pytest.approx(1 - row.zeros if found.exact else row.energy[1], abs=1e-6)
        assert row.aggregated[1] == pytest.approx(row.active)
        assert list(row.aggregated) == [1, 2, 4, 8, 16, 32]
        assert all(np.diff(list(row.aggregated.values())) >= 0)
        assert sum(row.magnitudes) == pytest.approx(1 - row.zeros)
        assert len(row.magnitudes) == len(MAGNITUDES) - 1
    mean = found.mean()
    assert mean.kept == pytest.approx(np.mean([row.kept for row in found.layers]))
    assert mean.by_position["0"] == pytest.approx(np.mean([row.by_position["0"] for row in found.layers]))


def test_json(packed_path):
    data = json.loads(
        json.dumps(analyze(open_packed(packed_path("llama-relu", "q4")), WINDOWS).to_dict(), allow_nan=False)
    )
    assert set(Analysis.__dataclass_fields__) <= set(data)
    assert data["active_means"] == "h is not zero"
    assert data["axes"]["shares_of_energy"] == [0.5, 0.9, 0.99]
    assert data["mean"]["active"] == pytest.approx(np.mean([row["active"] for row in data["layers"]]))
    assert "90%" in analyze(open_packed(packed_path("llama", "q4")), WINDOWS).meaning


def everything(packed: Packed, **bias: float) -> Predictor:
    """A predictor that knows the gate rows themselves, a group for each neuron, in another order."""
    c = packed.config
    order = np.stack([np.random.default_rng(i).permutation(c.intermediate_size) for i in range(c.num_hidden_layers)])
    rows = np.stack([packed.arrays["gate"][i][order[i]] for i in range(c.num_hidden_layers)])
    return Predictor(rows, np.full(order.shape, bias.get("bias", 0.0), np.float32), order.astype(np.int32))


@pytest.mark.parametrize("weights", ["f32", "q8"])
def test_a_predictor_that_knows_everything(weights, packed_path):
    packed = open_packed(packed_path("llama-relu", weights))
    for row in analyze(packed, WINDOWS, selection=Selection("lowrank", predictor=everything(packed))).layers:
        assert row.predictor == pytest.approx((1, 1, row.active), abs=2e-3)
    doubting = Selection("lowrank", predictor=everything(packed, bias=-0.5))
    for row in analyze(packed, WINDOWS, selection=doubting).layers:
        assert row.predictor.precision == 1
        assert 0.2 < row.predictor.recall < 0.9
        assert row.predictor.density == pytest.approx(row.predictor.recall * row.active)
    always = analyze(packed, WINDOWS, selection=Selection("lowrank", predictor=everything(packed, bias=np.inf)))
    assert always.mean().predictor == pytest.approx((1, always.mean().active, 1))


def test_a_predictor_is_judged_by_the_thresholds_that_follow_it(packed_path):
    packed = open_packed(packed_path("llama-relu", "f32"))
    limits = np.full((3, 96), 0.5, np.float32)
    chosen = Selection("lowrank + gate", gate=limits, predictor=everything(packed, bias=-0.5))
    for row in analyze(packed, WINDOWS, selection=chosen).layers:
        assert row.predictor == pytest.approx((1, 1, row.predictor.density), abs=2e-3)
    chosen = Selection("lowrank + down", down=limits, predictor=everything(packed))
    for row in analyze(packed, WINDOWS, selection=chosen).layers:
        assert row.predictor.recall == pytest.approx(1)
        assert row.predictor.precision < 0.6
    assert analyze(packed, WINDOWS, selection=Selection("gate", gate=limits)).layers[0].predictor is None


def test_groups_and_a_basis(packed_path):
    """Two groups of unequal size that look at one direction of the FFN's input."""
    packed = open_packed(packed_path("llama-relu", "f32"))
    direction = np.random.default_rng(0).standard_normal((3, 1, 64)).astype(np.float32)
    basis = np.stack([encode(each, "f32", "dot") for each in direction])
    ones = np.array([[1.0], [-1.0]], np.float32)
    rows = np.stack([encode(ones, "f32", "dot")] * 3)
    members = np.tile(np.arange(96, dtype=np.int32)[::-1], (3, 1))
    predictor = Predictor(rows, np.zeros((3, 2), np.float32), members, basis)
    for layer in Observation(packed, WINDOWS):
        first = layer.ffn_in @ direction[layer.number, 0] > 0
        mask = predicted(predictor, packed.formats, layer)
        assert mask.shape == (49, 96)
        np.testing.assert_array_equal(mask[:, 48:], np.repeat(first[:, None], 48, axis=1))
        np.testing.assert_array_equal(mask[:, :48], np.repeat(~first[:, None], 48, axis=1))


def test_needs_two_tokens_in_a_row(packed_path):
    packed = open_packed(packed_path("llama", "q4"))
    for windows in ([], [[5]], [[5], [6]]):
        with pytest.raises(ValueError, match="two tokens"):
            analyze(packed, windows)
