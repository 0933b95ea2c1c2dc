"""The federation: a LightningModule whose training step is one round, and whose gradient is the negative mean update.

A round is an epoch of one step; its batch is the cohort. The outer loop is the user's ordinary ``L.Trainer``, so checkpoints,
resume, early stopping, loggers and server optimisers are Lightning's own.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from dynfed_lightning.algorithm import Algorithm, Client, Server
from dynfed_lightning.algorithms.fedavg import FedAvg
from dynfed_lightning.client import ClientRuntime
from dynfed_lightning.codec import CodecContext
from dynfed_lightning.downlink import DownlinkSender, initial_tensors
from dynfed_lightning.evaluation import check_outputs, has_own_validation, run_user_hook
from dynfed_lightning.judging import Judge, check_way, sample_clients
from dynfed_lightning.local import LocalExecutor, as_executor
from dynfed_lightning.message import Message
from dynfed_lightning.outer import federated_data
from dynfed_lightning.records import ClientRecord, RoundRecord, mean_loss, mean_rank, planned_rounds, round_failure
from dynfed_lightning.replies import RoundStart, receive
from dynfed_lightning.seeds import derive_seed
from dynfed_lightning.store import MemoryStore, Store, check_store, make_store, track_checkpoints
from dynfed_lightning.tensors import travelling
from dynfed_lightning.transport import InProcessTransport, Transport


class Federation(L.LightningModule):
    """Federated training of any LightningModule.

    Args:
        module: the user's LightningModule, unmodified; clients train copies of it.
        algorithm: the method; default `FedAvg`.
        local: how a client trains: ``"trainer"``, ``"loop"`` (one epoch a round) or an executor.
        server_optimizer: makes the server's optimiser from the parameters, whose gradient is the negative mean update;
            default ``SGD(lr=1)``, i.e. plain averaging. ``Adam`` gives FedAdam.
        seed: everything random follows from it, the round and the client's id.
        min_clients: with fewer replies than this a round raises `RoundFailure`.
        initial: ``"sent"``: a client's first download holds the weights. ``"known"``: every client has the initial weights
            already, e.g. a published checkpoint, so that the first round sends none.
        num_classes: C; default: the data module's. 0 for a task that is no classification: then only what the module's own
            ``validation_step`` logs is reported.
        evaluate_on: ``"whole"``: models are judged on the whole test set; ``"own"``: the clients' own models of a personalised
            method only on their own test distributions, which saves judging rows of classes that a client does not have.
            There is no ``accuracy`` and no ``test_loss`` of such a method then: monitor ``own_accuracy``. ``"both"``. A global
            model is judged on the whole test set anyway.
        evaluate_clients: judge so many clients, always the same ones, drawn with the seed; None: all.
        store: where what clients remember lies between rounds. None: in memory while it is small, and past `store_limit` in
            files under ``client_state`` in the Trainer's ``default_root_dir``, which go with the run unless a checkpoint refers
            to them. ``"memory"``: never on disk. A folder: always on disk, there, and it stays. Or a `Store`; a fit that starts
            at round 1 empties it. See `DiskStore` for what checkpoints hold.
        store_limit: bytes of clients' tensors, as a number or as in ``"512MiB"``; 0: on disk from the first one on.

    Logs every round ``accuracy`` and ``test_loss`` of the global model on the whole test set (of the clients' own models
    for a personalised method, which may add ``global_accuracy`` and ``global_loss``), ``train_loss``, ``mb_up`` and ``mb_down``
    (10^6 bytes, cumulative), ``bits`` and ``rank`` of the uploads, the ``energy`` their factors were to keep, ``rank_down``,
    ``clients``, ``failed`` and ``failed/<reason>``, and whatever the user's own ``validation_step`` logs. On the clients' own
    test distributions (`OwnTest`: the test set with each class weighted by the client's share of training rows of it) it logs
    ``own_accuracy``, the mean over clients of the accuracy of the model a client uses (its own for a personalised method, else
    the global one), ``own_accuracy_worst10``, the mean of the worst tenth of the clients, and ``own_accuracy_std``.

    Attributes:
        last_round: what happened in the last round, and to each client in it.
        own_accuracy: client -> accuracy of the model it uses on its own test distribution, as last judged.

    Example::

        trainer = L.Trainer(max_epochs=100)  # 100 rounds
        trainer.fit(Federation(LitModel(), DynFed(bits=(2, 8))), datamodule=FederatedDataModule(dataset, partitioner, public=200))
    """

    def __init__(
        self,
        module: L.LightningModule,
        algorithm: Algorithm | None = None,
        *,
        local: str | LocalExecutor = "trainer",
        server_optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] | None = None,
        seed: int = 0,
        min_clients: int = 1,
        initial: str = "sent",
        num_classes: int | None = None,
        evaluate_on: str = "both",
        evaluate_clients: int | None = None,
        store: str | PathLike[str] | Store | None = None,
        store_limit: int | str = "1GiB",
    ) -> None:
        super().__init__()
        if not isinstance(module, L.LightningModule):
            raise TypeError(
                f"Expected `module` to be a LightningModule, but got {type(module).__name__}: "
                "wrap a plain network as `ClientModule(network)`."
            )
        if algorithm is not None and not isinstance(algorithm, Algorithm):
            raise TypeError(f"Expected `algorithm` to be an Algorithm, but got {type(algorithm).__name__}.")
        if not isinstance(min_clients, int) or min_clients < 1:
            raise ValueError(f"Expected `min_clients` to be a positive integer, but got {min_clients!r}.")
        if initial not in ("sent", "known"):
            raise ValueError(f"Expected `initial` to be 'sent' or 'known', but got {initial!r}.")
        if not travelling(module)[0]:
            raise ValueError("Expected `module` to have trainable parameters, but it has none.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"Expected `seed` to be an integer, but got {seed!r}.")
        check_way(evaluate_on, evaluate_clients)
        check_store(store, store_limit)
        self.automatic_optimization = False
        self.module = module
        # A copy that no Trainer is ever attached to: Lightning attaches itself to child LightningModules, and copying
        # those would copy the Trainer. In a list so that it is no submodule.
        self._template = [copy.deepcopy(module)]
        self.algorithm = algorithm if algorithm is not None else FedAvg()
        self.executor = as_executor(local)
        self.server_optimizer = server_optimizer
        self.seed = seed
        self.min_clients = min_clients
        self.initial = initial
        self.num_classes = num_classes
        self.evaluate_on, self.evaluate_clients = evaluate_on, evaluate_clients
        self._store_options = (store, store_limit)
        self.store: Store = MemoryStore()
        self.transport: Transport | None = None
        self.server: Server | None = None
        self.last_round: RoundRecord | None = None
        self.own_accuracy: dict[int, float] = {}
        self.total_bytes_up = 0
        self.total_bytes_down = 0
        self._loaded: dict[str, Any] | None = None
        self._halfway = False  # in a round, between the clients' memory and the server's step

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Wire server, clients and transport to the data module; every mismatch is found here, before training."""
        data = federated_data(self.trainer, self.algorithm.pooled, self.min_clients)
        num_rounds = planned_rounds(self.trainer)
        for codec in (self.algorithm.uplink, self.algorithm.downlink):
            codec.check_rounds(num_rounds)
        # A fit that starts at round 1 starts anew; a longer second fit, or a test in between, goes on with what there is.
        fresh = self.server is None or (stage == "fit" and self.trainer.current_epoch == 0)
        self._halfway = False
        if fresh:
            self.store = make_store(*self._store_options, self.trainer.default_root_dir)
            self.last_round, self.own_accuracy = None, {}
            self.total_bytes_up = self.total_bytes_down = 0
            self._sender = DownlinkSender(self.algorithm.downlink)
            self._reasons: set[str] = set()
        track_checkpoints(self.trainer.strategy, self.store)
        state = {} if fresh or self.server is None else self.server.state
        classes = data.num_classes if self.num_classes is None else self.num_classes
        check_outputs(self._template[0], data, classes)
        device = self.trainer.strategy.root_device
        self.executor.device = device
        self.executor.check(self._template[0])
        self.server = Server(
            self.module,
            new_module=lambda: copy.deepcopy(self._template[0]).to(device),
            num_clients=data.num_clients,
            num_examples=lambda k: data.client(k).num_examples,
            resources=data.resources,
            num_classes=classes,
            public=data.public_set,
            seed=self.seed,
            probe=lambda: next(iter(data.val_dataloader())),
        )
        self.server.state = state
        self.algorithm.setup(self.server, self.executor)
        self.runtime = ClientRuntime(
            self._template[0],
            self.algorithm,
            self.executor,
            data=data.client,
            resources=data.resources,
            store=self.store,
            seed=self.seed,
        )
        # Once with nothing in it, so that a codec that cannot work downwards is found before the second round.
        empty = {s.name: torch.zeros(s.shape, dtype=s.dtype) for s in self.runtime.downlink_schema}
        self.algorithm.downlink.encode(empty, CodecContext(num_rounds=num_rounds), self.runtime.downlink_schema)
        self.transport = InProcessTransport(self.runtime.run, self.runtime.settle)
        own = data.own_test()
        judged = sample_clients(own.num_clients, self.evaluate_clients, self.seed)
        self._judge = Judge(classes, own, judged, self.evaluate_on)
        self._split = data.split_hash
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._restore(loaded)

    def on_train_start(self) -> None:
        """Clients copy the template: give it what a checkpoint restored of the global module, frozen weights included."""
        self._template[0].load_state_dict(self.module.state_dict())
        if self.initial == "known" and self.current_epoch == 0:
            self._sender.agree(initial_tensors(self._template[0], self.runtime.downlink_schema))
        self.runtime.agree(self._sender.initial)  # of a resumed run: as it was before round 1

    def configure_optimizers(self) -> Optimizer:
        """The server's optimiser over the global parameters."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        make = self.server_optimizer or (lambda p: torch.optim.SGD(p, lr=1.0))
        optimizer = make(parameters)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Expected `server_optimizer` to make an Optimizer, but it made {type(optimizer).__name__}."
            )
        return optimizer

    # ------------------------------------------------------------------- round

    def training_step(self, batch: Sequence[int], batch_idx: int) -> None:
        """One round over the cohort `batch` (client ids)."""
        start = time.perf_counter()
        server, transport = self._ready()
        server.round, server.num_rounds = self.current_epoch, planned_rounds(self.trainer)
        server.cohort = [0] if self.algorithm.pooled else sorted(int(k) for k in batch)
        server.metrics, server.client_metrics = {}, {}
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()

        before = RoundStart(server, self._sender)
        try:
            requests = self._requests(server)
            outcomes = transport.exchange(requests)
            records, replies = receive(self.algorithm, self.runtime.uplink_schema, server, requests, outcomes)
            accepted = {r.client: r.status == "ok" for r in records}
            if len(replies) < self.min_clients:
                transport.settle(dict.fromkeys(accepted, False))
                raise round_failure(server.round, len(requests), self.min_clients, records, outcomes)
            for client, received in accepted.items():
                self._sender.confirm(client, received)
            self.algorithm.server_step(server, replies)
        except BaseException:
            self._sender = before.restore(server)
            raise
        # From here on clients may be a round ahead of the server: a checkpoint that an exception saves would be of no round.
        self._halfway = True
        try:
            transport.settle(accepted)
        except Exception:
            if hasattr(self.store, "write_all"):  # then they are not
                self._sender = before.restore(server)
                self._halfway = False
            raise
        optimizer.step()  # exactly one a round: Lightning counts it as the global step
        optimizer.zero_grad()
        self._record(server, records, time.perf_counter() - start)
        self._halfway = False

    def _requests(self, server: Server) -> list[tuple[int, bytes]]:
        broadcast = self.algorithm.broadcast(server)
        seed = derive_seed(self.seed, "downlink", server.round)
        server.received = self._sender.prepare(
            broadcast, self.runtime.downlink_schema, server.round, seed, server.num_rounds
        )
        requests = []
        for client_id in server.cohort:
            download = self._sender.download(client_id)
            message = Message(
                round=server.round,
                client_id=client_id,
                scalars=self.algorithm.instruct(server, client_id),
                num_rounds=server.num_rounds,
                kind=download.kind,
                base=download.base,
                parts=download.parts,
            )
            requests.append((client_id, message.to_bytes()))
        return requests

    def _record(self, server: Server, records: list[ClientRecord], seconds: float) -> None:
        up, down = sum(r.bytes_up for r in records), sum(r.bytes_down for r in records)
        self.total_bytes_up += up
        self.total_bytes_down += down
        failures = Counter(r.status for r in records if r.status != "ok")
        self._reasons |= failures.keys()  # a reason once seen is 0, not absent, in later rounds
        for r in records:
            r.metrics = server.client_metrics.get(r.client, {})
        train_loss = mean_loss(records)
        self.last_round = RoundRecord(
            round=server.round + 1,
            clients=records,
            seconds=seconds,
            train_loss=train_loss,
            bytes_up=up,
            bytes_down=down,
            total_bytes_up=self.total_bytes_up,
            total_bytes_down=self.total_bytes_down,
            failures=dict(failures),
            metrics=dict(server.metrics),
            rank_down=mean_rank(self._sender.ranks),
        )
        shown = {"mb_up", "mb_down", "bits", "rank"}
        for name, value in self.last_round.values(self._reasons).items():
            self.log(name, value, on_step=False, on_epoch=True, prog_bar=name in shown, batch_size=1)

    # -------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Take the models to be judged: the global one, or every client's own for a personalised method."""
        self._start_evaluation()
        if self._user_validates():
            run_user_hook(self, self.module, "on_validation_epoch_start")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count right answers; the user's own validation hooks run too, and what they log is logged here."""
        self._judge.update(batch)
        if self._user_validates():
            run_user_hook(self, self.module, "validation_step", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``accuracy`` and ``test_loss``."""
        if self._user_validates():
            run_user_hook(self, self.module, "on_validation_epoch_end")
        self._end_evaluation()

    def _user_validates(self) -> bool:
        return not self.algorithm.personalised and has_own_validation(self.module)

    def _start_evaluation(self) -> None:
        server, _ = self._ready()
        if not self.algorithm.personalised:
            self._judge.start_global(self.module)
            return
        # Evaluation runs in inference mode, whose tensors could not be trained.
        with torch.inference_mode(False):
            weights = server.weights()

        def make(k: int) -> L.LightningModule:
            with torch.inference_mode(False):
                state = self.store.read(k)
                model = self.algorithm.personal_model(state, server.new_module(), weights, client_id=k)
                if self.algorithm.adapts:
                    self.algorithm.adapt(self._client(server, k, state), model)
            return model.to(self.device)

        self._judge.start_own(make, also=self.module if self.algorithm.reports_global else None)

    def _client(self, server: Server, client_id: int, state: dict[str, Any]) -> Client:
        """A client as `Algorithm.adapt` sees it: it draws the same rows in every evaluation."""
        return Client(
            id=client_id,
            data=self.runtime.data(client_id),
            resources=self.runtime.resources(client_id),
            state=state,
            round=server.round,
            num_rounds=server.num_rounds,
            seed=derive_seed(self.seed, "adapt", client_id),
            executor=self.executor,
        )

    def _end_evaluation(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        strategy = self.trainer.strategy
        values = self._judge.finish(lambda: (strategy.batch_to_device(b, self.device) for b in data.test_dataloader()))
        self.own_accuracy = self._judge.own_accuracy
        for name, value in values.items():
            self.log(name, value, prog_bar=name == "accuracy")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As `validation_step`, without the user's."""
        self._judge.update(batch)

    on_test_epoch_start = _start_evaluation
    on_test_epoch_end = _end_evaluation

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The global model's forward."""
        return self.module(*args, **kwargs)

    # -------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything a resumed run needs to go on as if it had not stopped, readable with ``weights_only=True``."""
        server, _ = self._ready()
        checkpoint["federation"] = {
            **self._identity(),
            "server": server.state,
            "clients": self.store.state_dict(),
            "downlink": self._sender.state_dict(),
            "total_bytes_up": self.total_bytes_up,
            "total_bytes_down": self.total_bytes_down,
            "last_round": None if self.last_round is None else asdict(self.last_round),
        }
        if self._halfway:
            checkpoint["federation"]["halfway"] = server.round + 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` gave.

        Raises:
            ValueError: the checkpoint is no federation's, or another algorithm's or seed's, or of other initial teachers, or
                was saved on an exception in the midst of a round's end.
        """
        saved = checkpoint.get("federation")
        if saved is None:
            raise ValueError("Expected a checkpoint of a Federation, but it has no `federation` entry.")
        if self.server is None:
            self._loaded = saved  # `load_from_checkpoint`: there is no data yet; `setup` goes on
        else:
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        server, _ = self._ready()
        if "halfway" in saved:
            raise ValueError(
                f"Expected a checkpoint of whole rounds, but it was saved when round {saved['halfway']} failed half-way: its "
                "clients are ahead of its server. Resume from an earlier one."
            )
        mine = self._identity()
        for name, value in mine.items():
            theirs = saved.get(
                name, "sent" if name == "initial" else None
            )  # checkpoints once did not say how they began
            if theirs != value:
                raise ValueError(f"Expected a checkpoint with {name} {value!r}, but it was made with {theirs!r}.")
        server.state = saved["server"]
        self.store.load_state_dict(saved["clients"])
        self._sender.load_state_dict(saved["downlink"])
        self.total_bytes_up, self.total_bytes_down = saved["total_bytes_up"], saved["total_bytes_down"]
        if saved["last_round"] is not None:
            clients = [ClientRecord(**c) for c in saved["last_round"]["clients"]]
            self.last_round = RoundRecord(**{**saved["last_round"], "clients": clients})

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        schema = self.runtime.uplink_schema.hash
        own = {"algorithm": self.algorithm.name, "seed": self.seed, "initial": self.initial}
        return {**own, "split": self._split, "schema": schema, **self.algorithm.identity()}

    def _ready(self) -> tuple[Server, Transport]:
        if self.server is None or self.transport is None:
            raise RuntimeError("The federation is not set up: call `trainer.fit(federation, datamodule=...)`.")
        return self.server, self.transport
