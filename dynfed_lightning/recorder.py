"""Callbacks for the outer Trainer: what a run writes to its folder, and one line of progress."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch

from dynfed_lightning.federation import Federation
from dynfed_lightning.records import RoundRecord, planned_rounds


def _federation(module: L.LightningModule) -> Federation:
    if not isinstance(module, Federation):
        raise TypeError(f"Expected a Federation in the outer Trainer, but got {type(module).__name__}.")
    return module


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data`, or the file as it was."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def writable(folder: Path) -> None:
    """Check that files can be written to `folder`, and leave no trace of it: neither a file nor a folder.

    Raises:
        OSError: they cannot.
    """
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"Expected `out` to be a folder to write to, but {folder}: {reason}.") from error
    finally:
        for made in missing:
            try:
                made.rmdir()
            except OSError:  # not made, or another process uses it
                break


class _Table:
    """A CSV file that grows by rows, and by columns when a row brings new ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows: list[dict[str, str]] = []

    def resume(self, rounds: int) -> list[dict[str, str]]:
        """Keep the rows of the first `rounds` rounds of an earlier run; with 0 start anew. Returns those of later rounds."""
        self.columns, self.rows = [], []
        later: list[dict[str, str]] = []
        if rounds and self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or [])
                numbered = [r for r in reader if r.get("round", "").isdigit()]
                self.rows = [r for r in numbered if int(r["round"]) <= rounds]
                later = [r for r in numbered if int(r["round"]) > rounds]
        self._rewrite()
        return later

    def append(self, row: Mapping[str, Any]) -> None:
        cells = {k: _cell(v) for k, v in row.items()}
        self.rows.append(cells)
        new = [k for k in cells if k not in self.columns]
        if new:
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(cells)

    def _rewrite(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.part")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(round(value, 8)) if isinstance(value, float) else str(value)


class RunRecorder(L.Callback):
    """Writes ``rounds.csv``, ``clients.csv``, ``summary.json`` and ``model.safetensors`` to a run's folder.

    ``clients.csv`` has a row for each client of each round; ``own_accuracy.csv`` has one for every client that was judged in the
    last judged round, whether it took part or not: its accuracy on its own test distribution.

    A resumed run keeps the rows of the rounds it does not repeat. What an earlier run left is removed when training starts,
    not before: a run that fails to start leaves the folder as it is.

    Args:
        out: the folder; made when training starts, found unwritable before.
        info: more entries for ``summary.json`` (name, dataset, ...).
        config: the text of a ``config.yaml`` to write; ``None``: none.

    Attributes:
        started: whether training has started.
    """

    def __init__(self, out: str | Path, info: Mapping[str, Any] | None = None, config: str | None = None) -> None:
        self.out = Path(out)
        self.info = dict(info or {})
        self.config = config
        self.started = False
        self._rounds = _Table(self.out / "rounds.csv")
        self._clients = _Table(self.out / "clients.csv")
        self._validated = False
        self._start = time.perf_counter()
        self._seconds_before = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find an unwritable folder now, not after the first round."""
        _federation(pl_module)
        writable(self.out)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the tables where a resumed run left them; the rest of an earlier run goes."""
        self.out.mkdir(parents=True, exist_ok=True)
        # The summary first: a run that is cut short must not pass for the one that was here before.
        for name in ("summary.json", "model.safetensors", "config.yaml"):
            (self.out / name).unlink(missing_ok=True)
        for figure in (self.out / "plots").glob("*.png"):
            figure.unlink()
        if self.config is not None:
            write_atomically(self.out / "config.yaml", self.config.encode())
        self.started = True
        later = self._rounds.resume(trainer.current_epoch)
        # A resumed run may not judge the clients again: what is known of them stays, unless it is of rounds to be done anew.
        if not trainer.current_epoch or any(r.get("own_accuracy") for r in later):
            (self.out / "own_accuracy.csv").unlink(missing_ok=True)
        self._clients.resume(trainer.current_epoch)
        self._seconds_before = sum(float(r.get("seconds") or 0) for r in self._rounds.rows)
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without this round's validation its metrics are an earlier round's."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One row for the round, one per client."""
        record = _federation(pl_module).last_round
        if record is None or record.round != trainer.current_epoch + 1:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()} if self._validated else {}
        # A pooled client is none of those that were judged.
        own = _federation(pl_module).own_accuracy if self._validated else {}
        pooled = _federation(pl_module).algorithm.pooled
        self._validated = False
        self._rounds.append(_round_row(record, metrics))
        for client in record.clients:
            row = {
                "round": record.round,
                "client": client.client,
                "status": client.status,
                "bits": client.bits,
                "rank": client.rank,
                "energy": client.energy,
                "bytes_up": client.bytes_up,
                "bytes_down": client.bytes_down,
                "num_examples": client.num_examples,
                "loss": client.loss,
                "grad_norm": client.grad_norm,
                "teacher_share": client.metrics.get("teacher_share"),
                "own_accuracy": None if pooled else own.get(client.client),
            }
            self._clients.append({**row, **{k: v for k, v in client.metrics.items() if k not in row}})
        if own:
            lines = ["client,own_accuracy", *(f"{k},{_cell(own[k])}" for k in sorted(own))]
            write_atomically(self.out / "own_accuracy.csv", ("\n".join(lines) + "\n").encode())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The summary and the final model."""
        federation = _federation(pl_module)
        state = federation.module.state_dict()  # may hold more than tensors: a module's extra state
        weights = {n: t.detach().cpu().contiguous() for n, t in state.items() if isinstance(t, torch.Tensor)}
        write_atomically(self.out / "model.safetensors", safetensors.torch.save(_unshared(weights)))
        accuracies, own, worst = (
            [float(r[name]) for r in self._rounds.rows if r.get(name)]
            for name in ("accuracy", "own_accuracy", "own_accuracy_worst10")
        )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        summary = {
            "method": federation.algorithm.name,
            "rounds": trainer.current_epoch,
            "accuracy": accuracies[-1] if accuracies else None,
            "best_accuracy": max(accuracies, default=None),
            "own_accuracy": own[-1] if own else None,
            "best_own_accuracy": max(own, default=None),
            "own_accuracy_worst10": worst[-1] if worst else None,
            "bytes_up": federation.total_bytes_up,
            "bytes_down": federation.total_bytes_down,
            "seconds": round(self._seconds_before + time.perf_counter() - self._start, 3),
            "seed": federation.seed,
            "num_clients": data.num_clients,
            "num_parameters": sum(p.numel() for p in federation.module.parameters()),
            "model": _model_name(federation.module),
            "dataset": data.dataset if isinstance(data.dataset, str) else type(data.dataset).__name__,
            "split": data.split_hash,
            "device": str(pl_module.device),
            "torch": torch.__version__,
            **self.info,
        }
        write_atomically(self.out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def _model_name(module: L.LightningModule) -> str:
    inner = getattr(module, "model", None)
    return type(inner if isinstance(inner, torch.nn.Module) else module).__name__


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors that share memory (tied weights), which safetensors refuses to write."""
    seen: set[int] = set()
    out = {}
    for name, t in tensors.items():
        out[name] = t.clone() if t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    return out


def _round_row(record: RoundRecord, metrics: Mapping[str, float]) -> dict[str, Any]:
    bits = record.bits
    row: dict[str, Any] = {
        "round": record.round,
        "accuracy": metrics.get("accuracy"),
        "loss": metrics.get("test_loss"),
        "train_loss": record.train_loss,
        "clients": len(record.clients) - sum(record.failures.values()),
        "failed": sum(record.failures.values()),
        "failures": ";".join(f"{k}:{n}" for k, n in sorted(record.failures.items())),
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "total_bytes_up": record.total_bytes_up,
        "total_bytes_down": record.total_bytes_down,
        "bits_mean": sum(bits) / len(bits) if bits else None,
        "bits_min": min(bits, default=None),
        "bits_max": max(bits, default=None),
        "rank": record.rank,
        "rank_down": record.rank_down,
        "energy": record.energy,
        "seconds": record.seconds,
        **record.metrics,
    }
    known = {"test_loss", "train_loss", "mb_up", "mb_down", "bits", "clients", "failed"}
    own = {k: v for k, v in metrics.items() if k not in row and k not in known and not k.startswith("failed/")}
    return {**row, **own}


SILENCE = 10.0  # seconds after which the next round is told, whichever it is


class RoundProgress(L.Callback):
    """One progress bar for the whole run where there is a terminal, else a line after the first round, every tenth of the
    run, and every ten seconds.

    Args:
        name: what the run is called.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._bar: Any = None
        self._task: Any = None
        self._told: float | None = None  # when the last line was printed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._told = None
        if self.name is None:
            self.name = _federation(pl_module).algorithm.name
        if not sys.stderr.isatty():
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        ]
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task(
            self.name, total=planned_rounds(trainer), completed=trainer.current_epoch, status=""
        )
        self._bar.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move it."""
        done, total, now = trainer.current_epoch + 1, planned_rounds(trainer) or 0, time.perf_counter()
        status = self._status(trainer)
        late = self._told is None or now - self._told >= SILENCE
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif late or 0 < total < 10 or done == total or done % max(1, total // 10) == 0:
            print(f"{self.name}: round {done}/{total if total > 0 else '?'}  {status}", file=sys.stderr, flush=True)
            self._told = now

    @staticmethod
    def _status(trainer: L.Trainer) -> str:
        metrics = trainer.callback_metrics
        shown = next((name for name in ("accuracy", "own_accuracy") if name in metrics), None)
        parts = [f"{shown.replace('_', ' ')} {float(metrics[shown]):.4f}"] if shown else []
        parts.append(f"up {float(metrics['mb_up']):.2f} MB, down {float(metrics['mb_down']):.2f} MB")
        if "bits" in metrics:
            parts.append(f"{float(metrics['bits']):.2f} bits")
        if "rank" in metrics:
            parts.append(f"rank {float(metrics['rank']):.1f}")
        if float(metrics.get("failed", 0)):
            parts.append(f"{int(metrics['failed'])} failed")
        return ", ".join(parts)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        self._close()
