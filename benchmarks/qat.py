"""Quantisation-aware training against the same training in float32: accuracy, and the size of the packed file.

    python benchmarks/qat.py --data mnist --seeds 0 1 2 --out benchmarks/results/qat.csv
    python benchmarks/qat.py --data cifar10 --seeds 0 1 2 --out benchmarks/results/qat.csv   # adds its rows

Both sets: 10,000 training images (`--train`), the whole test set, 10 epochs of Adam with one cycle of the learning rate; MNIST a
CNN of two convolutions, CIFAR-10 a ResNet-8 with crops and flips. What is saved is read back into a fresh module, and that is
judged. On a GPU the full set and a ResNet-20: ``--data cifar10 --train 50000 --depth 20 --epochs 60 --accelerator gpu``.
"""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

import dynfed_lightning as dfl
from dynfed_lightning.loaders import CropFlip
from dynfed_lightning.models import PaperCNN, ResNet
from dynfed_lightning.quiet import fixed_threads

FIELDS = [
    *(
        "data",
        "model",
        "bits",
        "seed",
        "train",
        "epochs",
        "accuracy",
        "loss",
        "layers",
        "quantised_values",
        "all_values",
    ),
    *("bytes_quantised", "bytes_file", "seconds", "threads", "precision", "device", "torch", "lightning"),
]


class OneCycle(L.LightningModule):
    """A network, cross-entropy, Adam and one cycle of its learning rate."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def network(data: str, depth: int) -> tuple[torch.nn.Module, str]:
    if data == "mnist":
        return PaperCNN(channels=(16, 32), latent=128), "CNN 16-32-128"
    return ResNet(depth), f"ResNet-{depth}"


@torch.no_grad()
def judge(model: torch.nn.Module, batches: Any) -> tuple[float, float]:
    """Accuracy in percent, and cross-entropy."""
    model.eval()
    right = total = 0
    loss = 0.0
    for x, y in batches:
        z = model(x)
        right += int((z.argmax(1) == y).sum())
        loss += float(F.cross_entropy(z, y, reduction="sum"))
        total += len(y)
    return 100 * right / total, loss / total


def run(args: argparse.Namespace, bits: int | None, seed: int) -> dict[str, Any]:
    data = dfl.FederatedDataModule(
        args.data,
        dfl.IID(num_clients=1),
        batch_size=128,
        train_fraction=args.train / {"mnist": 60000, "cifar10": 50000}[args.data],
        test_batch_size=1000,
        augment=CropFlip() if args.data == "cifar10" else None,
        seed=seed,
    )
    data.setup("fit")
    client = data.client(0)
    torch.manual_seed(seed)
    model, name = network(args.data, args.depth)
    quantize = dfl.QuantizationAware(bits, lam=args.lam, seed=seed)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[quantize],
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    with fixed_threads(args.threads):
        trainer.fit(OneCycle(model, args.lr), client.train_loader(seed))
    seconds = time.perf_counter() - start
    model = model.cpu()
    row: dict[str, Any] = {"data": args.data, "model": name, "bits": 32 if bits is None else bits, "seed": seed}
    row |= {"train": client.num_examples, "epochs": args.epochs, "seconds": f"{seconds:.1f}", "layers": 0}
    row["all_values"] = sum(p.numel() for p in model.parameters())
    if bits is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            saved = quantize.save(path)
            fresh = OneCycle(network(args.data, args.depth)[0], args.lr)
            found = dfl.load_quantized(fresh, path)
            assert found.num_bytes == saved.num_bytes == path.stat().st_size
            trained = model.state_dict()
            assert all(torch.equal(trained[n], t) for n, t in fresh.model.state_dict().items())
            model = fresh.model
        row |= {
            "layers": len(saved.layers),
            "quantised_values": sum(layer.numel for layer in saved.layers),
            "bytes_quantised": saved.layers_bytes,
            "bytes_file": saved.num_bytes,
        }
    accuracy, loss = judge(model, data.test_dataloader())
    row |= {"accuracy": f"{accuracy:.2f}", "loss": f"{loss:.4f}", "threads": args.threads, "precision": args.precision}
    gpu = args.accelerator == "gpu"
    row["device"] = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    return row | {"torch": torch.__version__, "lightning": L.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("mnist", "cifar10"), default="mnist")
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 4, 2, 1], help="32: not quantised")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--depth", type=int, default=8, help="of the ResNet")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--lam", type=float, default=1e-4)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV to add rows to")
    args = parser.parse_args()
    for seed in args.seeds:
        for bits in args.bits:
            row = run(args, None if bits == 32 else bits, seed)
            print({k: row.get(k) for k in ("data", "bits", "seed", "accuracy", "bytes_file", "seconds")}, flush=True)
            if args.out:
                new = not args.out.exists()
                with args.out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, restval="")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
