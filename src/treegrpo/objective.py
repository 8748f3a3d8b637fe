"""The clipped GRPO objective over the forest's edges, with one model forward per node.

`losses` yields one `Loss` per micro-batch of nodes; call `backward()` on each value and step the
optimizer after the last. Each is already divided by the number of all edges, so the gradient is the
same whatever the micro-batch size.

Left out: optimizing (`training/learner.py`) and which objective a method takes (`methods/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treegrpo.rollout import Level, Predict, Rollout
from treegrpo.transition import Reduction, clean_and_noise, log_prob


@dataclass(frozen=True)
class Loss:
    """One micro-batch's part of an objective.

    Attributes:
        value: a scalar to call `backward()` on; the parts' sum is the objective.
        forwards: rows that went through the model for it.
        is_last: whether the optimizer step comes next.
        means, least, most: figures by name, each a tensor without gradient of one number per edge
            (or sample), of which an update's record shows the mean, the least and the most.
    """

    value: Tensor
    forwards: int
    is_last: bool
    means: Mapping[str, Tensor] = field(default_factory=dict)
    least: Mapping[str, Tensor] = field(default_factory=dict)
    most: Mapping[str, Tensor] = field(default_factory=dict)

    def backward(self) -> None:
        """Add the gradient of `value` to the parameters'."""
        self.value.backward()  # type: ignore[no-untyped-call]


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """`-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` per edge.

    Returns:
        The loss and whether the clip is what counts (bool), both in ratio's shape.
    """
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def gaussian_kl(mean: Tensor, reference: Tensor, std: float, reduction: Reduction) -> Tensor:
    """KL divergence between two Gaussians of equal std: `|mean - reference|^2 / (2 std^2)`.

    Args:
        mean, reference: [rows, ...].

    Returns:
        [rows], reduced as the log-probabilities are.
    """
    squared = ((mean - reference) / std).square().flatten(1) / 2
    return squared.mean(1) if reduction == "mean" else squared.sum(1)


def losses(
    predict: Predict,
    rollout: Rollout,
    advantages: Sequence[Tensor],
    *,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    micro_batch: int | None = None,
    prompts: slice = slice(None),
    kl_weight: float = 0.0,
    reference: Sequence[Tensor] | None = None,
    guard: bool = False,
) -> Iterator[Loss]:
    """The clipped objective, one part per micro-batch of nodes.

    Args:
        predict: the policy under training; called with gradient, once per node.
        rollout: from the behavior policy.
        advantages: per stochastic level, [prompts, edges].
        clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high].
        micro_batch: nodes per model call; does not change the summed gradient.
        prompts: which of the rollout's prompts to use (an optimizer step on a part of them).
        kl_weight: of the KL divergence to the reference policy.
        reference: its means per stochastic level, from `node_means`.
        guard: GRPO-Guard's ratio normalisation (arXiv 2510.22319); needs a rollout made with
            `keep_means=True`.

    The states of a micro-batch are brought to the advantages' device.

    Yields:
        Parts whose sum is the objective, averaged over the chosen prompts' edges. The figures of
        each are its edges' `ratio`, whether the clip is what counts, and the divergence `kl`.

    Raises:
        ValueError: `guard` without kept means, `kl_weight` without a reference, or no prompts.
    """
    if kl_weight > 0 and reference is None:
        raise ValueError(f"kl_weight: got {kl_weight} without a reference policy")
    chosen = range(*prompts.indices(rollout.leaves.shape[0]))
    if not chosen or chosen.step != 1:
        raise ValueError(f"prompts: got {prompts}; must be a range of at least one prompt")
    edges = rollout.plan.edges * len(chosen)
    for batch in _node_batches(rollout.levels, advantages, reference, chosen, micro_batch):
        level, transition = batch.level, batch.level.transition
        output = predict(batch.nodes, level.step, batch.prompt_index)
        mean = transition.mean(*clean_and_noise(output, batch.nodes, rollout.schedule, level.step))
        rows, siblings = batch.advantage.shape
        new = log_prob(
            batch.children.flatten(0, 1),
            mean.repeat_interleave(siblings, 0),
            transition.std,
            rollout.reduction,
        ).view(rows, siblings)
        log_ratio, scale = new - batch.log_prob, 1.0
        if guard:
            if batch.mean is None:
                raise ValueError("guard: the rollout was made without keep_means=True")
            drift = gaussian_kl(mean, batch.mean, transition.std, rollout.reduction)
            log_ratio = (log_ratio + drift[:, None]) * transition.std
            sigma = rollout.schedule.sigma
            scale = 1 / (sigma[level.step] - sigma[level.step + 1])
        ratio = log_ratio.exp()
        per_edge, clipped = clipped_surrogate(ratio, batch.advantage, clip_low, clip_high)
        kl = torch.zeros_like(ratio)
        if kl_weight > 0 and batch.reference is not None:
            divergence = gaussian_kl(mean, batch.reference, transition.std, rollout.reduction)
            kl = divergence[:, None].expand_as(ratio)
        ratio, kl_value = ratio.detach(), kl.detach()
        yield Loss(
            (per_edge * scale + kl_weight * kl).sum() / edges,
            rows,
            batch.is_last,
            means={"ratio_mean": ratio, "clip_fraction": clipped, "kl": kl_value},
            least={"ratio_min": ratio},
            most={"ratio_max": ratio, "ratio_error": (ratio - 1).abs()},
        )


@torch.no_grad()
def node_means(
    predict: Predict, rollout: Rollout, device: torch.device, micro_batch: int | None = None
) -> tuple[Tensor, ...]:
    """A policy's Gaussian means at every node: per stochastic level [prompts, n, ...].

    They are kept where the states are.

    Args:
        predict: the policy, such as a reference that is then no longer needed.
        device: where it computes.
        micro_batch: nodes per model call.
    """
    results = []
    for level in rollout.levels:
        prompts, width = level.nodes.shape[:2]
        index = torch.arange(prompts, device=device).repeat_interleave(width)
        rows, size = level.nodes.flatten(0, 1), micro_batch or prompts * width
        means = []
        for start in range(0, len(rows), size):
            x = rows[start : start + size].to(device)
            output = predict(x, level.step, index[start : start + size])
            estimates = clean_and_noise(output, x, rollout.schedule, level.step)
            means.append(level.transition.mean(*estimates).to(rows.device))
        results.append(torch.cat(means).view_as(level.nodes))
    return tuple(results)


@dataclass(frozen=True)
class _NodeBatch:
    """Some nodes of one level: states [rows, ...], children [rows, k, ...], the rest [rows, k]."""

    level: Level
    nodes: Tensor
    children: Tensor
    log_prob: Tensor
    advantage: Tensor
    prompt_index: Tensor
    mean: Tensor | None
    reference: Tensor | None
    is_last: bool


def _node_batches(
    levels: Sequence[Level],
    advantages: Sequence[Tensor],
    references: Sequence[Tensor] | None,
    prompts: range,
    micro_batch: int | None,
) -> Iterator[_NodeBatch]:
    part = slice(prompts.start, prompts.stop)
    for number, (level, advantage) in enumerate(zip(levels, advantages, strict=True)):
        width, siblings, device = level.nodes.shape[1], level.branching, advantage.device
        rows = width * len(prompts)
        index = torch.arange(prompts.start, prompts.stop, device=device).repeat_interleave(width)
        nodes = level.nodes[part].flatten(0, 1)
        children = level.children[part].reshape(rows, siblings, *nodes.shape[1:])
        old = level.log_prob[part].reshape(rows, siblings)
        edge_advantage = advantage[part].reshape(rows, siblings)
        mean = None if level.mean is None else level.mean[part].flatten(0, 1)
        reference = None if references is None else references[number][part].flatten(0, 1)
        size = micro_batch or rows
        for start in range(0, rows, size):
            some = slice(start, start + size)
            yield _NodeBatch(
                level,
                nodes[some].to(device),
                children[some].to(device),
                old[some].to(device),
                edge_advantage[some],
                index[some],
                None if mean is None else mean[some].to(device),
                None if reference is None else reference[some].to(device),
                is_last=number == len(levels) - 1 and start + size >= rows,
            )
