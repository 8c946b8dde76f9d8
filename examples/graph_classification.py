"""Classify graphs with capsules: node capsules vote for graph capsules, and these for classes.

    python examples/graph_classification.py MUTAG
    python examples/graph_classification.py PROTEINS --data FOLDER

The data are those of DGL's `GINDataset`, which downloads them; `--data` reads FOLDER/NAME/NAME.txt.
Three readouts of one graph neural network are compared in ten folds: dynamic routing, uniform
routing, and the mean over the nodes, with as many parameters. A fold trains on eight parts of the
data, chooses the epoch by the accuracy on the ninth, and reads the tenth once, for the test.
"""

import argparse
import copy
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphcaps as gc

import dgl  # isort: skip (after graphcaps, which makes it importable under any torch)
from dgl.data import GINDataset  # isort: skip
from dgl.nn import GINConv  # isort: skip

HIDDEN = 32  # of the graph neural network
NODE_DIM, GRAPH_DIM, CLASS_DIM = 8, 16, 16  # numbers in a pose
GRAPH_CAPSULES = 4  # of each graph
BATCH_SIZE, RATE = 64, 0.01  # graphs; the highest learning rate


def load(name: str, folder: Path | None) -> GINDataset:
    """Graphs with node features `attr`, one-hot node labels, and a class each."""
    if folder is None:
        return GINDataset(name, self_loop=False)
    with tempfile.TemporaryDirectory() as raw_dir:  # laid out as GINDataset's download is
        shutil.copytree(folder / name, Path(raw_dir, "GINDataset", "dataset", name))
        return GINDataset(name, self_loop=False, raw_dir=raw_dir)


def pooling_graph(nodes: Tensor) -> dgl.DGLGraph:
    """Edges from every node to every capsule of its graph; `nodes`, `[B]`, are in each graph."""
    batch = torch.arange(len(nodes)).repeat_interleave(nodes)  # the graph of each node
    child = torch.arange(len(batch)).repeat_interleave(GRAPH_CAPSULES)
    capsule = torch.arange(GRAPH_CAPSULES).repeat(len(batch))
    return gc.graph_from_edge_index(
        torch.stack([child, batch[child] * GRAPH_CAPSULES + capsule]),
        batch=(batch, torch.arange(len(nodes)).repeat_interleave(GRAPH_CAPSULES)),
        weight_index=capsule,  # a matrix for each capsule, the same for all nodes and graphs
    )


class Capsules(nn.Module):
    """Node capsules → graph capsules → class capsules, whose lengths are the scores."""

    loss = staticmethod(gc.margin_loss)

    def __init__(self, classes: int, routing: str) -> None:
        super().__init__()
        self.graphs = gc.CapsuleLayer(  # has no graph of its own: each batch brings one
            kinds=GRAPH_CAPSULES, child_dim=NODE_DIM, parent_dim=GRAPH_DIM, routing=routing
        )
        complete = gc.complete_graph(GRAPH_CAPSULES, classes)
        self.classes = gc.CapsuleLayer(complete, GRAPH_DIM, CLASS_DIM, routing=routing)

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        poses = self.graphs(gc.squash(x), graph=pooling_graph(nodes))
        return gc.length(self.classes(poses.unflatten(0, (len(nodes), GRAPH_CAPSULES))))


class Mean(nn.Module):
    """A perceptron on the mean over the nodes, with as many parameters as `Capsules` has."""

    loss = staticmethod(cross_entropy)

    def __init__(self, classes: int) -> None:
        super().__init__()
        parameters = GRAPH_CAPSULES * GRAPH_DIM * (NODE_DIM + classes * CLASS_DIM)
        hidden = round((parameters - classes) / (NODE_DIM + 1 + classes))
        self.hidden, self.scores = nn.Linear(NODE_DIM, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        return self.scores(self.hidden(dgl.ops.segment_reduce(nodes, x, reducer="mean")).relu())


class Classifier(nn.Module):
    """Graph isomorphism convolutions (Xu et al. 2019), and a readout of what both give."""

    def __init__(self, features: int, classes: int, readout: str) -> None:
        super().__init__()

        def block(size: int) -> list[nn.Module]:
            return [nn.Linear(size, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]

        self.first = GINConv(nn.Sequential(*block(features), *block(HIDDEN)))
        self.second = GINConv(nn.Sequential(*block(HIDDEN), *block(HIDDEN)))
        self.project = nn.Linear(2 * HIDDEN, NODE_DIM)
        self.readout = Mean(classes) if readout == "mean" else Capsules(classes, readout)

    def forward(self, graph: dgl.DGLGraph) -> Tensor:
        x = self.first(graph, graph.ndata["attr"])
        x = self.project(torch.cat([x, self.second(graph, x)], dim=1))
        return self.readout(x, graph.batch_num_nodes())


def split(labels: Tensor, parts: int = 10) -> list[Tensor]:
    """Numbers of graphs in so many parts, in each of which every class is as frequent."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    return [by_class[part::parts] for part in range(parts)]


def run_fold(readout: str, data: GINDataset, parts: list[Tensor], fold: int, epochs: int) -> dict:
    """Train a new classifier, choose the epoch, test once."""
    torch.manual_seed(fold)
    test, validation, *rest = parts[fold:] + parts[:fold]
    training = torch.cat(rest)
    model = Classifier(data.dim_nfeats, data.num_classes, readout)
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * -(-len(training) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)

    def scores_of(some: Tensor) -> Tensor:
        return model(dgl.batch([data[i][0] for i in some.tolist()]))

    @torch.no_grad()
    def evaluate(part: Tensor) -> tuple[float, float]:
        model.eval()
        scores, labels = torch.cat([*map(scores_of, part.split(BATCH_SIZE))]), data.labels[part]
        accuracy = (scores.argmax(dim=1) == labels).double().mean()
        return accuracy.item(), -model.readout.loss(scores, labels).item()

    best = (-1.0, 0.0)  # accuracy, then loss with a minus
    for epoch in range(1, epochs + 1):
        model.train()
        for some in training[torch.randperm(len(training))].split(BATCH_SIZE):
            optimizer.zero_grad()
            model.readout.loss(scores_of(some), data.labels[some]).backward()
            optimizer.step()
            schedule.step()
        if (reached := evaluate(validation)) > best:
            best, chosen, state = reached, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    size = sum(x.numel() for x in model.parameters())
    return dict(epoch=chosen, validation=best[0], test=evaluate(test)[0], parameters=size)


def main() -> None:
    """Run all folds of each readout, print a table and write its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="a collection of GINDataset, such as MUTAG or PROTEINS")
    parser.add_argument("--data", type=Path, help="a folder with NAME/NAME.txt; else downloaded")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    asked = parser.parse_args()
    data = load(asked.name, asked.data)
    parts, results = split(data.labels), {}
    print("| readout | parameters | test accuracy, mean ± std over folds | processor time |")
    print("|---|---|---|---|", flush=True)
    for readout in ("dynamic", "uniform", "mean"):
        started = time.process_time()
        folds = [run_fold(readout, data, parts, n, asked.epochs) for n in range(len(parts))]
        seconds = time.process_time() - started
        tests = 100 * torch.tensor([fold["test"] for fold in folds])
        accuracy = f"{tests.mean():.1f} ± {tests.std():.1f} %"
        size = folds[0]["parameters"]
        print(f"| {readout} | {size:,} | {accuracy} | {seconds:.0f} s |", flush=True)
        results[readout] = {"seconds": seconds, "folds": folds}
    if asked.output is not None:
        asked.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
