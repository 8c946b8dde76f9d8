"""Layers and nets under torch.compile, torch.export, make_fx and jit, from their first call."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from routings import CASES, VARIANTS, make_layer, make_poses, route
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import graphcaps as gc
from graphcaps.layers import NonFinitePosesError
from graphcaps.tracing import is_traced

KERNELS = {torch.ops.graphcaps.dynamic_routing.default, torch.ops.graphcaps.couple.default}
TRACED = ("auto", "fused", "scatter")
each_engine = pytest.mark.parametrize("engine", TRACED)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def layer_of(engine, **options):
    return gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine=engine, **options)


def small_net(engine, **changes):
    sizes = dict(conv_channels=4, capsule_maps=2, decoder_hidden=(8,))
    return gc.CapsNet.from_preset("small", engine=engine, **sizes | changes)


class Graphs:
    """A backend of torch.compile that records every graph."""

    def __init__(self, backend="eager"):
        self.seen, self._backend = [], lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return self._backend(graph, inputs)

    def all_have_kernels(self):
        return all(has_kernel(graph) for graph in self.seen)


def has_kernel(graph):
    return any(node.target in KERNELS for node in graph.graph.nodes)


def compiled(function, backend="eager"):
    graphs = Graphs(backend)
    return torch.compile(function, fullgraph=True, backend=graphs), graphs


@pytest.mark.filterwarnings("error")
@each_engine
def test_a_layer_is_one_graph_from_its_first_call_in_training_and_inference(engine):
    layer, u = layer_of(engine), torch.randn(9, 6, 4, requires_grad=True)
    function, graphs = compiled(layer, "aot_eager")
    v = function(u)
    found = torch.autograd.grad(v.square().sum(), (u, layer.weight))
    expected = layer(u)
    assert_close(v, expected)
    of_eager = torch.autograd.grad(expected.square().sum(), (u, layer.weight))
    for got, right in zip(found, of_eager, strict=True):
        assert_close(got, right)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert_close(function(u.detach()), expected)
    assert graphs.all_have_kernels() == (engine != "scatter")


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"dynamic, last", "em, authors"}))
def test_every_routing_is_one_graph(variant):
    case = CASES["complete"]
    layer = make_layer(case, variant, "fused", torch.float32)
    poses = make_poses(case, variant, torch.float32)
    function, graphs = compiled(lambda poses: route(layer, poses))
    for got, expected in zip(function(poses), route(layer, poses), strict=True):
        if expected is not None:
            assert_close(got, expected)
    assert graphs.all_have_kernels()


@pytest.mark.parametrize(
    ("engine", "training"), [("auto", True), ("fused", False), ("scatter", True)]
)
def test_any_numbers_of_samples_take_at_most_two_recompilations(engine, training):
    """One for sizes in general, and one for a single sample."""
    layer = layer_of(engine)

    def loss_of(u, labels):
        return gc.margin_loss(gc.length(layer(u)), labels)

    function, graphs = compiled(loss_of)
    with torch.set_grad_enabled(training):
        for samples in (1, 8, 64, 7, 65, 2):
            u, labels = torch.randn(samples, 6, 4), torch.arange(samples) % 3
            assert_close(function(u, labels), loss_of(u, labels))
    assert len(graphs.seen) <= 3
    assert graphs.all_have_kernels() == (engine != "scatter")


def test_a_net_and_its_loss_are_one_graph():
    model = small_net("auto")
    images, labels = torch.rand(9, 1, 28, 28), torch.arange(9)

    def loss_of(images, labels):
        return gc.capsnet_loss(model(images, labels), images, labels)

    function, graphs = compiled(loss_of, "aot_eager")
    for f in (function, loss_of):
        f(images, labels).backward()
    of_both = [2 * p.grad for p in model.parameters()]
    model.zero_grad()
    loss_of(images, labels).backward()
    for got, parameter in zip(of_both, model.parameters(), strict=True):
        assert_close(got, 4 * parameter.grad)
    assert graphs.all_have_kernels()


def test_training_steps_run_by_inductor_in_mode_reduce_overhead():
    layer = layer_of("auto")
    function = torch.compile(
        lambda u: layer(u).square().sum(), fullgraph=True, mode="reduce-overhead"
    )

    def step(samples):
        u = torch.randn(samples, 6, 4)
        layer.zero_grad()
        function(u).backward()
        (expected,) = torch.autograd.grad(layer(u).square().sum(), layer.weight)
        assert_close(layer.weight.grad, expected)

    for samples in (2, 64):
        step(samples)
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples in (64, 7, 65):
            step(samples)


@pytest.mark.parametrize(
    "made_again",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda _: layer_of("auto", device="meta").to_empty(device="cpu"),
        lambda layer: layer.double().float(),
    ],
)
def test_a_layer_that_was_copied_or_moved_and_never_ran_is_one_graph(made_again):
    layer = made_again(layer_of("auto"))
    torch.nn.init.normal_(layer.weight)
    function, _ = compiled(layer)
    u = torch.randn(9, 6, 4)
    assert_close(function(u), layer(u))


@each_engine
def test_an_exported_net_takes_any_number_of_images(engine):
    model = small_net(engine)
    samples = torch.export.Dim("samples")
    exported = torch.export.export(
        model, (torch.rand(2, 1, 28, 28),), dynamic_shapes=({0: samples},)
    )
    assert has_kernel(exported.graph_module) == (engine != "scatter")
    for size in (1, 9, 70):
        images = torch.rand(size, 1, 28, 28)
        for got, expected in zip(exported.module()(images), model(images), strict=True):
            assert_close(got, expected)


def test_an_exported_layer_that_was_saved_routes_with_the_kernel():
    layer, u = layer_of("fused"), torch.randn(2, 6, 4)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (u,)), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert has_kernel(loaded.graph_module)
    assert_close(loaded.module()(u), layer(u))


@pytest.mark.parametrize(("engine", "samples"), [("auto", 2), ("fused", 9), ("scatter", 2)])
def test_fake_tensors_and_make_fx_see_shapes_and_operations(engine, samples):
    u = torch.randn(samples, 6, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = layer_of(engine)
        v = layer(torch.randn(samples, 6, 4))
        v.sum().backward()
    assert v.shape == (samples, 3, 5)
    assert layer.weight.grad.shape == layer.weight.shape
    layer = layer_of(engine)
    graph = make_fx(layer)(u)
    assert has_kernel(graph) == (engine != "scatter")
    other = torch.randn(samples, 6, 4)
    assert_close(graph(other), layer(other))


@pytest.mark.parametrize(("engine", "samples"), [("auto", 2), ("fused", 9), ("scatter", 2)])
def test_torch_jit_trace_records_a_layer_and_what_it_saves_can_be_loaded(engine, samples):
    layer, u = layer_of(engine), torch.randn(samples, 6, 4)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(layer, (u,), check_trace=False), file)
        file.seek(0)
        loaded = torch.jit.load(file)
    other = torch.randn(samples, 6, 4)
    assert_close(loaded(other), layer(other))


@pytest.mark.parametrize("engine", ["udf", "builtin"])
def test_engines_of_dgl_say_that_they_cannot_be_traced(engine):
    layer, u = layer_of(engine), torch.randn(5, 6, 4)
    said = f"'{engine}' cannot run on cpu: torch cannot trace or transform what DGL computes"
    for trace in (
        lambda: torch.export.export(layer, (u,)),
        lambda: make_fx(layer)(u),
        lambda: torch.jit.trace(layer, (u,), check_trace=False),
        lambda: torch.compile(layer, backend="eager", fullgraph=True)(u),
    ):
        with pytest.raises(Exception, match=said):
            trace()


def test_a_graph_given_for_one_call_is_prepared_beside_the_trace():
    """DGL reads the graph, which is a graph break for torch.compile and a constant for export."""
    graph = gc.routing_graph([3, 0, 0, 2], [0, 2, 0, 2], children=4, weight_index=[1, 0, 2, 0])
    layer, u = layer_of("auto"), torch.randn(4, 4)
    expected = layer(u, graph=graph)
    for engine in TRACED:
        layer.engine = engine
        assert_close(torch.compile(layer, backend="eager")(u, graph=graph), expected)


def test_checks_of_values_are_made_in_eager_mode_and_not_in_traces():
    """Traces have no values to check; shapes are checked everywhere."""
    layer = layer_of("fused")
    poses = torch.full((9, 6, 4), torch.nan)
    with pytest.raises(NonFinitePosesError):
        layer(poses)
    function, _ = compiled(layer)
    assert function(poses).isnan().all()
    lengths, labels = torch.rand(2, 10), torch.tensor([3, 10])
    with pytest.raises(ValueError, match="expected labels from 0 to 9; got 3 to 10"):
        gc.margin_loss(lengths, labels)
    function, _ = compiled(gc.margin_loss)
    nothing_there = torch.zeros(2, 10)
    nothing_there[0, 3] = 1
    assert_close(function(lengths, labels), gc.margin_loss(lengths, nothing_there))


def test_a_layer_says_of_wrong_shapes_in_a_trace_what_it_says_outside():
    with pytest.raises(Exception, match="the graph has 6 children with poses of length 4"):
        torch.export.export(layer_of("fused"), (torch.zeros(2, 5, 4),))


def test_what_is_traced_is_known():
    x = torch.ones(2)
    assert not is_traced()
    assert not is_traced(x, torch.nn.Parameter(x))
    assert is_traced(x, x.to("meta"))
    assert torch.compile(lambda x: x * is_traced(), backend="eager", fullgraph=True)(x).all()
    assert make_fx(lambda x: x * is_traced())(x)(x).all()
    assert torch.func.vmap(lambda x: x * is_traced())(x).all()
    with FakeTensorMode():
        fake = torch.ones(2)
        assert is_traced()
    assert is_traced(fake)
    assert not is_traced()
