import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treegrpo.config import PromptsConfig
from treegrpo.prompts import (
    Prompt,
    PromptError,
    PromptSampler,
    load_prompts,
    load_train_and_held_out,
    overlap,
    split_prompts,
)


def numbered(count: int) -> list[Prompt]:
    return [Prompt(str(index)) for index in range(count)]


# --- which are held out ---


def test_the_embedded_splits_are_there_and_disjoint() -> None:
    train, held_out = load_train_and_held_out(PromptsConfig(held_out_share=0.5))
    assert train == load_prompts("miniature", "train")
    assert held_out == load_prompts("miniature", "held_out")
    assert train
    assert held_out
    assert not overlap(train, held_out)


def test_a_text_is_held_out_by_its_hash_alone() -> None:
    prompts = numbered(2000)
    train, held_out = split_prompts(prompts, 0.1)
    # The definition, by another route: the hexadecimal digest as a fraction of its largest value.
    fraction = {p: int(hashlib.sha256(p.text.encode()).hexdigest(), 16) / 2**256 for p in prompts}
    assert held_out == [p for p in prompts if fraction[p] < 0.1]
    assert train == [p for p in prompts if fraction[p] >= 0.1]
    # 200 expected; the binomial standard deviation is 13.4.
    assert abs(len(held_out) - 200) < 4 * 13.4

    # In another list, with other metadata, the sides stay; a larger share only adds.
    part = [Prompt(p.text, {"tag": 1}) for p in reversed(prompts[::3])]
    assert not {p.text for p in split_prompts(part, 0.1)[0]} & {p.text for p in held_out}
    assert set(held_out) < set(split_prompts(prompts, 0.2)[1])


def test_a_share_that_empties_a_side_is_refused() -> None:
    with pytest.raises(PromptError, match=r"held_out_share: got 0\.1; of 1 prompts 1 train and 0"):
        split_prompts([Prompt("0")], 0.1)


def test_a_run_without_held_out_prompts_takes_a_share_of_its_own(tmp_path: Path) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "other.csv"
    own.write_text("".join(f"{index}\n" for index in range(50)))
    other.write_text("Caption\n7\nseven\n")
    alone = PromptsConfig(train=str(own), held_out_share=0.3)
    assert load_train_and_held_out(alone) == split_prompts(numbered(50), 0.3)
    both = PromptsConfig(train=str(own), held_out=str(other), held_out_column="caption")
    train, held_out = load_train_and_held_out(both)
    assert (train, held_out) == (numbered(50), [Prompt("7"), Prompt("seven")])
    assert overlap(train, held_out) == ["7"]


# --- the order ---


@settings(deadline=None)  # a busy machine is no fault
@given(size=st.integers(1, 12), draws=st.lists(st.integers(0, 30), max_size=8), seed=st.integers())
def test_epochs_are_permutations_however_they_are_cut(
    size: int, draws: list[int], seed: int
) -> None:
    prompts = numbered(size)
    sampler = PromptSampler(prompts, seed)
    pieces = []
    for count in draws:
        coming = sampler.upcoming(count)
        pieces.append(sampler.next(count))
        assert coming == list(dict.fromkeys(pieces[-1]))
    assert [len(piece) for piece in pieces] == draws

    drawn = [prompt for piece in pieces for prompt in piece]
    assert drawn == PromptSampler(prompts, seed).next(len(drawn))
    for start in range(0, len(drawn), size):
        epoch = Counter(drawn[start : start + size])
        assert max(epoch.values()) == 1


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    sampler = PromptSampler(numbered(20), seed=0)
    first, second = sampler.next(20), sampler.next(20)
    assert first != second
    assert first != PromptSampler(numbered(20), seed=1).next(20)


def test_a_resumed_sampler_continues_exactly_whatever_the_metadata() -> None:
    sampler = PromptSampler(numbered(7), seed=3)
    sampler.next(10)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler([Prompt(p.text, {"tag": p.text}) for p in numbered(7)], seed=99)
    resumed.load_state_dict(state)
    assert [p.text for p in resumed.next(25)] == [p.text for p in sampler.next(25)]


def test_a_state_of_other_prompts_is_refused() -> None:
    state = PromptSampler(numbered(2), seed=0).state_dict()
    with pytest.raises(PromptError, match="other prompts"):
        PromptSampler([Prompt("0"), Prompt("2")], seed=0).load_state_dict(state)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(PromptError, match="at least one"):
        PromptSampler([], seed=0)
