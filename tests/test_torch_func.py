"""torch.func on new layers: vmap, grad, per-sample gradients, and functional_call."""

import pytest
import torch
from couplings import FEATURES, Sizes, complete, couple, make_features
from routings import CASES, ENGINES, VARIANTS, Poses, make_layer, make_poses, route
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.testing import assert_close

import graphcaps as gc

# engines that torch looks into; the others are DGL's
TRANSFORMED = ("fused", "scatter")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
each_engine = pytest.mark.parametrize("engine", TRANSFORMED)
CASE = CASES["complete"]


def near(got, expected):
    """Compare within 1e-6 of the largest number in float32."""
    assert_close(got, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.detach().abs().max())))


def parameters_of(layer):
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def loss_of(layer, parameters, poses):
    """A functional of all outputs of a layer, as a function of its parameters."""
    given = tuple(x for x in poses if x is not None)
    found = functional_call(layer, parameters, given)
    found = found if isinstance(found, tuple) else (found,)
    return sum((x.sin() * torch.arange(1, x.shape[-1] + 1)).sum() for x in found)


def backward_of(layer, poses):
    """The same gradients by `backward()`."""
    layer.zero_grad()
    loss_of(layer, dict(layer.named_parameters()), poses).backward()
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


def one(poses, sample):
    return Poses(*(x if x is None else x[sample : sample + 1] for x in poses))


@each_engine
@every_variant
def test_gradients_of_every_sample_are_those_of_the_sample_alone(variant, engine):
    """In float64, since the kernel may lay out one sample otherwise than a batch."""
    layer, poses = make_layer(CASE, variant, engine), make_poses(CASE, variant)

    def loss(parameters, u, a=None):
        a = None if a is None else a.unsqueeze(0)
        return loss_of(layer, parameters, Poses(u.unsqueeze(0), a))

    given = tuple(x for x in poses if x is not None)
    found = vmap(grad(loss), (None, *[0] * len(given)))(parameters_of(layer), *given)
    for sample in range(CASE.batch):
        for name, expected in backward_of(layer, one(poses, sample)).items():
            assert_close(found[name][sample], expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_every_sample_are_compiled_with_scatter():
    """Of `fused`, torch cannot: it takes no such derivatives of operations from torch.library."""
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="scatter")
    u = torch.randn(7, 6, 4)

    def loss(parameters, u):
        return loss_of(layer, parameters, Poses(u.unsqueeze(0), None))

    gradients = vmap(grad(loss), (None, 0))
    torch.compiler.reset()
    found = torch.compile(gradients, fullgraph=True, backend="aot_eager")(parameters_of(layer), u)
    for sample in range(7):
        expected = backward_of(layer, Poses(u[sample : sample + 1], None))
        near(found["weight"][sample], expected["weight"])


@each_engine
@every_variant
def test_grad_of_a_functional_call_is_what_backward_gives(variant, engine):
    layer = make_layer(CASE, variant, engine, torch.float32)
    poses = make_poses(CASE, variant, torch.float32)
    found = grad(lambda parameters: loss_of(layer, parameters, poses))(parameters_of(layer))
    for name, expected in backward_of(layer, poses).items():
        near(found[name], expected)


@each_engine
@every_variant
def test_samples_by_vmap_are_those_of_a_batch(variant, engine):
    layer = make_layer(CASE, variant, engine, torch.float32)
    poses = make_poses(CASE, variant, torch.float32)

    def route_one(u, a=None):
        a = None if a is None else a.unsqueeze(0)
        return tuple(x for x in route(layer, Poses(u.unsqueeze(0), a)) if x is not None)

    given = tuple(x for x in poses if x is not None)
    found = vmap(route_one)(*given)
    for got, expected in zip(found, route(layer, poses), strict=False):
        near(got.squeeze(1), expected)


@each_engine
def test_an_ensemble_of_layers_runs_by_vmap(engine):
    layers = [make_layer(CASE, "em", engine, torch.float32) for _ in range(3)]
    for factor, layer in enumerate(layers, start=1):
        with torch.no_grad():
            layer.weight.mul_(factor)
    poses = make_poses(CASE, "em", torch.float32)
    parameters, _ = stack_module_state(layers)
    found = vmap(lambda own: functional_call(layers[0], own, (poses.u, poses.a)))(parameters)
    for n, layer in enumerate(layers):
        expected = layer(*poses)
        near(found.poses[n], expected.poses)
        near(found.activations[n], expected.activations)


@each_engine
def test_jacobians_are_those_of_one_output_after_the_other(engine):
    layer = make_layer(CASE, "dynamic", engine, torch.float32)
    u = make_poses(CASE, "dynamic", torch.float32).u[:1].requires_grad_()
    found = jacrev(layer)(u.detach())
    v = layer(u)
    for index in torch.cartesian_prod(*map(torch.arange, v.shape)):
        (expected,) = torch.autograd.grad(v[tuple(index)], u, retain_graph=True)
        near(found[tuple(index)], expected)


GRAPH, SIZE = complete(4, 3, kinds=5), Sizes(batch=2, rows=2)


@pytest.mark.parametrize(
    "mapped", [("u",), ("weight",), ("u", "p"), FEATURES, ("u", "weight", *FEATURES)]
)
def test_a_pass_is_mapped_over_any_of_its_features(mapped):
    """Sums, and gradients of mapped and of shared inputs."""
    names = ("u", "weight", *FEATURES)
    sets = [make_features(GRAPH, SIZE, FEATURES) for _ in range(3)]
    weights = [torch.randn_like(x) for x in couple(GRAPH, SIZE, sets[0], ("squares",))]

    def loss(*features):
        sums = couple(GRAPH, SIZE, dict(zip(names, features, strict=True)), ("leak", "squares"))
        return sum((x * y.sin()).sum() for x, y in zip(weights, sums, strict=True))

    dims = tuple(-1 if name in mapped else None for name in names)
    stacked = [
        torch.stack([s[name] for s in sets], dim=-1) if name in mapped else sets[0][name]
        for name in names
    ]
    values = vmap(loss, dims)(*stacked)
    gradients = vmap(grad(loss, tuple(range(9))), dims)(*stacked)
    for n in range(3):
        leaves = [
            (sets[n] if name in mapped else sets[0])[name].clone().requires_grad_()
            for name in names
        ]
        expected = loss(*leaves)
        assert_close(values[n], expected)
        of_leaves = torch.autograd.grad(expected, leaves)
        for got, right in zip(gradients, of_leaves, strict=True):
            assert_close(got[n], right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["dynamic", "em"])
def test_second_derivatives_are_refused_by_fused_and_given_by_scatter(variant):
    poses = make_poses(CASE, variant, torch.float32)

    def of_gradient(layer):
        def loss(u):
            return loss_of(layer, parameters_of(layer), poses._replace(u=u))

        return grad(lambda u: grad(loss)(u).square().sum())(poses.u)

    with pytest.raises(RuntimeError, match="use engine='scatter' for the second"):
        of_gradient(make_layer(CASE, variant, "fused", torch.float32))
    assert of_gradient(make_layer(CASE, variant, "scatter", torch.float32)).abs().sum() > 0


@pytest.mark.parametrize("engine", ["auto", *TRANSFORMED])
def test_a_graph_given_for_one_call_may_be_seen_first_by_grad(engine):
    graph = gc.routing_graph([3, 0, 0, 2], [0, 2, 0, 2], children=4, weight_index=[1, 0, 2, 0])
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine=engine)
    u = torch.randn(4, 4, requires_grad=True)
    found = grad(lambda u: layer(u, graph=graph).square().sum())(u.detach())
    layer(u, graph=graph).square().sum().backward()
    near(found, u.grad)


@pytest.mark.parametrize("engine", ["auto", *TRANSFORMED])
def test_a_net_and_its_loss_have_gradients_of_every_image(engine):
    sizes = dict(conv_channels=4, capsule_maps=2, decoder_hidden=(8,))
    model = gc.CapsNet.from_preset("small", engine=engine, **sizes)
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([3, 7, 0])

    def loss(parameters, image, label):
        images, labels = image.unsqueeze(0), label.unsqueeze(0)
        output = functional_call(model, parameters, (images, labels))
        return gc.capsnet_loss(output, images, labels)

    found = vmap(grad(loss), (None, 0, 0))(parameters_of(model), images, labels)
    for n in range(3):
        model.zero_grad()
        loss(dict(model.named_parameters()), images[n], labels[n]).backward()
        for name, parameter in model.named_parameters():
            near(found[name][n], parameter.grad)
    lengths = vmap(lambda image: model(image.unsqueeze(0)).lengths)(images)
    near(lengths.squeeze(1), model(images).lengths)


def test_nothing_made_under_a_transform_is_kept():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="scatter")
    u = torch.randn(5, 6, 4)
    grad(lambda u: layer(u).sum())(u)
    v = layer(u)
    v.sum().backward()
    assert torch.equal(v, layer(u))


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in TRANSFORMED])
def test_engines_of_dgl_say_that_they_cannot_be_transformed(engine):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine=engine)
    u = torch.randn(5, 6, 4)
    for transform in (vmap, lambda f: grad(lambda u: f(u).sum())):
        with pytest.raises(RuntimeError, match=f"'{engine}' cannot run.*torch cannot trace"):
            transform(lambda u: layer(u.reshape(-1, 6, 4)))(u)
