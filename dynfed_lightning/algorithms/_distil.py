"""What every method that distils on the server does around its choice of teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynfed_lightning.algorithm import Reply, Server, total_examples
from dynfed_lightning.distill import Distillation
from dynfed_lightning.teachers import TeacherContext
from dynfed_lightning.tensors import added, difference, weighted_mean


def average_and_distil(
    server: Server,
    replies: Sequence[Reply],
    distillation: Distillation,
    ctx: TeacherContext,
    steps: Sequence[Mapping[str, Tensor]] | None = None,
) -> None:
    """The student starts at the sample-weighted mean, learns from the clients' models, and becomes the global model.

    Args:
        server: its public set must be there.
        replies: sorted by client id.
        distillation: teachers and training of the student.
        ctx: what is known of the replies besides their predictions, in the same order.
        steps: each reply's quantiser step per value, for the dithered passes; None: nothing was quantised.
    """
    assert server.public is not None
    before = server.weights()
    mean = weighted_mean([r.tensors for r in replies], total_examples(replies))
    result = distillation.run(
        server.new_module(),
        teachers=[server.client_weights(r) for r in replies],
        start=added(before, mean),
        public=server.public,
        ctx=ctx,
        steps=steps,
        seed=server.rng().initial_seed(),
    )
    server.apply(difference(result.weights, before))
    server.metrics.update(distill_loss_before=result.loss_before, distill_loss=result.loss_after)
    for reply, share in zip(replies, result.choice.share.tolist(), strict=True):
        server.client_metrics[reply.client_id] = {"teacher_share": share}
