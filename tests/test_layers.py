import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from routings import ENGINES, WITH_VOTES
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import engines, passing, reference
from graphcaps.layers import NonFinitePosesError
from graphcaps.routing import EdgesWithoutVotes
from graphcaps.structure import BATCH_SIZES_KEPT, Structure

every_engine = pytest.mark.parametrize("engine", ENGINES)


def small_layer(engine="auto", **changes):
    return gc.CapsuleLayer(
        gc.complete_graph(6, 3), child_dim=4, parent_dim=5, engine=engine, **changes
    )


@every_engine
def test_nothing_routed_is_kept_between_calls(engine):
    layer = small_layer(engine)
    u = torch.randn(2, 6, 4)
    first = layer(u)
    layer(10 * torch.randn(2, 6, 4))
    assert torch.equal(layer(u), first)


@pytest.mark.parametrize("engine", ["udf", "builtin"])
def test_what_an_engine_prepares_is_made_once_per_batch_size(engine, monkeypatch):
    layer, built = small_layer(engine), []

    class Counted(passing.ENGINES[engine]):
        def __init__(self, structure, samples, device):
            built.append(samples)
            super().__init__(structure, samples, device)

    monkeypatch.setitem(passing.ENGINES, engine, Counted)
    for size in (2, 2, 3, 2, 3):
        layer(torch.randn(size, 6, 4))
    assert built == [2, 3]
    for size in range(4, 20):
        layer(torch.randn(size, 6, 4))
    assert len(layer.structure._kept_for_batch) == BATCH_SIZES_KEPT


class Operations(NamedTuple):
    """Stands in for an engine; DGL's graphs cannot move to the meta device."""

    structure: Structure
    samples: int
    device: torch.device


def test_operations_are_kept_for_each_engine_batch_size_and_device_apart(monkeypatch):
    structure = Structure(any_graph())
    for engine in WITH_VOTES:
        for samples in (2, 3):
            made = passing.passing_on(structure, engine, samples, torch.device("cpu"))
            assert type(made) is passing.ENGINES[engine]
            assert made.samples == samples
    monkeypatch.setitem(passing.ENGINES, "udf", Operations)
    for device in map(torch.device, ("cpu", "meta")):
        made = passing.passing_on(structure, "udf", 4, device)
        assert made == Operations(structure, 4, device)
        assert passing.passing_on(structure, "udf", 4, device) is made


def test_what_is_kept_of_a_graph_is_kept_for_each_device_apart():
    structure = Structure(any_graph())
    for device in map(torch.device, ("cpu", "meta")):
        assert structure.groups("child", device).index.device == device
        assert structure.numbers("parent_type", device).device == device
        assert structure.degree(device).device == device
        u, weight = torch.zeros(2, 4, 4, device=device), torch.zeros(3, 4, 5, device=device)
        edges = EdgesWithoutVotes(structure, u, weight, rows=1)
        assert edges.sorted.tensors[0].device == device


def test_engines_differ_in_no_checkpoint_and_may_be_changed():
    layer = small_layer("udf")
    u = torch.randn(2, 6, 4)
    expected = layer(u)
    assert list(layer.state_dict()) == ["weight"]
    for engine in ENGINES:
        other = small_layer(engine)
        other.load_state_dict(layer.state_dict())
        layer.engine = engine
        assert_close(other(u), expected)
        assert_close(layer(u), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_number_of_iterations_may_be_changed_after_a_layer_has_run(engine):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine=engine)
    with torch.no_grad():
        layer.weight.mul_(10)
    u = torch.randn(2, 6, 4)
    three = layer(u)
    u_hat = gc.reference.votes(u, layer.weight.unflatten(0, (6, 3)))
    for iterations in (1, 5):
        layer.routing.iterations = iterations
        v = layer(u)
        assert_close(v, gc.reference.dynamic_routing(u_hat, iterations)[0])
        assert not torch.allclose(v, three, rtol=0.01)


def test_layers_are_stacked():
    first = gc.CapsuleLayer(gc.complete_graph(6, 4), 4, 5)
    second = gc.CapsuleLayer(gc.complete_graph(4, 3), 5, 7)
    v = second(first(torch.randn(2, 6, 4)))
    assert v.shape == (2, 3, 7)
    v.sum().backward()
    assert first.weight.grad.abs().sum() > 0


@every_engine
def test_an_empty_batch_gives_an_empty_result_and_a_gradient(engine):
    layer = small_layer(engine)
    u = torch.zeros(0, 6, 4, requires_grad=True)
    v = layer(u)
    assert v.shape == (0, 3, 5)
    v.sum().backward()
    assert layer.weight.grad.eq(0).all()


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_has_run_survives_copy_pickle_and_save(copied, engine):
    layer = small_layer(engine)
    u = torch.randn(2, 6, 4)
    expected = layer(u)
    other = copied(layer)
    assert torch.equal(other(u), expected)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(u), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_has_run_is_saved_without_its_batched_graphs(engine):
    layer = small_layer(engine)
    fresh = len(pickle.dumps(layer))
    layer(torch.randn(50, 6, 4))
    assert len(pickle.dumps(layer)) == fresh


def test_weights_are_drawn_with_a_deviation_of_a_tenth():
    weight = gc.CapsuleLayer(gc.complete_graph(100, 10), 8, 16).weight
    assert abs(weight.std().item() - 0.1) < 0.001
    assert abs(weight.mean().item()) < 0.001


@every_engine
def test_routing_stays_in_float32_under_autocast(engine):
    layer = small_layer(engine)
    u = torch.randn(2, 6, 4)
    expected = layer(u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(u), expected)
        from_16_bits = layer(u.bfloat16())
    assert from_16_bits.dtype == torch.float32
    assert torch.equal(from_16_bits, layer(u.bfloat16().float()))


def any_graph():
    """Not complete, with shared matrices."""
    return gc.routing_graph([3, 0, 0, 2], [0, 2, 0, 2], children=4, weight_index=[1, 0, 2, 0])


@every_engine
def test_a_layer_made_on_the_meta_device_routes_once_its_weights_are_loaded(engine):
    layer = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine)
    u = torch.randn(2, 4, 4)
    on_meta = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine, device="meta")
    with torch.device("meta"):
        made_there = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine)
    for other in (on_meta, made_there):
        assert other.weight.is_meta
        other.to_empty(device="cpu")
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(u), layer(u))


@pytest.mark.parametrize("engine", ["builtin", "scatter", "fused"])  # DGL's UDFs cannot run there
def test_a_layer_may_run_first_under_the_meta_device(engine):
    layer = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine)
    u = torch.randn(2, 4, 4)
    with torch.device("meta"):
        v = layer(u)
    again = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(v, again(u))
    assert torch.equal(v, layer(u))


@pytest.mark.parametrize("build", [any_graph, lambda: gc.batch_graph(any_graph(), 2)])
def test_a_graph_is_built_alike_under_the_meta_device(build):
    with torch.device("meta"):
        graph = build()
    for there, here in zip(graph.edges(), build().edges(), strict=True):
        assert torch.equal(there, here)
    assert gc.complete_graph(3, 2).edata["weight_index"].device.type == "cpu"


@every_engine
def test_a_layer_that_ran_in_inference_mode_first_can_be_trained(engine):
    layer = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine)
    u = torch.randn(2, 4, 4)
    with torch.inference_mode():
        expected = layer(u)
    v = layer(u)
    v.sum().backward()
    assert torch.equal(v, expected)
    assert layer.weight.grad.abs().sum() > 0


@every_engine
def test_what_is_written_on_a_graph_after_its_layer_was_made_changes_nothing(engine):
    graph = any_graph()
    layer = gc.CapsuleLayer(graph, 4, 5, engine=engine)
    u = torch.randn(2, 4, 4)
    graph.edata["weight_index"][:] = 0
    untouched = gc.CapsuleLayer(any_graph(), 4, 5, engine=engine)
    untouched.load_state_dict(layer.state_dict())
    assert torch.equal(layer(u), untouched(u))
    with pytest.raises(AttributeError, match="no setter"):
        layer.graph = graph


@every_engine
def test_looking_for_nan_leaves_the_callers_poses_as_they_are(engine):
    u = torch.randn(2, 6, 4)
    layer = small_layer(engine)
    layer(u)
    for tensor in (u, layer.weight.data):
        tensor.resize_(1000)  # refused of a tensor whose memory numpy holds
    layer = gc.CapsuleLayer(gc.complete_graph(1, 3), 1, 5, engine=engine)
    negated = torch.randn(1, 1, 1, dtype=torch.complex64).conj().imag  # a view numpy cannot hold
    assert negated.is_contiguous() and negated.is_neg()
    assert torch.equal(layer(negated), layer(negated.clone()))


@pytest.mark.parametrize(
    ("u", "said"),
    [
        (torch.zeros(1, 2, 6, 4), r"of shape \[batch, 6, 4\] or \[6, 4\], got \[1, 2, 6, 4\]"),
        (torch.zeros(2, 5, 4), "6 children"),
        (torch.zeros(2, 6, 3), "poses of length 4"),
        (torch.zeros(2, 6, 4, dtype=torch.float64), "one dtype"),
        (torch.zeros(2, 6, 4, device="meta"), "one device"),
        (torch.full((2, 6, 4), torch.nan), "12 of 12 poses contain NaN"),
        (torch.full((2, 6, 4), torch.inf), "12 of 12 poses contain NaN or infinity"),
    ],
)
def test_poses_that_do_not_fit_are_refused(u, said):
    with pytest.raises(ValueError, match=said):
        small_layer()(u)


def test_poses_that_are_not_finite_have_an_error_of_their_own():
    u = torch.zeros(2, 6, 4)
    u[1, 3, 2] = torch.nan
    with pytest.raises(NonFinitePosesError, match="1 of 12 poses"):
        small_layer()(u)


@pytest.mark.filterwarnings("error")
def test_looking_for_poses_that_are_not_finite_warns_of_nothing():
    u = torch.zeros(2, 6, 4)
    u[0, 0, 0], u[1, 0, 0] = torch.inf, -torch.inf
    with pytest.raises(NonFinitePosesError, match="2 of 12 poses"):
        small_layer()(u)
    small_layer()(torch.full((2, 6, 4), 3e38))  # whose sum is not finite


def test_a_ragged_graph_must_fit_poses_and_matrices():
    layer = small_layer()
    graph = gc.routing_graph([0], [0], weight_index=[18])
    with pytest.raises(ValueError, match="there are 18 matrices"):
        layer(torch.zeros(1, 4), graph=graph)
    with pytest.raises(ValueError, match=r"expected u of shape \[batch, 2, 4\] or \[2, 4\]"):
        layer(torch.zeros(6, 4), graph=gc.complete_graph(2, 3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(iterations=0), "iterations must be at least 1; got 0"),
        (dict(engine="dense"), "unknown engine 'dense'; choose one of auto, fused, udf"),
        (dict(routing="e-m"), "unknown routing 'e-m'; choose one of dynamic, uniform, em"),
        (dict(gradients="some"), "unknown gradients"),
        (dict(routing="uniform", iterations=2), "no option iterations; it takes none"),
        (dict(variant="paper"), "dynamic routing has no option variant; it takes iterations, g"),
        (dict(routing=gc.EMRouting(), iterations=2), "give them to the routing itself"),
        (dict(rows=2), "multiples of 2; got 4 and 5"),
        (dict(rows=0), "rows must be at least 1"),
    ],
)
def test_choices_that_do_not_exist_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        small_layer(**changes)


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.zeros(1, 20, 20), "at least 9"),
        (torch.zeros(1, 3, 20, 20), r"\[batch, 2,"),
        (torch.zeros(1, 2, 8, 20), "at least 9"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, said):
    with pytest.raises(ValueError, match=said):
        gc.PrimaryCapsules(2, capsule_maps=2, capsule_dim=4)(features)


def test_primary_capsules_of_no_size_are_refused():
    with pytest.raises(ValueError, match="capsule_maps must be at least 1"):
        gc.PrimaryCapsules(2, capsule_maps=0, capsule_dim=4)


def test_a_layer_serves_several_threads_with_many_batch_sizes():
    layer = small_layer()
    poses = {size: torch.randn(size, 6, 4) for size in range(1, 9)}
    expected = {size: layer(u) for size, u in poses.items()}

    def serve(size):
        return all(
            torch.allclose(layer(poses[s]), expected[s]) for s in (size, 9 - size) for _ in range(9)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(serve, poses))


@pytest.mark.parametrize("engine", ["udf", "builtin"])
def test_a_named_engine_that_cannot_run_says_why_and_never_falls_back(engine, monkeypatch):
    monkeypatch.setattr("graphcaps._dgl.has_cuda", lambda: False)
    with pytest.raises(RuntimeError, match=f"'{engine}' cannot run on cuda.*without CUDA.*scatter"):
        gc.bind(gc.complete_graph(2, 2), engine, "cuda")


def test_auto_takes_dgls_backend_on_cuda_where_dgl_has_one_and_scatter_elsewhere(monkeypatch):
    cuda, traced = torch.device("cuda"), dict(trace=True)
    monkeypatch.setattr("graphcaps._dgl.has_cuda", lambda: True)
    assert engines.choose("auto", cuda, **traced) == "builtin"
    monkeypatch.setattr("graphcaps._dgl.has_cuda", lambda: False)
    assert engines.choose("auto", cuda, **traced) == "scatter"
    assert engines.choose("auto", torch.device("cpu"), **traced) == "builtin"
    assert engines.choose("auto", torch.device("mps"), **traced) == "scatter"


def primary_by_hand(features, primary):
    """Capsule m·H·W + y·W + x is the K channels of map m at (y, x), squashed."""
    maps = primary.conv(features)
    _, _, height, width = maps.shape
    poses = []
    for m in range(primary.capsule_maps):
        for y in range(height):
            for x in range(width):
                channels = slice(m * primary.capsule_dim, (m + 1) * primary.capsule_dim)
                poses.append(reference.squash(maps[:, channels, y, x]))
    return torch.stack(poses, dim=1)


@pytest.mark.parametrize(("height", "width", "channels"), [(11, 14, 3), (9, 9, 1), (20, 13, 2)])
def test_a_primary_capsule_is_the_channels_of_one_map_at_one_position(height, width, channels):
    primary = gc.PrimaryCapsules(channels, capsule_maps=3, capsule_dim=4)
    features = torch.randn(2, channels, height, width)
    assert_close(primary(features), primary_by_hand(features, primary))


def test_primary_capsules_have_no_relu():
    primary = gc.PrimaryCapsules(1, capsule_maps=2, capsule_dim=4)
    with torch.no_grad():
        primary.conv.bias.fill_(-10)
    assert primary(torch.rand(1, 1, 9, 9)).lt(0).all()


def test_primary_capsules_of_blank_images_have_finite_gradients():
    primary = gc.PrimaryCapsules(1, capsule_maps=2, capsule_dim=4)
    with torch.no_grad():
        primary.conv.bias.zero_()
    primary(torch.zeros(1, 1, 9, 9)).sum().backward()
    assert all(p.grad.isfinite().all() for p in primary.parameters())
