"""The ``dynfed`` command: ``fit``, ``compare``, ``inspect``, ``report``.

Errors are one line on stderr and exit code 2 (``--debug`` shows the traceback); a comparison of which a run failed ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynfed_lightning import __version__

# Nothing heavy is imported here: `dynfed --help` and a typo must not wait for torch.

FIT_HELP = """\
A configuration has the sections seed, name, out, trainer (lightning.Trainer's arguments), module (what clients train),
algorithm (the method), local (how a client trains), federation and data. Options after the files set single keys:

  dynfed fit --config run.yaml --trainer.max_epochs 50 --algorithm.bits 4 --data.partitioner.alpha 0.1
  dynfed fit --config base.yaml --config mine.yaml --algorithm FedAvg --out runs/mine

Text needs a tokenizer (a folder, a vocab.txt, a name of Hugging Face's, or words:8000 for the training set's own words) and
an encoder: text_encoder (ours, new), load_text_encoder (ours, with BERT's weights from a folder) or hf (any of Hugging Face's):

  data: {dataset: sst2, tokenizer: ./minilm, partitioner: {class_path: IID, init_args: {num_clients: 4}}}
  module:
    class_path: ClientModule
    init_args: {model: {class_path: load_text_encoder, init_args: {folder: ./minilm, layers: 3}}}
"""
COMPARE_HELP = """\
Runs every configuration with every seed into OUT/<name>/seed<k>, then writes OUT/compare.{md,json,png}. The data, the
module, the clients' training and the number of rounds must be the same in all of them. Options such as
--trainer.max_epochs 5 apply to all.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 a compared run failed, 2 an error, 130 interrupted)."""
    options, rest = _arguments().parse_known_args(argv)
    importable([*(getattr(options, "config", None) or ()), *getattr(options, "configs", ())])
    debug = options.debug or os.environ.get("DYNFED_DEBUG") == "1"
    try:
        if rest and options.command not in ("fit", "compare"):
            raise ValueError(f"Unknown option `{rest[0]}`; see `dynfed {options.command} --help`.")
        return int(options.run(options, rest))
    except KeyboardInterrupt:
        print("dynfed: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"dynfed: error: {one_line(error)}", file=sys.stderr)
        return 2


def importable(files: Sequence[str]) -> None:
    """Let classes be named that lie in the current folder (as with ``python -m``) or beside a configuration.

    Processes that are started from this one (``compare --jobs``) find them too.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    for folder in dict.fromkeys(str(Path(f).resolve().parent) for f in files):
        if folder not in sys.path:
            sys.path.append(folder)


def one_line(error: BaseException) -> str:
    """What went wrong in one line; the type is named where the message alone would puzzle."""
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | ImportError | OSError | TypeError)
    if isinstance(error, KeyError) or not text or not plain:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 600 else f"{text[:597]}..."


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynfed", description="Communication-efficient federated learning.")
    parser.add_argument("--version", action="version", version=f"dynfed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    def add(name: str, run: Any, text: str, epilog: str = "", **more: Any) -> argparse.ArgumentParser:
        # No abbreviations: `--s` would swallow a key of the configuration.
        sub = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=raw, allow_abbrev=False
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    fit = add("fit", _fit, "train one configuration", FIT_HELP)
    fit.add_argument(
        "--config", "-c", action="append", required=True, metavar="YAML", help="repeat to put files on top"
    )
    fit.add_argument("--ckpt", metavar="FILE", help="resume from this checkpoint of Lightning's")
    fit.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")

    compare = add("compare", _compare, "train several configurations on the same data and compare them", COMPARE_HELP)
    compare.add_argument("configs", nargs="+", metavar="YAML")
    compare.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the first file's seed")
    compare.add_argument("--out", default="runs/compare", help="default: runs/compare")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its own process (default 1)")
    compare.add_argument("--resume", action="store_true", help="keep finished runs whose configuration is unchanged")
    compare.add_argument(
        "--allow-different", action="store_true", help="compare although data, module, local steps or rounds differ"
    )
    compare.add_argument(
        "--baseline", help="the name whose uplink is 1 and whose accuracy is the target (default: FedAvg)"
    )
    compare.add_argument("--target", type=float, help="accuracy to reach, 0..1 (default: the baseline's final)")
    compare.add_argument("--last", type=int, default=5, help="rounds that make the final accuracy (default 5)")
    compare.add_argument(
        "--metric",
        default="accuracy",
        help="what decides: accuracy, own_accuracy, own_accuracy_worst10, global_accuracy",
    )
    compare.add_argument("--title", default="", help="of the figure")

    inspect = add("inspect", _inspect, "show what is inside a payload, or inside a model.safetensors")
    inspect.add_argument("file", type=Path)

    report = add("report", _report, "summarise a run's folder and draw its plots again")
    report.add_argument("run_dir", type=Path)
    return parser


# ------------------------------------------------------------------------- fit


def _fit(options: argparse.Namespace, rest: list[str]) -> int:
    from dynfed_lightning import config as configs

    config = configs.load(options.config, rest)
    if options.print_config:
        print(configs.dump(finish(config)), end="")
        return 0
    out, plots = train(config, ckpt=options.ckpt)
    if plots is None:  # nothing to do, and said so
        return 0
    from dynfed_lightning.report import Run, summarise

    print(summarise(Run.read(out)))
    for path in plots:
        print(path)
    return 0


def finish(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with a name, a folder, and the defaults that make a Trainer fit a federation (quiet; no logger)."""
    algorithm = str(config["algorithm"]["class_path"]).rpartition(".")[2]
    name = str(config.get("name") or algorithm)
    seed = config.get("seed", 0)
    trainer = {
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **config.get("trainer", {}),
    }
    callbacks = trainer.get("callbacks") or []  # a name, a class_path with its init_args, or a list of those
    named = [c.get("class_path", "") if isinstance(c, dict) else c for c in _listed(callbacks)]
    if not any("Checkpoint" in str(name) for name in named):
        trainer.setdefault("enable_checkpointing", False)
    dataset = config["data"].get("dataset")
    out = str(config.get("out") or f"runs/{slug(f'{dataset} {name}' if isinstance(dataset, str) else name)}")
    trainer.setdefault("default_root_dir", out)
    data = {"seed": seed, **config["data"]}
    return {**config, "seed": seed, "name": name, "out": out, "trainer": trainer, "data": data}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def slug(name: str) -> str:
    """`name` as a folder's name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower() or "run"


def fit(config: dict[str, Any], ckpt: str | None = None) -> Path:
    """Train one configuration.

    Args:
        config: as `dynfed_lightning.config.load` returns it.
        ckpt: a checkpoint of Lightning's to resume from.

    Returns:
        the run's folder, with config.yaml, rounds.csv, clients.csv, summary.json, model.safetensors and plots/.

    Raises:
        ConfigError, ValueError, TypeError, OSError: found before any training: a wrong value, an unwritable folder. What
            lay in the folder is then as it was.
    """
    return train(config, ckpt)[0]


def train(config: dict[str, Any], ckpt: str | None = None) -> tuple[Path, list[Path] | None]:
    """`fit`; also returns the plots drawn, or None where the checkpoint left no round to run (then nothing is touched)."""
    from dynfed_lightning import config as configs
    from dynfed_lightning.quiet import isolated_rng, quiet_lightning
    from dynfed_lightning.recorder import RoundProgress, RunRecorder, writable
    from dynfed_lightning.resume import check_checkpoint

    config = finish(config)
    out = Path(config["out"])
    writable(out)
    parsed = configs.parse(config)
    text = configs.dump_namespace(*parsed, config)
    recorder = RunRecorder(out, info={"name": config["name"], "seed": config["seed"]}, config=text)
    # The initial weights depend on the seed alone, whatever else has drawn from the generators of this process.
    with quiet_lightning(), isolated_rng(config["seed"]):
        # True of any other data set: this one's only batch is a cohort, and it has no workers.
        warnings.filterwarnings("ignore", message=r".*`IterableDataset` has `__len__` defined.*")
        trainer, federation, data = build(parsed, recorder, RoundProgress(config["name"]))
        if ckpt is not None:
            rounds = check_checkpoint(ckpt, federation)
            if 0 < (trainer.max_epochs or 0) <= rounds:
                return nothing_left(out, f"{ckpt} has {rounds} of {trainer.max_epochs} behind it")
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(federation, datamodule=data, ckpt_path=ckpt)
        except SystemExit as stop:  # Lightning's way to end after Ctrl-C, which it ignores from then on
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from stop
    if not recorder.started:
        return nothing_left(out, f"after {ckpt}" if ckpt else "with these arguments of the trainer")
    return out, draw(out)


def nothing_left(out: Path, why: str) -> tuple[Path, None]:
    """Say that nothing was trained."""
    print(f"dynfed: no round left to run, {why}; {out} is as it was", file=sys.stderr)
    return out, None


def build(parsed: tuple[Any, Any], *callbacks: Any) -> tuple[Any, Any, Any]:
    """The trainer, the federation and the data of a parsed configuration; nothing is read or written.

    Raises:
        ConfigError, ValueError, TypeError: what a constructor refuses.
    """
    import lightning as L

    from dynfed_lightning import config as configs
    from dynfed_lightning.data import FederatedDataModule
    from dynfed_lightning.federation import Federation

    made = configs.instantiate(*parsed)
    federation = Federation(made.module, made.algorithm, local=made.local, seed=made.seed, **vars(made.federation))
    data = FederatedDataModule(**vars(made.data))
    federation.algorithm.check_public(data.public is not None)
    arguments = dict(vars(made.trainer))
    own = arguments.pop("callbacks", None) or []
    own = list(own) if isinstance(own, list | tuple) else [own]
    return L.Trainer(**arguments, callbacks=[*own, *callbacks]), federation, data


def draw(out: Path) -> list[Path]:
    """The run's plots; without matplotlib one line says what is missing, since the run itself is complete."""
    from dynfed_lightning.plots import write_plots
    from dynfed_lightning.report import Run

    try:
        return write_plots(Run.read(out))
    except ImportError as error:
        print(f"dynfed: no plots: {error}", file=sys.stderr)
        return []


# --------------------------------------------------------------------- compare


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from dynfed_lightning import compare

    if options.jobs < 1:
        raise ValueError(f"Expected `--jobs` to be at least 1, but got {options.jobs}.")
    if options.last < 1:
        raise ValueError(f"Expected `--last` to be at least 1, but got {options.last}.")
    plan = compare.plan(
        options.configs,
        options.out,
        options.seeds,
        rest,
        allow_different=options.allow_different,
        baseline=options.baseline,
        target=options.target,
    )
    failed = compare.run_all(plan, jobs=options.jobs, resume=options.resume)
    done = [item.out for item in plan if item.out not in failed]
    if done:
        show = {"baseline": options.baseline, "target": options.target, "last": options.last}
        show |= {"title": options.title, "metric": options.metric}
        compare.write(done, Path(options.out), **show)
    for folder, reason in failed.items():
        print(f"dynfed: failed: {folder}: {reason}", file=sys.stderr)
    return 1 if failed else 0


# ------------------------------------------------------------ inspect and report


def _inspect(options: argparse.Namespace, rest: list[str]) -> int:
    print(describe(options.file))
    return 0


def describe(path: Path) -> str:
    """A payload as `codec.inspect` shows it, a packed model by layer; any other safetensors file as names, shapes and sizes.

    Raises:
        FileNotFoundError: no such file.
        PayloadError: neither a payload nor a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected `file` to be a file, but there is no {path}.")
    from dynfed_lightning.codec import inspect
    from dynfed_lightning.errors import PayloadError
    from dynfed_lightning.quantized_file import describe_quantized

    data = path.read_bytes()
    if b'"quantized"' in data[:256]:
        return str(describe_quantized(path))
    try:
        return str(inspect(data))
    except PayloadError as error:
        try:
            return describe_tensors(data)
        except (ValueError, KeyError, TypeError):
            raise PayloadError(f"{path} is neither a payload ({one_line(error)}) nor a safetensors file.") from error


def describe_tensors(data: bytes) -> str:
    """Names, types, shapes and sizes of a safetensors file, read from its header alone.

    Raises:
        ValueError: not a safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= len(data) - 8:
        raise ValueError("Expected a safetensors file, but its header's length does not fit.")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("Expected a safetensors file, but its header is not an object.")
    notes = header.pop("__metadata__", {})
    rows = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        rows.append((name, str(entry["dtype"]), shape, f"{end - start:,}"))
    total = sum(int(r[3].replace(",", "")) for r in rows)
    rows.append((f"{len(header)} tensors", "", "", f"{total:,}"))
    rows = [("name", "dtype", "shape", "bytes"), *rows]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines = [f"{n:<{widths[0]}}  {d:<{widths[1]}}  {s:<{widths[2]}}  {b:>{widths[3]}}".rstrip() for n, d, s, b in rows]
    return "\n".join(lines + [f"{k}: {v}" for k, v in sorted(notes.items())])


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from dynfed_lightning.report import Run, summarise

    print(summarise(Run.read(options.run_dir)))
    for path in draw(options.run_dir):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
