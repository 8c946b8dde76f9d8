import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from by_hand import route_by_hand
from routings import ENGINES
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import layers, reference
from graphcaps._dgl import dgl
from graphcaps.layers import NonFinitePosesError

every_engine = pytest.mark.parametrize("engine", ENGINES)


def small_layer(engine="auto", **changes):
    return gc.CapsuleLayer(
        gc.complete_graph(6, 3), child_dim=4, parent_dim=5, engine=engine, **changes
    )


def sparse_graph():
    """Shared matrices, a child without parents, a parent without children, any order."""
    return gc.routing_graph(
        [3, 0, 0, 2, 3], [0, 2, 0, 2, 3], children=4, parents=5, weight_index=[1, 0, 2, 0, 1]
    )


@every_engine
@pytest.mark.parametrize("routing", ["dynamic", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_equals_the_reference_in_values_and_gradients(engine, routing, dtype):
    layer = small_layer(engine, routing=routing, dtype=dtype)
    u = torch.randn(2, 6, 4, dtype=dtype, requires_grad=True)
    weight = layer.weight.detach().view(6, 3, 4, 5).requires_grad_()
    v = layer(u)
    iterations = 3 if routing == "dynamic" else 1  # equal logits: the first iteration is uniform
    v_dense, _ = reference.dynamic_routing(reference.votes(u, weight), iterations)
    assert_close(v, v_dense)
    functional = torch.randn_like(v)
    got = torch.autograd.grad((v * functional).sum(), (u, layer.weight))
    expected = torch.autograd.grad((v_dense * functional).sum(), (u, weight))
    assert_close(got[0], expected[0])
    assert_close(got[1].view_as(weight), expected[1])


@every_engine
def test_a_layer_on_a_sparse_graph_with_shared_matrices_equals_the_loops(engine):
    graph = sparse_graph()
    layer = gc.CapsuleLayer(graph, 3, 2, engine=engine, dtype=torch.float64)
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    v = layer(u)
    assert layer.weight.shape == (3, 3, 2)
    edges = list(zip(*(x.tolist() for x in graph.edges()), strict=True))
    matrices = graph.edata["weight_index"].tolist()
    for sample in range(2):
        u_hat = [
            (layer.weight[m].T @ u[sample, i]).tolist()
            for (i, _), m in zip(edges, matrices, strict=True)
        ]
        by_hand, _ = route_by_hand(edges, u_hat, 4, 5, 3)
        assert_close(v[sample], torch.tensor(by_hand, dtype=torch.float64))
    assert v[:, [1, 4]].eq(0).all()  # parents without children


@every_engine
@pytest.mark.parametrize("graph", [gc.complete_graph(3, 2), sparse_graph()])
def test_gradients_of_a_layer_are_those_of_finite_differences(engine, graph):
    layer = gc.CapsuleLayer(graph, 2, 3, engine=engine, dtype=torch.float64)
    u = torch.randn(2, graph.num_nodes("child"), 2, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach().clone().requires_grad_()

    def run(u, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (u,))

    assert torch.autograd.gradcheck(run, (u, weight))


@every_engine
def test_a_ragged_batch_gives_what_its_graphs_give_alone(engine):
    layer = gc.CapsuleLayer(sparse_graph(), 3, 2, engine=engine)
    graphs = [
        gc.routing_graph([0, 1, 1], [0, 0, 1], weight_index=[2, 0, 1]),
        gc.routing_graph([0], [3], children=5, weight_index=[1]),
    ]
    poses = [torch.randn(graph.num_nodes("child"), 3) for graph in graphs]
    together = layer(torch.cat(poses), graph=dgl.batch(graphs))
    alone = [layer(u, graph=graph) for u, graph in zip(poses, graphs, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    own = torch.randn(1, 4, 3)
    assert_close(layer(own[0], graph=sparse_graph()), layer(own)[0])


@every_engine
def test_an_image_is_routed_alike_alone_and_in_a_batch(engine):
    layer = small_layer(engine)
    u = torch.randn(5, 6, 4)
    together = layer(u)
    for sample in range(5):
        assert_close(layer(u[sample : sample + 1])[0], together[sample])


@every_engine
def test_nothing_routed_is_kept_between_calls(engine):
    layer = small_layer(engine)
    u = torch.randn(2, 6, 4)
    first = layer(u)
    layer(10 * torch.randn(2, 6, 4))
    assert torch.equal(layer(u), first)


@every_engine
def test_the_batched_graph_is_built_once_per_batch_size(engine, monkeypatch):
    built = []
    monkeypatch.setattr(
        layers, "batch_graph", lambda graph, size: built.append(size) or gc.batch_graph(graph, size)
    )
    layer = small_layer(engine)
    for size in (2, 2, 3, 2, 3):
        layer(torch.randn(size, 6, 4))
    assert built == [2, 3]
    for size in range(4, 20):
        layer(torch.randn(size, 6, 4))
    assert len(layer._bound) == layers.BATCH_SIZES_KEPT


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
@pytest.mark.parametrize("engine", ["fused", *ENGINES])
def test_a_layer_that_has_run_survives_copy_pickle_and_save(copied, engine):
    layer = small_layer(engine)
    u = torch.randn(2, 6, 4)
    expected = layer(u)
    other = copied(layer)
    assert torch.equal(other(u), expected)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(u), expected)


@pytest.mark.parametrize("engine", ["fused", *ENGINES])
def test_a_layer_that_has_run_is_saved_without_its_batched_graphs(engine):
    layer = small_layer(engine)
    fresh = len(pickle.dumps(layer))
    layer(torch.randn(50, 6, 4))
    assert len(pickle.dumps(layer)) == fresh


def test_weights_are_drawn_with_a_deviation_of_a_tenth():
    weight = gc.CapsuleLayer(gc.complete_graph(100, 10), 8, 16).weight
    assert abs(weight.std().item() - 0.1) < 0.001
    assert abs(weight.mean().item()) < 0.001


def test_routing_stays_in_float32_under_autocast():
    layer = small_layer()
    u = torch.randn(2, 6, 4)
    expected = layer(u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(u), expected)


@pytest.mark.parametrize(
    ("u", "said"),
    [
        (torch.zeros(6, 4), r"expected u of shape \[batch, 6, 4\], got \[6, 4\]"),
        (torch.zeros(2, 5, 4), "6 children"),
        (torch.zeros(2, 6, 3), "poses of length 4"),
        (torch.zeros(2, 6, 4, dtype=torch.float64), "one dtype"),
        (torch.zeros(2, 6, 4, device="meta"), "one device"),
        (torch.full((2, 6, 4), torch.nan), "12 of 12 poses hold NaN"),
        (torch.full((2, 6, 4), torch.inf), "12 of 12 poses hold NaN or infinity"),
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
    with pytest.raises(ValueError, match=r"expected u of shape \[6, 4\]"):
        layer(torch.zeros(2, 6, 4), graph=gc.complete_graph(6, 3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(iterations=0), "iterations must be at least 1; got 0"),
        (dict(engine="dense"), "unknown engine 'dense'; choose one of auto, fused, udf"),
        (dict(routing="em"), "unknown routing 'em'"),
        (dict(gradients="some"), "unknown gradients"),
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


def test_a_routing_that_does_not_exist_is_refused_also_later():
    layer = small_layer()
    layer.routing = "em"
    with pytest.raises(ValueError, match="unknown routing 'em'"):
        layer(torch.zeros(1, 6, 4))


@pytest.mark.parametrize("engine", ["udf", "builtin"])
def test_a_named_engine_that_cannot_run_says_why_and_never_falls_back(engine, monkeypatch):
    monkeypatch.setattr("graphcaps._dgl.has_cuda", lambda: False)
    with pytest.raises(RuntimeError, match=f"'{engine}' cannot run on cuda.*without CUDA.*scatter"):
        gc.bind(gc.complete_graph(2, 2), engine, "cuda")


def test_auto_takes_dgls_backend_on_cuda_where_dgl_has_one_and_scatter_elsewhere(monkeypatch):
    from graphcaps.passing import choose_engine

    cuda = torch.device("cuda")
    monkeypatch.setattr("graphcaps._dgl.has_cuda", lambda: True)
    assert choose_engine("auto", cuda) == "builtin"
    monkeypatch.setattr("graphcaps._dgl.has_cuda", lambda: False)
    assert choose_engine("auto", cuda) == "scatter"
    assert choose_engine("auto", torch.device("cpu")) == "builtin"
    assert choose_engine("auto", torch.device("mps")) == "scatter"


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
