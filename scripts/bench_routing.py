"""Time and memory of a capsule layer in every form: dense, compiled, and every engine.

Every form is first compared with the dense one in float64, results and gradients; one that is wrong
is not timed. Times are taken in one process, form after form in every round; memory in a process of
its own for each form.

    python scripts/bench_routing.py --output benchmarks/routing-cpu.json     # everything
    python scripts/bench_routing.py --short                                  # under 2 minutes
    python scripts/bench_routing.py --short --layer.routing em --layer.rows 4 --layer.child-dim 16
    python scripts/bench_routing.py --choices          # what `auto` takes, beside all it could take
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from measuring import alternating, in_a_row, in_own_process, machine, peak_mib, quartiles, write
from torch import Tensor

import graphcaps as gc
from graphcaps import structure
from graphcaps._dgl import dgl
from graphcaps.kernels.cpu import lay_out
from graphcaps.pictures.inspection import dense_form, results_and_gradients

FORMS = ("dense", "compiled", "udf", "builtin", "scatter", "fused")
MODES = ("inference", "forward", "forward+backward")
ALLOWED_ERROR = 1e-4  # relative to the largest value, besides four times the dense form's own
MEBI = 2**20


@dataclass(frozen=True)
class Layer:
    """A capsule layer, votes and routing."""

    routing: str = "dynamic"
    """A name in graphcaps.ROUTINGS."""
    iterations: int | None = None
    """Of a routing that has them; its default, if not given."""
    graph: Literal["complete", "conv", "wide-conv"] = "complete"
    """conv: 3×3 windows with stride 2 over 14×14 positions of 32 maps, to 6×6 of 32 maps, with
    matrices shared by all positions: 331,776 edges (Hinton et al. 2018, first layer). wide-conv:
    the same from 16×16 to 7×7: 451,584 edges."""
    batch: int = 64
    children: int = 1152
    parents: int = 10
    child_dim: int = 8
    parent_dim: int = 16
    rows: int = 1
    """Rows of a pose; 4 with 16 numbers is a 4×4 matrix."""
    kept: float = 1.0
    """Share of the edges of the complete graph, drawn at random."""


@dataclass(frozen=True)
class Options:
    """Compare the engines of graphcaps with the dense form of a routing."""

    layer: Layer = Layer()
    short: bool = False
    """The layer alone: no sweeps, no other routings, no large layers, a third of the rounds."""
    threads: int = 2
    """Of torch and of DGL."""
    device: str = "cpu"
    """cpu or cuda."""
    rounds: int = 15
    """How often each form is timed."""
    output: Path | None = None
    """A JSON file for all figures."""
    choices: bool = False
    """Alone: whether `auto` takes the fastest form, from one sample to many, on every graph."""
    memory_of: str | None = None
    """Print the peak memory of a form alone, in every mode; used by this script itself."""
    case: str | None = None
    """Instead of the layer, a ragged batch of --choices by its name, for --memory-of."""


LARGE = Layer(batch=128, children=3872, parents=196)
SWEEPS: dict[str, tuple[Any, ...]] = {
    "batch": (1, 4, 16, 32, 64, 128, 256),
    "children": (144, 288, 576, 1152, 2304),
    "iterations": (1, 2, 3, 5),
    "kept": (1.0, 0.5, 0.25, 0.1),
}
SWEPT = ("dense", "compiled", "builtin", "fused")
OF_OTHERS = ("dense", "builtin", "fused")  # forms in which the other routings are measured
MATRICES: dict[str, Any] = dict(child_dim=16, parent_dim=16, rows=4)
OTHERS = (
    Layer("uniform"),
    Layer("em", **MATRICES),
    Layer("attention"),
    Layer("self_attention"),
    Layer("self_routing"),
    Layer("variational_bayes", **MATRICES),
)


CONV = Layer("em", graph="conv", children=14 * 14 * 32, parents=6 * 6 * 32, **MATRICES)
WIDE_CONV = Layer(
    graph="wide-conv",
    batch=128,
    children=16 * 16 * 32,
    parents=7 * 7 * 32,
    child_dim=36,
    parent_dim=36,
    rows=6,
)
WITHOUT_VOTES = {
    "large": LARGE,
    "conv": CONV,
    "wide_conv": WIDE_CONV,
    "wide_conv_em": replace(WIDE_CONV, routing="em"),
}


def make_graph(layer: Layer) -> dgl.DGLGraph:
    """The complete graph, or so many of its edges, each with a matrix of its own; or windows."""
    if layer.graph != "complete":
        size = 14 if layer.graph == "conv" else 16
        return gc.conv_graph(size, size, 32, 32, kernel_size=3, stride=2)
    if layer.kept == 1:
        return gc.complete_graph(layer.children, layer.parents)
    every = layer.children * layer.parents
    generator = torch.Generator().manual_seed(1)
    edges = torch.randperm(every, generator=generator)[: round(layer.kept * every)].sort().values
    return gc.routing_graph(
        edges // layer.parents,
        edges % layer.parents,
        children=layer.children,
        parents=layer.parents,
    )


def make_capsules(layer: Layer, graph: dgl.DGLGraph, device: str) -> gc.CapsuleLayer:
    """The layer, with the same weights at each call."""
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if layer.iterations is not None:
        options["iterations"] = layer.iterations
    return gc.CapsuleLayer(
        graph,
        layer.child_dim,
        layer.parent_dim,
        rows=layer.rows,
        routing=layer.routing,
        device=device,
        **options,
    )


def make_input(layer: Layer, capsules: gc.CapsuleLayer) -> tuple[Tensor, ...]:
    """Squashed poses, and activations for a routing that has them, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(layer.batch, layer.children, layer.child_dim, generator=generator)
    activations = torch.rand(layer.batch, layer.children, generator=generator)
    given = [gc.squash(poses)] + ([activations] if capsules.routing.activations else [])
    return tuple(x.to(capsules.weight).requires_grad_() for x in given)


def make_form(form: str, capsules: gc.CapsuleLayer) -> Callable[..., Tensor]:
    """The layer as a function of what it is given, which gives the sum of squares of its results.

    Its weights are those of `capsules`, which is left as it is.
    """
    if form in ("dense", "compiled"):
        function = dense_form(capsules)
        if form == "compiled":
            torch.compiler.reset()  # of one function, torch compiles only so many sizes
        dense = torch.compile(function) if form == "compiled" else function
        # poses and activations, without the coupling that stands between them
        return lambda *given: _squares(x for n, x in enumerate(dense(*given)) if n != 1)

    def by_engine(*given: Tensor) -> Tensor:
        capsules.engine = form
        found = capsules(*given)
        return _squares(found if isinstance(found, tuple) else (found,))

    return by_engine


def _squares(results: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.square().sum() for x in results]).sum()


def run(
    function: Callable[..., Tensor], capsules: gc.CapsuleLayer, given: tuple[Tensor, ...], mode: str
) -> Tensor:
    """One forward for its result alone, one that could be differentiated, or one that is."""
    for x in (*given, *capsules.parameters()):
        x.grad = None
    if mode == "inference":
        with torch.no_grad():
            return function(*given)
    loss = function(*given)
    if mode == "forward+backward":
        loss.backward()
    return loss


def errors(layer: Layer, graph: dgl.DGLGraph, forms: Sequence[str], device: str) -> dict[str, Any]:
    """The largest error of results and gradients, relative to the largest value; or why not."""
    small = replace(layer, batch=min(layer.batch, 8))  # samples are routed apart
    forms = ("dense", *(form for form in forms if form != "dense"))
    capsules = make_capsules(small, graph, device)
    given = make_input(small, capsules)
    truth = results_and_gradients("dense", copy.deepcopy(capsules).double(), *given)
    said: dict[str, Any] = {}
    for form in forms:
        try:
            # compiled, the dense form is the same program
            found = results_and_gradients("dense" if form == "compiled" else form, capsules, *given)
            said[form] = max(
                float((found[name] - right).abs().max() / right.abs().max())
                for name, right in truth.items()
                if right.any()
            )
        except Exception as problem:  # a compiler or a GPU that is not there: said, not hidden
            said[form] = f"cannot run: {str(problem).strip().splitlines()[0]}"
    return said


def measure(
    layer: Layer, forms: tuple[str, ...], modes: tuple[str, ...], options: Options
) -> dict[str, Any]:
    """Every form that is right, in every mode: seconds of each round."""
    graph = make_graph(layer)
    wrong = errors(layer, graph, forms, options.device)
    allowed = ALLOWED_ERROR + 4 * wrong["dense"]
    right = [f for f in forms if isinstance(wrong[f], float) and wrong[f] <= allowed]
    capsules = make_capsules(layer, graph, options.device)
    given = make_input(layer, capsules)
    functions = {form: make_form(form, capsules) for form in right}
    seconds = {}
    for mode in modes:
        calls = {f: _call(function, capsules, given, mode) for f, function in functions.items()}
        seconds[mode] = alternating(calls, options.rounds)
    return {"layer": asdict(layer), "relative_error": wrong, "seconds": seconds}


def measure_alone(layer: Layer, options: Options) -> dict[str, Any]:
    """Engine fused on a layer whose votes would not fit, so that no dense form checks it."""
    capsules = make_capsules(layer, make_graph(layer), options.device)
    given = make_input(layer, capsules)
    function = make_form("fused", capsules)
    seconds = {
        mode: alternating({"fused": _call(function, capsules, given, mode)}, options.rounds)
        for mode in MODES[::2]
    }
    return {
        "layer": asdict(layer),
        "seconds": seconds,
        "peak_mib": peaks_apart("fused", layer, options),
    }


def measure_in_a_row(options: Options) -> dict[str, list[float]]:
    """Engine fused call after call, where all else is timed after a pause; beside a product."""
    capsules = make_capsules(options.layer, make_graph(options.layer), options.device)
    given = make_input(options.layer, capsules)
    matrix = torch.randn(2048, 2048, device=options.device)
    calls = {
        "fused, forward + backward": _call(
            make_form("fused", capsules), capsules, given, MODES[-1]
        ),
        "a product of matrices, 2048 x 2048": lambda: matrix @ matrix,
    }
    return {name: in_a_row(call, options.rounds) for name, call in calls.items()}


def measure_kept(form: str, mode: str, options: Options) -> dict[str, list[float]]:
    """One form on graphs with ever fewer edges, one after the other in every round."""
    calls = {}
    for share in SWEEPS["kept"]:
        layer = replace(options.layer, kept=share)
        capsules = make_capsules(layer, make_graph(layer), options.device)
        given = make_input(layer, capsules)
        calls[str(share)] = _call(make_form(form, capsules), capsules, given, mode)
    return alternating(calls, options.rounds)


def _call(
    function: Callable[..., Tensor], capsules: gc.CapsuleLayer, given: tuple[Tensor, ...], mode: str
) -> Callable[[], Tensor]:
    return lambda: run(function, capsules, given, mode)


def peak_memory(
    form: str, mode: str, capsules: gc.CapsuleLayer, given: tuple[Tensor, ...]
) -> float:
    """MiB that one run needs beyond its inputs and its gradients."""
    function = make_form(form, capsules)
    run(function, capsules, given, mode)  # libraries load, and code that is compiled for this size
    inputs = (*given, *capsules.parameters())
    results = sum(x.numel() for x in inputs) if mode == "forward+backward" else 0
    for x in inputs:
        x.grad = None
    if capsules.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(function, capsules, given, mode)
        return (torch.cuda.max_memory_allocated() - before - 4 * results) / MEBI
    return peak_mib(lambda: run(function, capsules, given, mode)) - 4 * results / MEBI


def peaks_apart(form: str, layer: Layer, options: Options) -> dict[str, float]:
    """The same for every mode, in a process of its own."""
    sizes = [
        f"--layer.{name.replace('_', '-')}={n}"
        for name, n in asdict(layer).items()
        if n is not None
    ]
    printed = in_own_process(
        __file__,
        *sizes,
        f"--threads={options.threads}",
        f"--device={options.device}",
        f"--memory-of={form}",
    )
    return dict(zip(MODES, map(float, printed.split()[-len(MODES) :]), strict=True))


def ragged(sizes: Sequence[int], kinds: int = 4, parents: int = 10) -> dgl.DGLGraph:
    """Graphs whose nodes are of so many kinds, and vote for all parents of their graph."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for size in sizes:
        kind = torch.randint(kinds, (size, 1), generator=generator)
        kind[0] = kinds - 1
        graphs.append(
            gc.routing_graph(
                torch.arange(size).repeat_interleave(parents),
                torch.arange(parents).repeat(size),
                weight_index=(kind * parents + torch.arange(parents)).flatten(),
            )
        )
    return dgl.batch(graphs)


def route_padded(capsules: gc.CapsuleLayer, graph: dgl.DGLGraph, u: Tensor) -> Tensor:
    """A ragged batch by hand, by dynamic routing: every graph padded to the largest."""
    sizes = graph.batch_num_nodes("child")
    parents = int(graph.batch_num_nodes("parent")[0])
    there = torch.arange(int(sizes.max())) < sizes[:, None]
    kind = graph.edata["weight_index"].view(-1, parents)[:, 0] // parents
    kinds = len(capsules.weight) // parents
    # a pose stands at the place of its kind, between zeros: one product gives all votes
    u = (F.one_hot(kind, kinds).to(u)[..., None] * u[:, None]).flatten(1)
    padded = u.new_zeros(*there.shape, u.shape[1]).index_put(there.nonzero(as_tuple=True), u)
    matrices = capsules.weight.unflatten(0, (kinds, parents)).transpose(1, 2).flatten(0, 1)
    u_hat = (padded @ matrices.flatten(1)).unflatten(-1, (parents, -1))
    b, mask = u_hat.new_zeros(u_hat.shape[:3]), there[..., None].to(u)
    for iteration in range(3):
        s = torch.einsum("bij,bijd->bjd", b.softmax(dim=2) * mask, u_hat)
        v = gc.squash(s)
        if iteration < 2:
            b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
    return v.flatten(0, 1)


def with_lanes_of(which: Literal["samples", "poses"], call: Callable[[], Tensor]) -> Callable:
    """A call of the kernel on the CPU with samples or poses in lanes, whatever it would choose."""

    def run() -> Tensor:
        chosen = lay_out.COST_OF_A_POSE
        lay_out.COST_OF_A_POSE = float("inf") if which == "samples" else 0
        try:
            return call()
        finally:
            lay_out.COST_OF_A_POSE = chosen

    return run


def prepared_anew(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call whose graph is prepared as at its first call."""

    def run() -> Tensor:
        structure.forget_graphs()
        return call()

    return run


def choice_cases() -> Iterable[tuple[str, gc.CapsuleLayer, Tensor, dgl.DGLGraph | None]]:
    """Name, layer, poses, and a graph of their own where they are a ragged batch."""
    for batch in (1, 2, 4, 7, 8, 16, 32, 64, 128, 256):
        layer = Layer(batch=batch)
        capsules = make_capsules(layer, make_graph(layer), "cpu")
        yield f"1152 to 10, batch {batch}", capsules, make_input(layer, capsules)[0], None
    for batch in (1, 8, 64):
        layer = Layer(batch=batch, kept=0.1)
        capsules = make_capsules(layer, make_graph(layer), "cpu")
        yield f"a tenth of it, batch {batch}", capsules, make_input(layer, capsules)[0], None
    graph = gc.conv_graph(12, 12, 8, 8, kernel_size=3)
    for batch in (1, 4, 8, 16, 32):
        capsules = make_capsules(Layer(), graph, "cpu")
        u = make_input(Layer(batch=batch, children=1152), capsules)[0]
        yield f"3x3 windows, batch {batch}", capsules, u, None
    yield from ragged_cases()


def ragged_cases() -> Iterable[tuple[str, gc.CapsuleLayer, Tensor, dgl.DGLGraph]]:
    """Those of `choice_cases` that are ragged batches."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(20, 61, (64,), generator=generator).tolist()
    # from 20 to 620 nodes, most of them small, as the graphs of PROTEINS
    many = (20 + 600 * torch.rand(64, generator=generator) ** 8).int().tolist()
    for name, sizes in (("20 to 60 nodes", few), ("20 to 620 nodes", many)):
        batch = ragged(sizes)
        capsules = make_capsules(Layer(), ragged([4]), "cpu")
        u = make_input(Layer(batch=1, children=sum(sizes)), capsules)[0]
        yield f"64 graphs of {name}", capsules, u[0].detach().requires_grad_(), batch


def route_ragged(
    form: str, capsules: gc.CapsuleLayer, graph: dgl.DGLGraph
) -> Callable[[Tensor], Tensor]:
    """A ragged batch by `auto`, or padded by hand."""

    def route(u: Tensor) -> Tensor:
        v = route_padded(capsules, graph, u) if form == "padded" else capsules(u, graph=graph)
        return v.square().sum()

    return route


def peak_of_ragged(form: str, case: str) -> float:
    """MiB that forward and backward of a ragged batch need beyond inputs and gradients."""
    capsules, u, graph = next(rest for name, *rest in ragged_cases() if name == case)
    call = _call(route_ragged(form, capsules, graph), capsules, (u,), MODES[-1])
    call()
    u.grad = capsules.weight.grad = None
    return peak_mib(call) - 4 * (u.numel() + capsules.weight.numel()) / MEBI


def peaks_of_ragged(case: str, options: Options) -> dict[str, float]:
    """The same of `auto` and of the padded form, each in a process of its own."""
    peaks = {
        form: float(
            in_own_process(
                __file__, f"--threads={options.threads}", f"--memory-of={form}", f"--case={case}"
            )
        )
        for form in ("auto", "padded")
    }
    print(f"{case}: " + ", ".join(f"{form} {peak:.1f} MiB" for form, peak in peaks.items()))
    return peaks


def measure_choices(options: Options) -> dict[str, Any]:
    """Forward and backward of `auto`, and of all it could have taken; seconds of each round."""
    found = {}
    for name, capsules, u, graph in choice_cases():

        def by(
            engine: str, capsules: Any = capsules, u: Any = u, graph: Any = graph
        ) -> Callable[[], Tensor]:
            def route(u: Tensor) -> Tensor:
                capsules.engine = engine
                return capsules(u, graph=graph).square().sum()

            return _call(route, capsules, (u,), "forward+backward")

        calls: dict[str, Callable[[], Tensor]] = {
            "auto": by("auto"),
            "samples": with_lanes_of("samples", by("fused")),
            "poses": with_lanes_of("poses", by("fused")),
            "builtin": by("builtin"),
        }
        if graph is not None:
            padded = route_ragged("padded", capsules, graph)
            calls["padded"] = _call(padded, capsules, (u,), "forward+backward")
            calls["anew"] = prepared_anew(calls["auto"])
        elif capsules.structure.complete:
            calls["dense"] = _call(make_form("dense", capsules), capsules, (u,), "forward+backward")
        found[name] = alternating(calls, options.rounds)
        middle = {form: 1e3 * quartiles(x)[1] for form, x in found[name].items()}
        best = min(time for form, time in middle.items() if form != "anew")
        times = ", ".join(f"{form} {x:.2f}" for form, x in middle.items())
        print(f"{name}: {times} ms; auto / best {middle['auto'] / best:.2f}", flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    """The layer's figures as Markdown: medians, quartiles, ratios to the eager dense form."""
    lines = [
        "| form | inference | × dense | forward + backward | × dense "
        "| peak memory, inference | forward + backward |",
        "|---|---|---|---|---|---|---|",
    ]
    seconds, peaks = results["seconds"], results["peak_mib"]
    for form, error in results["relative_error"].items():
        if form not in peaks:
            lines.append(f"| {form} | {error if isinstance(error, str) else 'wrong'} |||||||")
            continue
        cells = [form]
        for mode in ("inference", "forward+backward"):
            low, middle, high = (1e3 * q for q in quartiles(seconds[mode][form]))
            ratio = middle / 1e3 / quartiles(seconds[mode]["dense"])[1]
            cells += [f"{middle:.0f} ms ({low:.0f} to {high:.0f})", f"{ratio:.2f}"]
        cells += [f"{peaks[form][mode]:.0f} MiB" for mode in ("inference", "forward+backward")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_routings(results: dict[str, Any]) -> str:
    """Every routing by `fused` beside its dense form and DGL's kernels, as Markdown."""
    lines = [
        "| routing | poses | dense, forward + backward | × dense: builtin | fused "
        "| peak memory: dense | fused |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results["routings"]:
        layer, peaks = case["layer"], case["peak_mib"]
        times = {f: quartiles(x)[1] for f, x in case["seconds"]["forward+backward"].items()}
        pose = "4×4" if layer["rows"] == 4 else f"{layer['child_dim']} → {layer['parent_dim']}"
        cells = [layer["routing"], pose, f"{1e3 * times['dense']:.0f} ms"]
        for form in ("builtin", "fused"):
            cells.append(f"{times[form] / times['dense']:.3f}" if form in times else "wrong")
        cells += [f"{peaks[form]['forward+backward']:.0f} MiB" for form in ("dense", "fused")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(layer: dict[str, Any]) -> str:
    """A layer in words."""
    rounds = "" if layer["iterations"] is None else f", {layer['iterations']} iterations"
    return (
        f"{layer['children']} → {layer['parents']} capsules, {layer['child_dim']} → "
        f"{layer['parent_dim']}, {layer['routing']} routing{rounds}, batch {layer['batch']}"
    )


def main() -> None:
    """Measure, print, write the JSON."""
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    torch.set_num_threads(options.threads)
    if options.memory_of is not None and options.case is not None:
        print(peak_of_ragged(options.memory_of, options.case))
        return
    if options.memory_of is not None:
        capsules = make_capsules(options.layer, make_graph(options.layer), options.device)
        given = make_input(options.layer, capsules)
        for mode in MODES:
            print(peak_memory(options.memory_of, mode, capsules, given))
        return
    if options.choices:
        found = measure_choices(options)
        peaks = {name: peaks_of_ragged(name, options) for name, *_ in ragged_cases()}
        if options.output is not None:
            about = {"machine": machine(options.threads), "peak_mib": peaks}
            write(options.output, {**about, "choices": found})
        return
    if options.short:
        options = replace(options, rounds=max(2, options.rounds // 3))
    results: dict[str, Any] = {"machine": machine(options.threads), "rounds": options.rounds}
    results |= measure(options.layer, FORMS, MODES, options)
    right = results["seconds"]["inference"]
    results["peak_mib"] = {form: peaks_apart(form, options.layer, options) for form in right}
    print(describe(results["layer"]), results["machine"], "\n", table(results), sep="\n")
    results["in_a_row"] = measure_in_a_row(options)
    for name, seconds in results["in_a_row"].items():
        print(f"{name}, call after call: {1e3 * quartiles(seconds)[1]:.1f} ms")
    if not options.short:
        results["sweeps"] = {
            name: [
                measure(replace(options.layer, **{name: value}), SWEPT, MODES[::2], options)
                for value in values
            ]
            for name, values in SWEEPS.items()
        }
        results["kept"] = measure_kept("fused", MODES[-1], options)
        results["routings"] = [
            measure(layer, OF_OTHERS, MODES[::2], options)
            | {"peak_mib": {form: peaks_apart(form, layer, options) for form in OF_OTHERS}}
            for layer in OTHERS
        ]
        print("\n" + table_of_routings(results))
        few = replace(options, rounds=2)
        for name, layer in WITHOUT_VOTES.items():
            results[name] = measure_alone(layer, few)
            peaks = results[name]["peak_mib"]
            print(f"\n{describe(asdict(layer))}, fused: {peaks} MiB")
    if options.output is not None:
        write(options.output, results)


if __name__ == "__main__":
    main()
