import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treegrpo.prompts import PromptError, PromptSampler, load_prompts


def test_the_embedded_splits_are_there_and_disjoint() -> None:
    train = load_prompts("miniature", "train")
    held_out = load_prompts("miniature", "held_out")
    assert train
    assert held_out
    assert not set(train) & set(held_out)


def test_a_file_gives_stripped_distinct_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    # A byte order mark, both line endings, a blank line, a duplicate, a line separator in a prompt.
    path.write_bytes("\ufeffb \r\n\n  a\nb\nc\u2028d".encode())
    assert load_prompts(str(path), "train") == ["b", "a", "c\u2028d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nna\xefve\n", "is not UTF-8: byte 0xef at offset 7, line 2"),
        (b"\n  \n", "holds no prompt"),
        (None, "does not exist"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        load_prompts(str(path), "train")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@settings(deadline=None)  # a busy machine is no fault
@given(size=st.integers(1, 12), draws=st.lists(st.integers(0, 30), max_size=8), seed=st.integers())
def test_epochs_are_permutations_however_they_are_cut(
    size: int, draws: list[int], seed: int
) -> None:
    prompts = [str(index) for index in range(size)]
    sampler = PromptSampler(prompts, seed)
    pieces = [sampler.next(count) for count in draws]
    assert [len(piece) for piece in pieces] == draws

    drawn = [prompt for piece in pieces for prompt in piece]
    assert drawn == PromptSampler(prompts, seed).next(len(drawn))
    for start in range(0, len(drawn), size):
        epoch = Counter(drawn[start : start + size])
        assert max(epoch.values()) == 1


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    prompts = [str(index) for index in range(20)]
    sampler = PromptSampler(prompts, seed=0)
    first, second = sampler.next(20), sampler.next(20)
    assert first != second
    assert first != PromptSampler(prompts, seed=1).next(20)


def test_a_resumed_sampler_continues_exactly() -> None:
    prompts = [str(index) for index in range(7)]
    sampler = PromptSampler(prompts, seed=3)
    sampler.next(10)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(prompts, seed=99)
    resumed.load_state_dict(state)
    assert resumed.next(25) == sampler.next(25)


def test_a_state_of_other_prompts_is_refused() -> None:
    state = PromptSampler(["a", "b"], seed=0).state_dict()
    with pytest.raises(PromptError, match="other prompts"):
        PromptSampler(["a", "c"], seed=0).load_state_dict(state)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(PromptError, match="at least one"):
        PromptSampler([], seed=0)
