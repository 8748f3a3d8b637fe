"""What a reward remembers from call to call, if it has `state_dict` and `load_state_dict`.

Left out: when it is kept and taken back (`training/build.py`), and states of rewards on servers.
"""

from __future__ import annotations

import copy
from io import BytesIO
from typing import Any

from treegrpo.errors import UserError, own_traceback, reason
from treegrpo.rewards.registry import Reward


def kept_state(name: str, reward: Reward) -> Any:
    """A copy of the reward's state, on the CPU; None where it has none.

    Of a torch module that inherits its `state_dict` that is its buffers: without an optimizer's
    state its parameters could not go on learning.

    Raises:
        UserError: it cannot be had, or holds what a checkpoint cannot.
    """
    import torch

    if not all(callable(getattr(reward, one, None)) for one in ("state_dict", "load_state_dict")):
        return None
    holder: Any = reward
    try:
        state = holder.state_dict()
        if _inherits_state(reward):
            weights = dict(holder.named_parameters())
            state = {key: value for key, value in state.items() if key not in weights} or None
    except Exception as error:
        raise _failure(name, "state_dict", error) from error
    file = BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's are of many kinds
        raise UserError(
            f"reward {name!r}: its state cannot be kept in a checkpoint ({reason(error)}); "
            "state_dict must give tensors, numbers, texts, lists and dicts"
        ) from error


def take_state(name: str, reward: Reward, state: Any) -> None:
    """Let the reward go on from what `kept_state` gave.

    Raises:
        UserError: it does not take it.
    """
    if state is None:
        return
    holder: Any = reward
    settings = {"strict": False} if _inherits_state(reward) else {}
    try:
        holder.load_state_dict(copy.deepcopy(state), **settings)
    except Exception as error:
        raise _failure(name, "load_state_dict", error) from error


def _inherits_state(reward: object) -> bool:
    from torch import nn

    return isinstance(reward, nn.Module) and type(reward).state_dict is nn.Module.state_dict


def _failure(name: str, method: str, error: Exception) -> UserError:
    return UserError(
        f"reward {name!r}: its {method} raised {type(error).__name__}: {error}"
        f"{own_traceback(error)}"
    )
