"""Classify graphs with capsules: node capsules vote for graph capsules, and these for classes.

The data are those of DGL's `GINDataset`, which downloads them; without a network, they are read
from a folder with NAME/NAME.txt in the format of that class:

    python examples/graph_classification.py MUTAG
    python examples/graph_classification.py PROTEINS --data FOLDER --output proteins.json

Three readouts of the same graph neural network are compared by 10-fold cross-validation: dynamic
routing, uniform routing, and the mean over the nodes, with as many parameters. Of the ten parts of
the data, a fold tests on one and trains on eight; the accuracy on the remaining one chooses the
epoch. The test part is read once, after that.
"""

import argparse
import copy
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphcaps as gc

import dgl  # isort: skip (after graphcaps, which makes it importable under any torch)
from dgl.data import GINDataset  # isort: skip
from dgl.nn import GINConv  # isort: skip

HIDDEN, LAYERS = 32, 2  # of the graph neural network
NODE_DIM, GRAPH_DIM, CLASS_DIM = 8, 16, 16  # numbers in a pose
GRAPH_CAPSULES = 4  # of each graph
BATCH_SIZE, RATE = 64, 0.01  # graphs; the highest learning rate


# 1. The data: DGL graphs with node features `attr`, one-hot node labels, and a class each.


def file_of(name: str, folder: Path) -> Path:
    """Where a collection is in the folder."""
    return folder / name / f"{name}.txt"


def load(name: str, folder: Path | None) -> GINDataset:
    """One of GINDataset's collections, downloaded, or from the folder."""
    if folder is None:
        return GINDataset(name, self_loop=False)
    with tempfile.TemporaryDirectory() as raw_dir:  # laid out as GINDataset's download is
        place = Path(raw_dir, "GINDataset", "dataset", name)
        place.mkdir(parents=True)
        shutil.copy(file_of(name, folder), place)
        return GINDataset(name, self_loop=False, raw_dir=raw_dir)


# 2. From a graph to node capsules: graph isomorphism convolutions (Xu et al. 2019), whose outputs
# at all depths are projected to the pose of one capsule for each node.


class NodeCapsules(nn.Module):
    """Poses of all nodes of a batched graph, `[N, NODE_DIM]`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            GINConv(
                nn.Sequential(
                    nn.Linear(size, HIDDEN),
                    nn.BatchNorm1d(HIDDEN),
                    nn.ReLU(),
                    nn.Linear(HIDDEN, HIDDEN),
                    nn.BatchNorm1d(HIDDEN),
                    nn.ReLU(),
                )
            )
            for size in [features] + (LAYERS - 1) * [HIDDEN]
        )
        self.project = nn.Linear(LAYERS * HIDDEN, NODE_DIM)

    def forward(self, graph: dgl.DGLGraph) -> Tensor:
        """Convolve the features of the nodes, and project."""
        x, depths = graph.ndata["attr"], []
        for convolution in self.convolutions:
            x = convolution(graph, x)
            depths.append(x)
        return self.project(torch.cat(depths, dim=1))


# 3. From node capsules to graph capsules: every node votes for every capsule of its graph. The
# matrix of a vote depends on the graph capsule alone and is shared by all nodes of all graphs, so
# that graphs of any size fit.


def pooling_graph(nodes: Tensor) -> dgl.DGLGraph:
    """The routing graph of a batch of graphs with so many `nodes`, `[B]`."""
    graphs = torch.arange(len(nodes))
    batch = graphs.repeat_interleave(nodes)  # the graph of each node
    child = torch.arange(len(batch)).repeat_interleave(GRAPH_CAPSULES)
    capsule = torch.arange(GRAPH_CAPSULES).repeat(len(batch))
    return gc.graph_from_edge_index(
        torch.stack([child, batch[child] * GRAPH_CAPSULES + capsule]),
        batch=(batch, graphs.repeat_interleave(GRAPH_CAPSULES)),
        weight_index=capsule,
    )


class CapsuleClassifier(nn.Module):
    """Node capsules → graph capsules → class capsules, whose lengths are the scores."""

    def __init__(self, features: int, classes: int, routing: str) -> None:
        super().__init__()
        self.nodes = NodeCapsules(features)
        self.graphs = gc.CapsuleLayer(  # has no graph of its own: each batch brings one
            kinds=GRAPH_CAPSULES, child_dim=NODE_DIM, parent_dim=GRAPH_DIM, routing=routing
        )
        self.classes = gc.CapsuleLayer(
            gc.complete_graph(GRAPH_CAPSULES, classes), GRAPH_DIM, CLASS_DIM, routing=routing
        )

    def forward(self, graph: dgl.DGLGraph) -> Tensor:
        """Scores, `[B, classes]`."""
        nodes = graph.batch_num_nodes()
        poses = self.graphs(gc.squash(self.nodes(graph)), graph=pooling_graph(nodes))
        return gc.length(self.classes(poses.unflatten(0, (len(nodes), GRAPH_CAPSULES))))

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Margin loss of the lengths."""
        return gc.margin_loss(scores, labels)


class MeanClassifier(nn.Module):
    """The mean of the nodes' poses, and a perceptron on it."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.nodes = NodeCapsules(features)
        self.perceptron = nn.Sequential(
            nn.Linear(NODE_DIM, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, graph: dgl.DGLGraph) -> Tensor:
        """Scores, `[B, classes]`."""
        poses, nodes = self.nodes(graph), graph.batch_num_nodes()
        return self.perceptron(dgl.ops.segment_reduce(nodes, poses, reducer="mean"))

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the scores."""
        return cross_entropy(scores, labels)


Classifier = CapsuleClassifier | MeanClassifier


def make_classifier(readout: str, features: int, classes: int) -> Classifier:
    """A classifier by its readout; the mean gets as many parameters as the capsules have."""
    if readout != "mean":
        return CapsuleClassifier(features, classes, readout)
    capsules = CapsuleClassifier(features, classes, "dynamic")
    matrices = capsules.graphs.weight.numel() + capsules.classes.weight.numel()
    hidden = round((matrices - classes) / (NODE_DIM + 1 + classes))
    return MeanClassifier(features, classes, hidden)


# 4. Training, with selection inside the fold.


def split(labels: Tensor, parts: int, seed: int) -> list[Tensor]:
    """Numbers of graphs in so many parts, in each of which every class is as frequent."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    return [by_class[part::parts] for part in range(parts)]


def batch_of(data: GINDataset, chosen: Tensor) -> tuple[dgl.DGLGraph, Tensor]:
    """Some graphs as one batched graph, and their labels."""
    return dgl.batch([data[i][0] for i in chosen.tolist()]), data.labels[chosen]


@torch.no_grad()
def evaluate(model: Classifier, data: GINDataset, chosen: Tensor) -> tuple[float, float]:
    """Accuracy and loss."""
    model.eval()
    scores = torch.cat([model(batch_of(data, some)[0]) for some in chosen.split(BATCH_SIZE)])
    labels = data.labels[chosen]
    accuracy = (scores.argmax(dim=1) == labels).double().mean().item()
    return accuracy, model.loss(scores, labels).item()


def run_fold(
    readout: str, data: GINDataset, parts: list[Tensor], fold: int, epochs: int
) -> dict[str, Any]:
    """Train a new classifier, choose the epoch, test once."""
    torch.manual_seed(fold)
    test, validation, *rest = parts[fold:] + parts[:fold]
    training = torch.cat(rest)
    model = make_classifier(readout, data.dim_nfeats, data.num_classes)
    steps = epochs * -(-len(training) // BATCH_SIZE)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    best, state, chosen = (-1.0, 0.0), model.state_dict(), 0
    for epoch in range(epochs):
        model.train()
        for some in training[torch.randperm(len(training))].split(BATCH_SIZE):
            graph, labels = batch_of(data, some)
            optimizer.zero_grad()
            model.loss(model(graph), labels).backward()
            optimizer.step()
            schedule.step()
        accuracy, loss = evaluate(model, data, validation)
        if (accuracy, -loss) > best:
            best, state, chosen = (accuracy, -loss), copy.deepcopy(model.state_dict()), epoch
    model.load_state_dict(state)
    return {
        "epoch": chosen + 1,
        "validation": best[0],
        "test": evaluate(model, data, test)[0],
        "parameters": sum(x.numel() for x in model.parameters()),
    }


# 5. The table.


def row(readout: str, measured: dict[str, Any]) -> str:
    """A line of the table."""
    folds = measured["folds"]
    tests = 100 * torch.tensor([fold["test"] for fold in folds])
    return (
        f"| {readout} | {folds[0]['parameters']:,} | {tests.mean():.1f} ± {tests.std():.1f} % "
        f"| {measured['seconds']:.0f} s |"
    )


def processor() -> str:
    """What the processor is called."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Read the arguments, run all folds of each readout, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="a collection of GINDataset, such as MUTAG or PROTEINS")
    parser.add_argument("--data", type=Path, help="a folder with NAME/NAME.txt; else downloaded")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    asked = parser.parse_args()
    if asked.folds < 3:
        parser.error(f"training, validation and test need 3 folds or more; got {asked.folds}")
    if asked.data is not None and not file_of(asked.name, asked.data).exists():
        parser.error(f"there is no {file_of(asked.name, asked.data)}")
    data = load(asked.name, asked.data)
    parts = split(data.labels, asked.folds, seed=0)
    machine = (
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"DGL {dgl.__version__}"
    )
    print(
        f"{asked.name}: {len(data)} graphs, {data.num_classes} classes; {asked.folds} folds, "
        f"{asked.epochs} epochs; {machine}\n\n"
        "| readout | parameters | test accuracy, mean ± std over folds | processor time |\n"
        "|---|---|---|---|",
        flush=True,
    )
    results: dict[str, Any] = {"name": asked.name, "epochs": asked.epochs, "machine": machine}
    results["readouts"] = {}
    for readout in ("dynamic", "uniform", "mean"):
        started = time.process_time()
        folds = [run_fold(readout, data, parts, n, asked.epochs) for n in range(asked.folds)]
        measured = {"folds": folds, "seconds": time.process_time() - started}
        print(row(readout, measured), flush=True)
        results["readouts"][readout] = measured
    if asked.output is not None:
        asked.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
