"""How many layers each pipeline stage gets, with the embedding and the head counted."""

from __future__ import annotations


def balance(layers: int, stages: int, layer_cost: float, first_cost: float, last_cost: float) -> tuple[int, ...]:
    """Contiguous layers of each stage such that the costliest stage is as cheap as possible.

    A pipeline runs at the pace of its costliest stage, so this comes first. Among the splits that reach this optimum,
    as few stages as possible are left without layers (unless `layers` < `stages`); then the costs are as even as can
    be: the costliest stage, the second, and so on, are minimal; then layer counts are even; then later stages get more,
    because earlier ones hold more activations. A stage may be left with the head or the embedding alone if they weigh
    so much.

    Layers are handed out one by one, each to the stage that is cheapest with it. This is exact: as long as layers are
    left, some stage has room below the optimum, so the cheapest choice never passes it.

    Args:
        layers: transformer blocks in the model, at least 1.
        stages: pipeline ranks times chunks, at least 1.
        layer_cost: time of one block for one micro-batch, in any unit, positive.
        first_cost: embedding, on stage 0; same unit.
        last_cost: final norm, head and loss, on the last stage; same unit.

    Returns:
        `stages` counts that sum to `layers`.

    Raises:
        ValueError: a size below 1, or a cost that is negative (for a layer: or zero).

    >>> balance(layers=32, stages=4, layer_cost=1.0, first_cost=0.1, last_cost=1.2)
    (8, 8, 9, 7)
    """
    if layers < 1 or stages < 1:
        raise ValueError(f"cannot spread {layers} layers over {stages} stages; both must be at least 1")
    if not (layer_cost > 0 and first_cost >= 0 and last_cost >= 0):
        raise ValueError(
            f"costs must not be negative and a layer must cost something, "
            f"got layer_cost={layer_cost}, first_cost={first_cost}, last_cost={last_cost}"
        )
    fixed = [0.0] * stages
    fixed[0] += first_cost
    fixed[-1] += last_cost

    def cost(stage: int, count: int) -> float:
        return fixed[stage] + layer_cost * count

    def hand_out(counts: list[int]) -> list[int]:
        for _ in range(layers - sum(counts)):
            cheapest = min(range(stages), key=lambda s: (cost(s, counts[s] + 1), counts[s], -s))
            counts[cheapest] += 1
        return counts

    counts = hand_out([0] * stages)
    if layers >= stages:
        optimum = max(cost(stage, count) for stage, count in enumerate(counts))
        counts = hand_out([int(cost(stage, 1) <= optimum) for stage in range(stages)])
    return tuple(counts)
