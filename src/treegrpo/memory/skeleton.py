"""Memory of the work itself, counted on a model without weights.

No formula of any architecture is written down here. The policy's own `predictor` and `decode` and
the objective's own `losses` run, forward and backward, on fake tensors (shapes and dtypes without
data), and `PeakBytes` adds what is allocated and takes off what is freed.

Left out: what follows from the plan alone, and the phases of an iteration (`estimate.py`).
"""

from __future__ import annotations

import contextlib
import math
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from treegrpo.config import ModelConfig
from treegrpo.device import parse_device
from treegrpo.methods import Credit, Method, Update
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.models.text import PROMPTS_PER_ENCODING, EmbeddingStore
from treegrpo.plan import RolloutPlan
from treegrpo.rollout import Level, Rollout, rollout
from treegrpo.transition import Transition

FLOAT32 = 4  # bytes
_CPU = torch.device("cpu")
_TRANSITION = Transition(clean_weight=0.5, noise_weight=0.5, std=1.0)  # any, without values


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages made inside that are alive, now and at most; real or fake tensors."""

    def __init__(self, longest_prompt: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._longest_prompt = longest_prompt
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked most often of all
            return func(*args)
        if func is torch.ops.aten._local_scalar_dense.default:
            # A fake tensor has no values. Those that are asked for are statistics, for which any
            # number does, and lengths of prompts, which are all at their longest.
            return 0.0 if args[0].dtype.is_floating_point else self._longest_prompt
        result = func(*args, **(kwargs or {}))
        results = _storages(result)
        if results:
            for key in results.keys() - self._made.keys() - _storages((args, kwargs)).keys():
                self._add(key, results[key])
            # The CPU's 3-d convolution makes its result twice, in two layouts.
            is_video = func is torch.ops.aten.convolution.default and result.dim() == 5
            workspace = total_bytes([result]) if is_video else 0
            self.peak = max(self.peak, self.live + workspace)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            del self._made[key]

        self._made[key] = weakref.ref(storage, freed)
        self.live += size


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    storages = (v.untyped_storage() for v in tree_leaves(values) if isinstance(v, Tensor))
    return {storage._cdata: storage for storage in storages}


class CudaAutocast(TorchFunctionMode):
    """Autocast on the CPU with the dtypes that it has on CUDA.

    There, these operations compute in float32 and so give larger results (the list of "CUDA ops
    that autocast to float32", https://docs.pytorch.org/docs/stable/amp.html, and the upsampling).
    """

    _IN_FLOAT32 = re.compile(
        "(layer|group|rms|vector)_norm|norm|normalize|(log_)?softmax|softplus|(__)?pow(__)?|rsqrt|"
        "reciprocal|exp|log|sum|cumsum|interpolate"
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._IN_FLOAT32.fullmatch(name) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def _checkpoint_on_cuda(module: nn.Module, *inputs: Any) -> Any:
    """Gradient checkpointing as diffusers does it. Backward puts modes aside, so it has its own."""

    def call(*inputs: Any) -> Any:
        with CudaAutocast():
            return module(*inputs)

    return checkpoint(call, *inputs, use_reentrant=False)


class _EveryPrompt(EmbeddingStore):
    """Has the fake embeddings of every prompt, each at its longest."""

    def __init__(self, policy: Policy, mode: FakeTensorMode) -> None:
        super().__init__(None)
        self._shapes, self._dtype, self._mode = policy.conditioning_shapes(), policy.dtype, mode

    def __contains__(self, prompt: str) -> bool:
        return True

    def get(self, prompt: str) -> dict[str, Tensor]:
        with self._mode:
            return {
                name: torch.ones(shape, dtype=torch.int64 if name == "mask" else self._dtype)
                for name, shape in self._shapes.items()
            }


@dataclass(frozen=True)
class Decoding:
    """Bytes of `Policy.decode` at its peak, and of one image or video."""

    peak: int
    image: int


class Skeleton:
    """A policy whose network and decoder hold fake tensors, and tell their calls' peak bytes."""

    def __init__(self, model: ModelConfig, steps: int) -> None:
        """Opens the checkpoint as training does."""
        # What kernels do is not looked at, and nothing is kept on disk.
        unseen = {"compile": False, "attention_backend": None, "embedding_cache": None}
        model = model.model_copy(update=unseen)
        self.policy = policy = open_policy(model, device=_CPU, steps=steps, weights=False)
        self._steps = steps
        self._cuda = planned_device(model).type == "cuda"
        self._mode = FakeTensorMode()
        policy.text.store = _EveryPrompt(policy, self._mode)
        load_weights(policy, model, train=True, read=policy.checkpoint.without_weights)
        if self._cuda and model.gradient_checkpointing:
            network: Any = policy.network
            network.enable_gradient_checkpointing(_checkpoint_on_cuda)
        for module in (policy.network, policy.vae):
            _make_fake(module, self._mode)

    @cached_property
    def adapters(self) -> tuple[Tensor, ...]:
        """Those of LoRA."""
        return tuple(p for n, p in self.policy.network.named_parameters() if ".lora_" in n)

    @cached_property
    def trained(self) -> tuple[Tensor, ...]:
        """The parameters that training changes."""
        return tuple(p for p in self.policy.network.parameters() if p.requires_grad)

    @cached_property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by component, of fake tensors."""
        checkpoint, dtype = self.policy.checkpoint, self.policy.dtype
        names = [name for name in checkpoint.text_parts if name in checkpoint.configs]
        encoders = {name: checkpoint.without_weights(name, dtype).eval() for name in names}
        for encoder in encoders.values():
            _make_fake(encoder, self._mode)
        return encoders

    @property
    def state_bytes(self) -> int:
        """Of one state."""
        return math.prod(self.policy.latent_shape) * FLOAT32

    @property
    def embedding_bytes(self) -> int:
        """Of one prompt's conditioning."""
        return total_bytes(self.policy.encode([""]).values())

    def rollout(self, rows: int, children: int, *, again: bool) -> int:
        """Peak bytes of one step of a rollout beside the states that it makes.

        `rows` nodes have so many children each; with `again` there are more such batches, which
        begin before the last one's tensors leave.
        """
        policy = self.policy
        predict = policy.predictor(policy.encode([""]), self._steps)
        schedule = policy.schedule(self._steps)
        nodes = 2 * rows if again else rows
        plan = RolloutPlan(nodes, (children,), (True,))
        with self._mode:
            noise = torch.empty(1, nodes, *policy.latent_shape)
            with self._counting() as count:
                rollout(predict, noise, plan, schedule, (_TRANSITION,), max_batch=rows)
        # What follows, and the draws for it.
        return count.peak - 2 * nodes * children * self.state_bytes

    def update(self, rows: int, siblings: int, *, accumulate: bool, method: Method) -> int:
        """Peak bytes of an update's micro-batch, its gradients included.

        `rows` nodes have so many children (`siblings`) each, or are samples where it is 0; to
        `accumulate`, gradients of an earlier micro-batch are there already.
        """
        policy = self.policy
        predict = policy.predictor(policy.encode([""]), self._steps)
        schedule = policy.schedule(self._steps)
        plan = RolloutPlan(rows, (siblings or 1,), (siblings > 0,))
        with self._mode:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter) if accumulate else None
            nodes = torch.empty(1, rows, *policy.latent_shape)
            leaves = torch.empty(1, plan.leaves, *policy.latent_shape)
            numbers = torch.empty(1, plan.leaves)
            levels = [Level(0, _TRANSITION, nodes, leaves, numbers, nodes)] if siblings else []
            forest = Rollout(plan, schedule, leaves, tuple(levels), 0, method.reduction)
            credit = Credit(numbers, (numbers,) * len(levels))
            reference = [nodes] if method.needs_reference else None
            update = Update(forest, credit, reference, slice(None), rows)
            with self._counting() as count:
                for loss in method.losses(predict, update):
                    loss.backward()
        for parameter in self.trained:
            parameter.grad = None
        return count.peak + (total_bytes(self.trained) if accumulate else 0)

    def decode(self, rows: int, frames: int, *, again: bool) -> Decoding:
        """Peak bytes of decoding `rows` latents at once; with `again` as many follow."""
        with self._mode:
            latents = torch.empty(2 * rows if again else rows, *self.policy.latent_shape)
            with self._counting() as count:
                images = self.policy.decode(latents, rows, frames)
        return Decoding(count.peak, total_bytes([images]) // len(images))

    def encode(self) -> int:
        """Peak bytes of the text encoders' forward on a batch of the longest prompts."""
        peak = 0
        for name, encoder in self.encoders.items():
            config: Any = encoder.config
            is_clip = getattr(config, "model_type", "").startswith("clip")
            tokens = config.max_position_embeddings if is_clip else self.policy.encoder_tokens()
            with torch.no_grad(), self._mode:
                ids = torch.zeros(PROMPTS_PER_ENCODING, tokens, dtype=torch.int64)
                with self._counting() as count:
                    encoder(ids, output_hidden_states=name in self.policy.kept_layers)
            peak = max(peak, count.peak)
        return peak

    @contextlib.contextmanager
    def _counting(self) -> Iterator[PeakBytes]:
        lengths = [shape[0] for shape in self.policy.conditioning_shapes().values()]
        with contextlib.ExitStack() as stack:
            if self._cuda:
                stack.enter_context(CudaAutocast())
            yield stack.enter_context(PeakBytes(max(lengths)))


def planned_device(model: ModelConfig) -> torch.device:
    """The device of a configuration, which need not be in this machine."""
    return parse_device(model.device, "model.device")


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Move a module from the meta device to the CPU, in name.

    The meta device itself would choose other attention kernels.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        # Some models keep tensors as plain attributes.
        of_part: tuple[dict[str, Any], ...] = part._parameters, part._buffers, vars(part)
        for tensors in of_part:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    tensors[name] = fake(tensor)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Measurements:
    """What skeletons tell, each thing measured once, for the settings that matter to it."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._skeletons: dict[str, Skeleton] = {}
        self._known: dict[Any, Any] = {}

    def skeleton(self, model: ModelConfig) -> Skeleton:
        """Made once for a section."""
        key = model.model_dump_json()
        if key not in self._skeletons:
            self._skeletons[key] = Skeleton(model, self._steps)
        return self._skeletons[key]

    def rollout(self, model: ModelConfig, **settings: Any) -> int:
        """`Skeleton.rollout`."""
        same = {"gradient_checkpointing": False, "vae_tiling": False}
        return int(self._once(model.model_copy(update=same), "rollout", **settings))

    def update(self, model: ModelConfig, method: Method, **settings: Any) -> int:
        """`Skeleton.update`."""
        same = model.model_copy(update={"vae_tiling": False})
        objective = method.objective.model_dump_json()
        key = (same.model_dump_json(), type(method), objective, *settings.items())
        if key not in self._known:
            self._known[key] = self.skeleton(same).update(method=method, **settings)
        return int(self._known[key])

    def decode(self, model: ModelConfig, **settings: Any) -> Decoding:
        """`Skeleton.decode`."""
        same = {"gradient_checkpointing": False, "lora_rank": 0}
        decoding: Decoding = self._once(model.model_copy(update=same), "decode", **settings)
        return decoding

    def encode(self, model: ModelConfig) -> int:
        """`Skeleton.encode`."""
        same = {"gradient_checkpointing": False, "lora_rank": 0, "vae_tiling": False}
        return int(self._once(model.model_copy(update=same), "encode"))

    def _once(self, model: ModelConfig, question: str, **settings: Any) -> Any:
        key = (model.model_dump_json(), question, *settings.items())
        if key not in self._known:
            self._known[key] = getattr(self.skeleton(model), question)(**settings)
        return self._known[key]
