"""Train any module so that its weights end up as a few learned values per layer, under any ``L.Trainer``.

::

    quantize = QuantizationAware(bits=2)
    trainer = L.Trainer(max_epochs=10, callbacks=[quantize])
    trainer.fit(module, loader)                             # every quantised layer of `module` holds 4 values now
    print(quantize.report())
    quantize.save("model.safetensors")                      # `load_quantized` reads it back
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from dynfed_lightning._quantization_checks import check_setup, training_length
from dynfed_lightning.callbacks import ExtraLoss
from dynfed_lightning.centers import Bits, LearnedCenters, Start
from dynfed_lightning.co_training import RandomStream, StepAgain, Swap, mean_over_ranks, start_equal, world_size
from dynfed_lightning.quantized_file import LayerTable, QuantizedFile, QuantizedLayer, save_quantized
from dynfed_lightning.quantized_layers import check_stepped
from dynfed_lightning.schedules import Schedule
from dynfed_lightning.seeds import derive_seed


class QuantizationAware(ExtraLoss):
    """Quantise a module while it trains, to centres that are learned (Ozkara et al., NeurIPS 2021, algorithm 1).

    What is minimised is ``F(x, c) = f(x) + f(Q~_c(x)) + lam R(x, c)`` (eq. 4): f the module's own ``training_step``, x its
    weights, c the centres of each layer. Each step of the module's own optimiser is on the gradient of both f's; then follow
    the proximal step of the weights, at the optimiser's learning rate of their group, and that of the centres, after a pass of
    its own over the same batch (with gradient accumulation, over all batches of the step). In the last phase weights are their
    centres, who belongs to which is frozen, and the centres and all tensors that are not quantised are trained on. **After
    the fit the module's weights are their centres**, also where it ended early (without the last phase then).

    The module is not modified. It runs with automatic optimisation, any optimiser but LBFGS, any scheduler, precision,
    gradient accumulation and clipping, on one device or under DDP (the centres' gradients are averaged), and in
    ``local="loop"``. What a user sees of the additional passes:

    * Logged values and torchmetrics are those of the pass with the float weights; the loss that the Trainer reports is the sum.
    * Random numbers are those that the module has without the callback; the other passes have a stream of their own.
    * Buffers (running statistics) are those of the quantised weights. The pass with the float weights has a copy, which
      ``validate="float"`` puts in place.
    * ``gradient_clip_val`` covers what the optimiser steps: not the centres.
    * A ``training_step`` with other side effects has them in every pass. Activation checkpointing inside it would compute with
      the wrong weights and is refused where it can be seen.

    Validation inside of fit, and ``validate``, ``test`` and ``predict`` of a checkpoint, run with quantised weights. A
    checkpoint's ``state_dict`` holds the weights as they are trained, not their centres; those are in this callback's part of
    it, which a ``ModelCheckpoint(save_weights_only=True)`` leaves out. So an evaluation leaves the module with the float
    weights of the checkpoint, and the best one becomes a file by::

        trainer.test(module, ckpt_path="best")
        quantize.quantize(module)
        quantize.save("model.safetensors")

    A second fit with the same callback starts from first centres again. Logged every epoch:
    ``quantization/loss`` (the mean f(Q~_c(x)) over its batches), ``quantization/distance`` (mean |x - Q_c(x)| at its end),
    ``quantization/sharpness`` and ``quantization/lam``. With ``bits=None`` (or a function that chooses no layer) both f's would
    be the same: the second is dropped, and training is the module's own, to the bit.

    Schedules are over epochs; where the Trainer counts by ``max_steps``, over steps.

    Args:
        bits: 1 to 8 for all layers; a mapping from patterns of parameter names (`fnmatch`, the first that matches counts) to
            bits or None; a function of name and parameter. Only parameters of two or more dimensions are quantised, not those of
            normalisation layers, nor embeddings with ``padding_idx``, ``sparse`` or ``max_norm``; an optimiser must step each.
        ends: quantise the first and the last layer too (in the order of registration).
        sharpness: P, positive; None: from 10 to 100, linearly.
        relative_sharpness: divide P by the mean distance of a layer's neighbouring centres.
        lam: the pull towards the centres: a number is multiplied by ``epoch + 1``, a schedule taken as it is. The authors':
            1e-4 (ResNet-20), 1e-5 (ResNet-8), 1e-6 (a small CNN).
        center_lr: learning rate of the centres, >= 0; None: from 1e-4 to 1e-6, geometrically.
        clamp: weights of quantised layers are kept in [-clamp, clamp]; None: not.
        finetune: the share of the epochs, at the end, in which assignments are frozen: rounded down, at least one of several.
        centers: the first centres, within `clamp`, by pattern of names, or by a function of name, weights and bits; None:
            evenly from a layer's least to its largest weight, for one bit the means of its negative and positive weights.
        alternate: take the centres' gradient at the new weights (the paper), by a pass of its own; False: at the old, from the
            same pass, for two thirds of the time.
        validate: weights inside of fit's validation: ``"quantized"`` or ``"float"``.
        seed: of the additional passes' random numbers.

    Raises:
        ValueError: an argument out of range; when training starts, before any step: a module, trainer or checkpoint that it
            cannot honour, by name.
    """

    def __init__(
        self,
        bits: Bits = 2,
        *,
        ends: bool = False,
        sharpness: float | Schedule | None = None,
        relative_sharpness: bool = False,
        lam: float | Schedule = 1e-4,
        center_lr: float | Schedule | None = None,
        clamp: float | None = 1.0,
        finetune: float = 0.2,
        centers: Start = None,
        alternate: bool = True,
        validate: str = "quantized",
        seed: int = 0,
    ) -> None:
        if validate not in ("quantized", "float"):
            raise ValueError(f"Expected `validate` to be 'quantized' or 'float', but got {validate!r}.")
        self.engine = LearnedCenters(
            bits,
            ends=ends,
            sharpness=sharpness,
            relative_sharpness=relative_sharpness,
            lam=lam,
            center_lr=center_lr,
            clamp=clamp,
            finetune=finetune,
            start=centers,
        )
        self.alternate, self.validate, self.seed = alternate, validate, seed
        self.steps = 0
        self._loaded: Mapping[str, Any] = {}
        self._module: L.LightningModule | None = None
        self._again: StepAgain | None = None
        self._float_buffers: dict[str, Tensor] = {}  # of the pass with the float weights
        self._swap = Swap()  # of weights and buffers during evaluation
        self._evaluated = False  # whether evaluation has taken up what was loaded
        self._random: dict[str, Tensor] = {}  # where the stream of the last fit ended
        self._handles: list[Any] = []
        self._by_steps, self._end = False, 1
        self._clock: tuple[int, int] | None = None
        self._window: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # the batches of this optimiser step
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._tried = False  # whether the optimiser has stepped, or its scaler skipped the step, after the window
        self._rates: dict[int, float] = {}
        self._sums: list[Tensor] = []
        self._loss: Tensor | None = None
        self._losses = 0
        self._trainer: Any = None

    @property
    def centers(self) -> dict[str, Tensor]:
        """Centres by layer: float32 ``[m]``."""
        return {n: c.detach() for n, c in zip(self.engine.names, self.engine.centers, strict=True)}

    @property
    def frozen(self) -> bool:
        """Whether the quantised weights are their centres."""
        return self.engine.frozen

    # ------------------------------------------------------------ start and end

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the layers, start or take up their centres, and wrap the module's ``training_step``.

        Raises:
            ValueError: see the class.
        """
        loaded: Mapping[str, Any] = {} if self._evaluated else self._loaded
        self._loaded, self._evaluated, self._random = {}, False, {}
        self._attach(pl_module, loaded)
        self._trainer, self.steps = trainer, int(loaded.get("steps", 0))
        if not self.engine.names:
            return
        check_setup(trainer, pl_module, type(self).__name__)
        check_stepped(self.engine.names, self.engine.parameters, trainer.optimizers)
        self._by_steps, self._end = training_length(trainer)
        self._clock, self._window, self._tried = None, {}, False
        self._loss, self._losses = None, 0
        if world_size(trainer) > 1:
            start_equal(self.engine.centers)
        names = dict(pl_module.named_buffers())
        saved = loaded.get("buffers") or names
        self._float_buffers = {n: saved[n].detach().to(b.device, copy=True) for n, b in names.items()}
        device = self.engine.parameters[0].device
        key = [self.seed, torch.initial_seed(), int(getattr(trainer, "global_rank", 0))]
        saved_random = loaded.get("random")
        if saved_random and world_size(trainer) > 1:  # rank 0's: every rank goes on with a new stream of its own
            key, saved_random = [*key, self.steps], None
        stream = RandomStream(derive_seed(*key), device, saved_random)
        self._again = StepAgain(pl_module, pl_module.training_step, stream)
        self._update()
        if loaded and tuple(loaded["clock"] or ()) == self._clock:
            self.engine.sharpness = loaded["sharpness"]  # as the centres were when the epoch began
        super().on_train_start(trainer, pl_module)

    def _attach(self, module: L.LightningModule, loaded: Mapping[str, Any]) -> None:
        self.engine.attach(module, loaded.get("engine"))
        self._module = module
        if loaded and dict(loaded["bits"]) != self.engine.layer_bits:
            raise ValueError(
                f"Expected a checkpoint with bits {self.engine.layer_bits}, but it has {dict(loaded['bits'])}."
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The weights become their centres, if they are not yet."""
        if self.engine.names and not self.frozen:
            if self.engine.last_epochs(self._end):
                rank_zero_info(
                    "QuantizationAware: training ended before its last phase; the weights are quantised as they are."
                )
            self.engine.harden()
        super().on_train_end(trainer, pl_module)

    def _unwrap(self) -> None:
        super()._unwrap()
        if self._again is not None:
            self._random = dict(self._again.random.state)
        self._swap.put_back()
        for handle in self._handles:
            handle.remove()
        self._handles, self._window, self._sums = [], {}, []
        self._again = self._trainer = None
        for c in self.engine.centers:
            c.grad = None

    # -------------------------------------------------------------- every step

    def _update(self) -> None:
        """Set the schedules where the epoch (or the step) is another."""
        now = (self._trainer.current_epoch, self._trainer.global_step if self._by_steps else 0)
        if now != self._clock:
            self._clock = now
            self.engine.at(now[1] if self._by_steps else now[0], self._end, passes=now[0])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Schedules; and hooks of the optimisers, after those of all other callbacks."""
        if self._again is None:
            return
        self._update()
        if not self._handles:
            for optimizer in trainer.optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._read_rates))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def own_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """f(x), with buffers of its own."""
        if self._tried:
            self._tried, self._window = False, {}
            for c in self.engine.centers:
                c.grad = None
        self._call = (args, kwargs)
        if self.frozen or not self._float_buffers:
            return step(*args, **kwargs)
        assert self._again is not None
        output, self._float_buffers = self._again.run(args, kwargs, self._float_buffers)
        return output

    def extra(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch: Any, batch_idx: int
    ) -> Tensor:
        """f(x) + f(Q~_c(x)); once the weights are their centres, f(x)."""
        assert self._again is not None
        self._window[batch_idx] = self._call if self.alternate and not self.frozen else ((), {})
        if self.frozen:
            self._note(loss)
            return loss
        learn = not self.alternate and self.engine.center_lr > 0
        second = self._again.silently(*self._call, self.engine.soft(centers=learn))
        if second is None:
            return loss
        self._note(second)
        return loss + second

    def _note(self, loss: Tensor) -> None:
        """The loss of the quantised weights; summed on the device."""
        value = loss.detach().float()
        self._loss = value if self._loss is None else self._loss + value
        self._losses += 1

    def _read_rates(self, optimizer: Optimizer, *_: Any) -> None:
        """The learning rate of every parameter, as schedulers and other callbacks have set it for this step."""
        self._rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """In the last phase, take the gradients of the quantised weights: neither momentum nor decay may move them."""
        if self._again is None:
            return
        self._tried = True
        self._read_rates(optimizer)  # without a gradient scaler this comes after the hook, with one before it
        if self.frozen:
            self._sums = self.engine.frozen_gradients()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """The proximal steps. A step that a gradient scaler skips does not get here, but for fused optimisers."""
        skipped = getattr(optimizer, "found_inf", None)
        if not self._window or (skipped is not None and bool(skipped)):
            return
        self.steps += 1
        engine = self.engine
        if self.frozen:
            engine.after_frozen(self._sums)
            return
        engine.after_weights([float(self._rates.get(id(p), 0.0)) for p in engine.parameters])
        if engine.center_lr:
            h = self._center_gradients()
            if h is not None:
                engine.after_centers(h)

    def _center_gradients(self) -> list[Tensor] | None:
        """grad_c f(Q~_c(x)), the mean over accumulated batches and ranks; None if not finite under a gradient scaler."""
        trainer, engine, again = self._trainer, self.engine, self._again
        assert again is not None and self._module is not None
        plugin = getattr(trainer, "precision_plugin", None)
        scaler = getattr(plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        total = [torch.zeros_like(c) for c in engine.centers]
        if self.alternate:
            # The running statistics move once a batch; this pass is not the one.
            buffers = {n: b.clone() for n, b in self._module.named_buffers()}
            with torch.enable_grad(), nullcontext() if plugin is None else plugin.train_step_context():
                for args, kwargs in self._window.values():
                    loss = again.silently(args, kwargs, {**buffers, **engine.soft(weights=False, centers=True)})
                    if loss is None:
                        continue
                    grads = torch.autograd.grad(loss * scale, engine.centers, allow_unused=True)
                    total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
            # As the Trainer does with the loss that it differentiates itself.
            scale *= trainer.accumulate_grad_batches
        else:
            total = [t if c.grad is None else c.grad for t, c in zip(total, engine.centers, strict=True)]
        total = [t / scale for t in total]
        if world_size(trainer) > 1:
            total = mean_over_ranks(total)
        if scaler is not None and not bool(torch.isfinite(torch.cat(total)).all()):
            return None
        return total

    # ------------------------------------------------------ evaluation and logs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log how far the weights are from their centres, the schedules, and the loss of the quantised weights."""
        if self._again is None:
            return
        sharp = self.engine.sharpness
        values: dict[str, Any] = {
            "distance": self.engine.distance(),
            "sharpness": sum(sharp) / len(sharp) if isinstance(sharp, list) else sharp,
            "lam": self.engine.lam,
        }
        if self._loss is not None:
            values["loss"] = self._loss / self._losses
        self._loss, self._losses = None, 0
        for name, value in values.items():
            pl_module.log(f"quantization/{name}", value, sync_dist=world_size(trainer) > 1)

    def _evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the weights in place that are to be evaluated."""
        if self._again is None and (not self._loaded or (self._evaluated and module is not self._module)):
            return  # before or after training: the weights as they are
        if self._again is None:  # of a checkpoint
            self._attach(module, self._loaded)
            if not trainer.sanity_checking:  # or training is about to take it up
                self._evaluated = True
        elif self.validate == "float":
            if not self.frozen:
                if world_size(trainer) > 1:
                    start_equal(self._float_buffers.values())
                for n, b in module.named_buffers():
                    self._swap.put(b, self._float_buffers[n])
            return
        if not self.frozen:
            hard = self.engine.hard()
            for n, p in zip(self.engine.names, self.engine.parameters, strict=True):
                self._swap.put(p, hard[n])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap.put_back()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    # --------------------------------------------------------------- what it made

    def quantize(self, module: L.LightningModule) -> None:
        """Quantise a module that was loaded from a checkpoint, with the checkpoint's centres: those that an evaluation with
        ``ckpt_path`` brought, or `load_state_dict`.

        Raises:
            ValueError: nothing was loaded, or it is of another architecture.
        """
        if not self._loaded:
            raise ValueError("Expected `load_state_dict`, or an evaluation with `ckpt_path`, before `quantize`.")
        self._attach(module, self._loaded)
        self._loaded, self._evaluated = {}, False
        self.engine.harden()

    def report(self) -> LayerTable:
        """The quantised layers as they are now: name, shape, bits, centres and bytes; ``print`` shows a table."""
        engine = self.engine
        return LayerTable(
            QuantizedLayer(n, tuple(p.shape), p.dtype, (len(c) - 1).bit_length(), c.detach().tolist())
            for n, p, c in zip(engine.names, engine.parameters, engine.centers, strict=True)
        )

    def save(self, path: str | os.PathLike[str]) -> QuantizedFile:
        """Write the module, once training has ended, as `save_quantized` does.

        Raises:
            ValueError: the weights are not their centres yet.
        """
        if self._module is None or (self.engine.names and not self.frozen):
            raise ValueError(
                "Expected `save` after training, or of a checkpoint after `quantize`: these set weights to centres."
            )
        return save_quantized(self._module, path, self.centers)

    # -------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint that another callback writes during validation holds the weights that are trained."""
        self._swap.restore(pl_module, checkpoint.get("state_dict", {}))

    def state_dict(self) -> dict[str, Any]:
        """Centres, assignments once frozen, the float pass's buffers, random stream, steps; ``weights_only`` reads it."""
        if self._module is None:
            return {}
        return {
            "engine": self.engine.state_dict(),
            "bits": dict(self.engine.layer_bits),
            "clock": None if self._clock is None else list(self._clock),
            "sharpness": self.engine.sharpness,
            "buffers": {n: b.detach() for n, b in self._float_buffers.items()},
            "random": dict(self._random if self._again is None else self._again.random.state),
            "steps": self.steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, when training or evaluation starts next. One of the last phase stays in it, also
        where training is then given more epochs."""
        self._loaded, self._evaluated = dict(state_dict), False


__all__ = ["QuantizationAware"]
