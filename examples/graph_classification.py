"""Classify graphs with capsules: node capsules vote for graph capsules, and these for classes.

The data are read by DGL's own `GINDataset`, which downloads them; where there is no network, from a
folder that holds NAME/NAME.txt in the format of that class:

    python examples/graph_classification.py --name PROTEINS
    python examples/graph_classification.py --name PROTEINS --data FOLDER --output proteins.json

Three readouts of the same graph neural network are compared by 10-fold cross-validation: dynamic
routing, uniform routing, and the mean over the nodes. In each fold one part in ten is for testing,
and of the rest one part chooses the epoch; the test part is read once, after that choice.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphcaps as gc

import dgl  # isort: skip (after graphcaps, which makes it importable under any torch)
from dgl.data import GINDataset  # isort: skip
from dgl.nn import GINConv  # isort: skip

HIDDEN, LAYERS = 32, 3  # of the graph neural network
NODE_DIM, GRAPH_DIM, CLASS_DIM = 8, 16, 16  # numbers in a pose
GRAPH_CAPSULES = 4  # of each graph


# 1. The data: DGL graphs with node features `attr`, one-hot node labels, and a class each.


def load(name: str, folder: Path | None) -> GINDataset:
    """One of GINDataset's collections, downloaded, or from FOLDER/NAME/NAME.txt."""
    if folder is None:
        return GINDataset(name, self_loop=False)
    with tempfile.TemporaryDirectory() as raw_dir:  # laid out as GINDataset's download is
        place = Path(raw_dir, "GINDataset", "dataset", name)
        place.mkdir(parents=True)
        shutil.copy(folder / name / f"{name}.txt", place)
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
