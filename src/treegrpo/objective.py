"""What an update maximizes over the forest's edges, with one model forward per node.

`losses` is the clipped GRPO objective, `endpoint_losses` one that reads the siblings' finished
samples instead of their log-probabilities. Both yield one `Loss` per micro-batch of nodes; call
`backward()` on each value and step the optimizer after the last. Each is already divided by the
number of all edges, so the gradient is the same whatever the micro-batch size.

Left out: optimizing (`training/learner.py`) and which objective a method takes (`methods/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treegrpo.rollout import Level, Predict, Rollout
from treegrpo.transition import Reduction, Schedule, clean_and_noise, log_prob


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
    max_divergence: float | None = None,
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
        max_divergence: a trust region in place of the clip (Flow-DPPO, arXiv 2606.11025): where a
            node's Gaussian has moved this far, `|mean - old mean|^2 / (2 std^2)` per dimension, an
            edge counts no more if the update already favours it; needs `keep_means=True`.

    The states of a micro-batch are brought to the advantages' device.

    Yields:
        Parts whose sum is the objective, averaged over the chosen prompts' edges. The figures of
        each are its edges' `ratio`, whether the clip is what counts, and the divergence `kl`.

    Raises:
        ValueError: `guard` or `max_divergence` without kept means, `kl_weight` without a
            reference, or no prompts.
    """
    chosen = _chosen(rollout, prompts, kl_weight, reference)
    edges = rollout.plan.edges * len(chosen)
    for batch in _node_batches(rollout, advantages, reference, chosen, micro_batch):
        level, transition = batch.level, batch.level.transition
        _, mean = batch.output_and_mean(predict, rollout.schedule)
        log_ratio, scale = batch.log_ratio(mean, rollout.reduction), 1.0
        if guard:
            drift = gaussian_kl(mean, batch.kept_mean, transition.std, rollout.reduction)
            log_ratio = (log_ratio + drift[:, None]) * transition.std
            sigma = rollout.schedule.sigma
            scale = 1 / (sigma[level.step] - sigma[level.step + 1])
        ratio = log_ratio.exp()
        if max_divergence is None:
            per_edge, clipped = clipped_surrogate(ratio, batch.advantage, clip_low, clip_high)
        else:
            gained = (ratio.detach() - 1) * batch.advantage > 0
            clipped = gained & batch.has_moved(mean, max_divergence)
            per_edge = -ratio * batch.advantage * ~clipped
        kl = batch.kl(mean, rollout.reduction, kl_weight)[:, None].expand_as(ratio)
        value = (per_edge * scale + kl_weight * kl).sum() / edges
        yield batch.loss(value, ratio.detach(), clipped, kl.detach())


def endpoint_losses(
    predict: Predict,
    rollout: Rollout,
    advantages: Sequence[Tensor],
    *,
    micro_batch: int | None = None,
    prompts: slice = slice(None),
    kl_weight: float = 0.0,
    reference: Sequence[Tensor] | None = None,
    max_divergence: float | None = None,
) -> Iterator[Loss]:
    """The endpoint objective, one part per micro-batch of nodes.

    Every node's clean estimate moves towards the finished samples of its better children. With
    `xbar_j` the mean of the leaves below child j, `d_j` and `A_j` its difference and its
    advantage's difference from the siblings' mean, and `|d|` the root mean square of d,

        loss = 1 / edges * sum over nodes u and children j of A_j <d_j / |d_j|, v(x_u)> / dimensions

    (v the model's velocity, noise or v-prediction, all of which the clean estimate falls with; an
    estimate of the clean sample enters with the other sign). It is not the policy gradient, but one
    preconditioned by the covariance of the endpoints: where the leaf is `x_child` through an
    isotropic linear map, both have the same direction, and elsewhere this one has less noise, since
    an endpoint holds what the injected noise has become and not only what it was. After arXiv
    2603.12893, which has pairs of samples and no trees.

    Args:
        predict: the policy under training; called with gradient, once per node.
        rollout: from the behavior policy.
        advantages: per stochastic level, [prompts, edges]; what siblings share has no effect, so
            that a node with a single child teaches nothing.
        micro_batch, prompts, kl_weight, reference, max_divergence: as of `losses`.

    Yields:
        Parts whose sum is the objective, averaged over the chosen prompts' edges. The figures of
        each are those of `losses` (`clip_fraction` is what the trust region leaves out) and the
        edges' `endpoint_spread`, |d|.

    Raises:
        ValueError: `max_divergence` without kept means, `kl_weight` without a reference, or no
            prompts.
    """
    chosen = _chosen(rollout, prompts, kl_weight, reference)
    edges = rollout.plan.edges * len(chosen)
    towards = -1.0 if rollout.schedule.prediction == "sample" else 1.0
    for batch in _node_batches(rollout, advantages, reference, chosen, micro_batch):
        output, mean = batch.output_and_mean(predict, rollout.schedule)
        endpoints = batch.endpoints(rollout).flatten(2)
        difference = endpoints - endpoints.mean(1, keepdim=True)
        spread = (difference.square().mean(-1) + _SMALLEST_SPREAD).sqrt()
        advantage = batch.advantage.to(spread.dtype)
        local = (advantage - advantage.mean(1, keepdim=True)) / spread
        left_out = torch.zeros_like(local, dtype=torch.bool)
        if max_divergence is not None:
            moved = (mean - batch.kept_mean).detach().flatten(1)
            gained = local * torch.einsum("nkd,nd->nk", difference, moved.to(difference.dtype)) > 0
            left_out = gained & batch.has_moved(mean, max_divergence)
        direction = torch.einsum("nk,nkd->nd", local * ~left_out, difference)
        moving = (direction * output.flatten(1).to(direction.dtype)).mean(1)
        kl = batch.kl(mean, rollout.reduction, kl_weight)
        value = (towards * moving + kl_weight * batch.siblings * kl).sum() / edges
        ratio = batch.log_ratio(mean.detach(), rollout.reduction).exp()
        yield batch.loss(value, ratio, left_out, kl.detach(), endpoint_spread=spread)


# Siblings whose endpoints are equal differ by nothing, and the division must not make something of
# their rounding. In latents, whose scale is about 1.
_SMALLEST_SPREAD = 1e-6


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


def _chosen(
    rollout: Rollout, prompts: slice, kl_weight: float, reference: Sequence[Tensor] | None
) -> range:
    if kl_weight > 0 and reference is None:
        raise ValueError(f"kl_weight: got {kl_weight} without a reference policy")
    chosen = range(*prompts.indices(rollout.leaves.shape[0]))
    if not chosen or chosen.step != 1:
        raise ValueError(f"prompts: got {prompts}; must be a range of at least one prompt")
    return chosen


@dataclass(frozen=True)
class _NodeBatch:
    """Some nodes of one level: states [rows, ...], children [rows, k, ...], the rest [rows, k].

    `place` is where the rows stand among those of the level's chosen prompts.
    """

    level: Level
    prompts: slice
    place: slice
    nodes: Tensor
    children: Tensor
    log_prob: Tensor
    advantage: Tensor
    prompt_index: Tensor
    mean: Tensor | None
    reference: Tensor | None
    is_last: bool

    def output_and_mean(self, predict: Predict, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """The model's output at the nodes and the mean of their children, [rows, ...] each."""
        output = predict(self.nodes, self.level.step, self.prompt_index)
        estimates = clean_and_noise(output, self.nodes, schedule, self.level.step)
        return output, self.level.transition.mean(*estimates)

    @property
    def siblings(self) -> int:
        """Children of each node, k."""
        return self.advantage.shape[1]

    def log_ratio(self, mean: Tensor, reduction: Reduction) -> Tensor:
        """[rows, k]: the children's log-probability under `mean` less that when sampled."""
        each = mean.repeat_interleave(self.siblings, 0)
        new = log_prob(self.children.flatten(0, 1), each, self.level.transition.std, reduction)
        return new.view_as(self.log_prob) - self.log_prob

    def loss(
        self, value: Tensor, ratio: Tensor, clipped: Tensor, kl: Tensor, **means: Tensor
    ) -> Loss:
        """This part of an objective, with the figures that all objectives have."""
        return Loss(
            value,
            len(self.nodes),
            self.is_last,
            means={"ratio_mean": ratio, "clip_fraction": clipped, "kl": kl, **means},
            least={"ratio_min": ratio},
            most={"ratio_max": ratio, "ratio_error": (ratio - 1).abs()},
        )

    @property
    def kept_mean(self) -> Tensor:
        """The mean with which the children were sampled."""
        if self.mean is None:
            raise ValueError("guard, max_divergence: the rollout was made without keep_means=True")
        return self.mean

    def endpoints(self, rollout: Rollout) -> Tensor:
        """The mean of the leaves below each child, at least float32 [rows, k, ...]."""
        leaves, width = rollout.leaves[self.prompts], self.level.nodes.shape[1]
        below = leaves.reshape(len(leaves) * width, self.siblings, -1, *leaves.shape[2:])
        wide = torch.promote_types(leaves.dtype, torch.float32)
        return below[self.place].to(self.advantage.device, wide).mean(2)

    def kl(self, mean: Tensor, reduction: Reduction, weight: float) -> Tensor:
        """[rows]: the divergence from the reference policy; 0 where it has no weight."""
        if weight == 0 or self.reference is None:
            return torch.zeros_like(mean.flatten(1)[:, 0])
        return gaussian_kl(mean, self.reference, self.level.transition.std, reduction)

    def has_moved(self, mean: Tensor, distance: float) -> Tensor:
        """Bool [rows, 1]: the nodes whose Gaussian is that far from what it was, per dimension."""
        moved = gaussian_kl(mean.detach(), self.kept_mean, self.level.transition.std, "mean")
        return (moved >= distance)[:, None]


def _node_batches(
    rollout: Rollout,
    advantages: Sequence[Tensor],
    references: Sequence[Tensor] | None,
    prompts: range,
    micro_batch: int | None,
) -> Iterator[_NodeBatch]:
    part = slice(prompts.start, prompts.stop)
    for number, (level, advantage) in enumerate(zip(rollout.levels, advantages, strict=True)):
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
                part,
                some,
                nodes[some].to(device),
                children[some].to(device),
                old[some].to(device),
                edge_advantage[some],
                index[some],
                None if mean is None else mean[some].to(device),
                None if reference is None else reference[some].to(device),
                is_last=number == len(rollout.levels) - 1 and start + size >= rows,
            )
