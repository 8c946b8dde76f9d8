"""Train a CapsNet on MNIST with the recipe of Sabour et al. 2017, in one short script.

    python scripts/train_mnist.py --epochs 30

`graphcaps train --preset paper` adds checkpoints, resuming, several processes and a run folder.
"""

from typing import Literal

import torch
import tyro
from tqdm import tqdm

import graphcaps as gc
from graphcaps.data import draw_shifts, load_dataset, shift
from graphcaps.training import as_input, evaluate


def main(
    dataset: str = "mnist",
    preset: Literal["paper", "small"] = "paper",
    epochs: int = 30,
    batch_size: int = 128,
    seed: int = 0,
) -> None:
    """Train a CapsNet as the paper does.

    Args:
        dataset: mnist, fashion-mnist, mnist-5k, or a folder with four IDX files.
        preset: the net.
        epochs: passes over the training images.
        batch_size: images per step.
        seed: of weights, order and shifts.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_dataset(dataset)
    images, labels = data.train.images.to(device), data.train.labels.to(device)

    model = gc.CapsNet.from_preset(preset, classes=len(data.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.96 ** (step / 2000))

    best_accuracy, best_weights = -1.0, model.state_dict()
    for epoch in range(epochs):
        order = torch.randperm(len(labels)).to(device)
        for chosen in tqdm(order.split(batch_size), desc=f"epoch {epoch + 1}/{epochs}"):
            moved = shift(images[chosen], draw_shifts(len(chosen), up_to=2))
            x, y = as_input(moved, model), labels[chosen]
            loss = gc.capsnet_loss(model(x, y), x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        accuracy = evaluate(model, data.holdout).accuracy
        print(f"epoch {epoch + 1}: validation accuracy {accuracy:.2%}")
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.load_state_dict(best_weights)
    score = evaluate(model, data.test)
    print(f"test accuracy {score.accuracy:.2%}, {score.errors} errors in {score.images:,} images")


if __name__ == "__main__":
    tyro.cli(main)
