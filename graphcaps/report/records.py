"""The numbers that a report shows of a trained net and test images; nothing is drawn here."""

from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, nn

from graphcaps.data.splits import Dataset, Split
from graphcaps.functional import length, multi_hot
from graphcaps.nets.model import CapsNet, CapsNetConfig
from graphcaps.pictures.inspection import differences_from_dense, tweak_pose
from graphcaps.routing import Trace
from graphcaps.training.checkpoints import RunFolder
from graphcaps.training.evaluation import Score, as_input, evaluate, fitted
from graphcaps.training.settings import as_json

EXAMPLES = 20
MISTAKES = 8  # at most so many of the examples are misclassified ones
LOOKED_AT = 100  # test images whose routing is summed up
IN_GRAPH = 20  # children of the drawn graph
OF_SUM = ("dynamic", "uniform", "self_attention")  # v points where a sum of votes does
OF_MEAN = ("em", "variational_bayes", "self_routing")  # v is a mean of votes
COMPARED = 8  # images on which engines are compared with the dense form


@dataclass(frozen=True)
class Example:
    """A test image and what every iteration of the routing did with it, on the CPU.

    Attributes:
        number: its place in the test set, from 0.
        labels: the true class, or all of them.
        predicted: the predicted class after the last iteration, or all of them, the longest first.
        image: uint8 `[C, H, W]`.
        poses: class capsules v, `[R, J, D]`.
        lengths: how sure the net is of each class, |v| or activations, `[R, J]`.
        coupling: c, `[R, I, J]`.
        amounts: what each child gives to each class, `[R, I, J]`: its share of |s_j| or |v_j|, see
            `shares`, where `carries` says so, or else c times the child's activation, or its
            length |u| where it has none.
    """

    number: int
    labels: tuple[int, ...]
    predicted: tuple[int, ...]
    image: Tensor
    poses: Tensor
    lengths: Tensor
    coupling: Tensor
    amounts: Tensor

    @property
    def main(self) -> int:
        """The class of the longest capsule after the last iteration."""
        return int(self.lengths[-1].argmax())

    @property
    def right(self) -> bool:
        """Whether the predicted classes are exactly the true ones."""
        return sorted(self.labels) == sorted(self.predicted)


@dataclass(frozen=True)
class Records:
    """Everything that a report says about a run.

    Attributes:
        name: of the run.
        settings: what settings.json holds.
        result: what result.json holds; None while the run is not finished.
        metrics: the records of metrics.jsonl.
        config: sizes of the net.
        parameters: their number.
        classes: names of the classes.
        data: name of the data set.
        score: lengths and labels of all test images.
        examples: the images to look into.
        entropy: of every child's coupling, in nats, for the first of the test images, `[R, N, I]`.
        coupling: c, for the same images, `[R, N, E]`.
        graph: the first example at the last iteration, with the children that couple most.
        drawn: what the decoder draws of the examples, `[n, C, H, W]`; None without a decoder.
        tweaked: the first example's pose, moved, as `inspection.tweak_pose` draws it; likewise.
        differences: of the engines from dense routing, as `inspection.differences_from_dense`
            gives them.
        decoder: weight `[out, in]` and bias `[out]` of each of the decoder's layers; none
            without a decoder.
    """

    name: str
    settings: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    config: CapsNetConfig
    parameters: int
    classes: tuple[str, ...]
    data: str
    score: Score
    examples: tuple[Example, ...]
    entropy: Tensor
    coupling: Tensor
    graph: networkx.MultiGraph
    drawn: Tensor | None
    tweaked: Tensor | None
    differences: dict[str, dict[str, float]]
    decoder: tuple[tuple[Tensor, Tensor], ...]


def collect(run: RunFolder, model: CapsNet, data: Dataset) -> Records:
    """Run the net over the test images and look inside it for some of them.

    Args:
        run: its settings, metrics and result.
        model: the net; left in evaluation mode.
        data: the data set that it was trained on.

    Returns:
        The records.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: images or classes that are not those of the net.
    """
    if model.config.routing is None:
        raise ValueError("this net has no capsules, whose routing a report shows: it is a control")
    settings = as_json(run.settings())
    data = fitted(data, model)
    if len(data.classes) != model.config.classes:
        raise ValueError(
            f"the net has {model.config.classes} classes, but {data.name} has "
            f"{len(data.classes)}: name the data set it was trained on with --dataset"
        )
    model.eval()
    score = evaluate(model, data.test)
    chosen = choose_examples(score.lengths, score.labels, score.wrong)
    examples = look_inside(model, data.test, chosen)
    first = as_input(data.test.images[:LOOKED_AT], model)
    with torch.no_grad():
        _, trace = model(first, return_trace=True)
        output, of_examples = model(as_input(data.test.images[chosen], model), return_trace=True)
        children = model.primary_capsules(first[:COMPARED])
    last = len(trace.c) - 1
    strongest = of_examples.strongest_children(0, last, IN_GRAPH)
    shown = examples[0]
    return Records(
        name=run.path.resolve().name,
        settings=settings,
        result=run.result(),
        metrics=run.metrics(),
        config=model.config,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=data.classes,
        data=data.name,
        score=score,
        examples=examples,
        entropy=trace.entropy().cpu(),
        coupling=trace.c.cpu(),
        graph=of_examples.networkx(0, last, children=strongest),
        drawn=output.reconstruction,
        tweaked=None if model.decoder is None else tweak_pose(model, output.poses[0], shown.main),
        differences=differences_from_dense(model.capsules, *children),
        decoder=decoder_layers(model),
    )


def choose_examples(
    lengths: Tensor,
    labels: Tensor,
    wrong: Tensor | None = None,
    *,
    count: int = EXAMPLES,
    mistakes: int = MISTAKES,
) -> list[int]:
    """Which test images to look into: right ones of every class, then the surest mistakes.

    Args:
        lengths: of all class capsules of all images, `[N, J]`.
        labels: true classes, `[N]`, or 0 and 1 in `[N, J]`, of which the first counts.
        wrong: which images are misclassified, `[N]`; those whose longest capsule is not of the
            true class, if not given.
        count: how many to choose, or all if there are fewer.
        mistakes: at most so many misclassified ones, those with the longest wrong capsule.

    Returns:
        Places in the test set. The right ones are the first of each class, then the second, and
        so on until there are enough, sorted by class.

    >>> lengths = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.1, 0.8], [0.6, 0.5]])
    >>> choose_examples(lengths, torch.tensor([0, 0, 1, 1]), mistakes=1)
    [0, 2, 1]
    """
    longest, predicted = lengths.max(dim=1)
    if wrong is None:
        wrong = predicted != labels
    right_ones = (~wrong).tolist()
    wrong = wrong.nonzero().flatten()
    labels = labels if labels.dim() == 1 else labels.argmax(dim=1)
    surest = wrong[longest[wrong].argsort(descending=True, stable=True)][:mistakes].tolist()
    nth_of_class = []  # (how many of its class came before, class, place)
    seen = [0] * lengths.shape[1]
    for place, label in enumerate(labels.tolist()):
        if right_ones[place]:
            nth_of_class.append((seen[label], label, place))
            seen[label] += 1
    first = sorted(nth_of_class)[: count - len(surest)]
    right = [place for _, place in sorted((label, place) for _, label, place in first)]
    return right + surest


@torch.no_grad()
def look_inside(model: CapsNet, split: Split, chosen: list[int]) -> tuple[Example, ...]:
    """What every iteration of the routing does with some images.

    Args:
        model: the net.
        split: the images.
        chosen: places in `split`.

    Returns:
        An example for each of them.
    """
    children = model.primary_capsules(as_input(split.images[chosen], model))
    _, trace = model.capsules(*children, return_trace=True)
    rounds, samples = trace.c.shape[:2]
    c = trace.c.view(rounds, samples, -1, model.config.classes)
    if carries(model.config):
        amounts = shares(model, trace, children[1] if len(children) == 2 else None)
    else:
        strength = children[1] if len(children) == 2 else length(children[0])
        amounts = c * strength[:, :, None]
    lengths = model.confidence(trace.v, trace.a)
    classes = (samples, model.config.classes)
    predicted = multi_hot(model.classify(lengths[-1]), *classes).bool()
    labels = multi_hot(split.labels[chosen], *classes)
    longest_first = lengths[-1].argsort(dim=1, descending=True).tolist()
    return tuple(
        Example(
            number=number,
            labels=tuple(labels[b].nonzero().flatten().tolist()),
            predicted=tuple(k for k in longest_first[b] if predicted[b, k]),
            image=split.images[number],
            poses=trace.v[:, b].cpu(),
            lengths=lengths[:, b].cpu(),
            coupling=c[:, b].cpu(),
            amounts=amounts[:, b].cpu(),
        )
        for b, number in enumerate(chosen)
    )


def carries(config: CapsNetConfig) -> bool:
    """Whether the pose of a class points where a weighted sum of its votes does.

    >>> carries(CapsNetConfig(routing="em")), carries(CapsNetConfig(routing="attention"))
    (True, False)
    """
    return config.routing in OF_SUM or config.routing in OF_MEAN


def shares(model: CapsNet, trace: Trace, a: Tensor | None) -> Tensor:
    """What each child adds to the length of a class's sum of votes, or of its mean.

    Args:
        model: with a routing that `carries`.
        trace: of its class capsules.
        a: activations of the children, `[B, I]`, where there are some.

    Returns:
        `[R, B, I, J]`: `w û · v / |v|` with the weights w of the votes. Over the children they sum
        to |s_j|, or with activations to |v_j|.
    """
    rounds, samples, parents, dim = trace.v.shape
    c = trace.c.view(rounds, samples, -1, parents)
    beta = getattr(model.capsules.routing, "beta", None)
    if beta is not None:
        kinds = trace.structure.edata["weight_index"].long()
        c = c + beta[kinds].view(-1, parents)
    weights = c if a is None else c * a.unsqueeze(-1)
    votes = weights.unsqueeze(-1) * trace.u_hat.view(samples, -1, parents, dim)
    total = votes.sum(dim=2)  # points where v does
    size = length(total).unsqueeze(-1)
    along = total / torch.where(size > 0, size, 1)
    found = (votes * along.unsqueeze(2)).sum(dim=-1)
    if a is None:
        return found
    divisor = torch.where(size > 0, length(trace.v).unsqueeze(-1) / size, 0)
    return found * divisor.movedim(-1, -2)


def decoder_layers(model: CapsNet) -> tuple[tuple[Tensor, Tensor], ...]:
    """Weight `[out, in]` and bias `[out]` of the decoder's layers, on the CPU; none without one."""
    if model.decoder is None:
        return ()
    linear = [layer for layer in model.decoder.layers if isinstance(layer, nn.Linear)]
    return tuple((layer.weight.detach().cpu(), layer.bias.detach().cpu()) for layer in linear)
