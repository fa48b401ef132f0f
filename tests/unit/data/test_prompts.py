"""PromptStream: every prompt once per epoch, seeded, resumable to the prompt."""

from __future__ import annotations

import json

import pytest

from hf_rlhf.batch import Prompt
from hf_rlhf.data.prompt_stream import PromptStream

PROMPTS = [Prompt(ids=[i], prompt=str(i)) for i in range(10)]


class Stream:
    """An iterable without a length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (Prompt(ids=[i], prompt=str(i)) for i in range(self.count))


def drawn(stream, *counts):
    return [prompt.ids[0] for count in counts for prompt in stream.next(count)]


@pytest.mark.parametrize("source", [PROMPTS, Stream(10)], ids=["sequence", "stream"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_nothing_is_dropped_or_repeated_at_the_border_of_epochs(source, shuffle):
    numbers = drawn(PromptStream(source, seed=3, shuffle=shuffle), 4, 4, 4, 4, 4, 4, 4, 2)
    for epoch in range(3):
        assert sorted(numbers[10 * epoch : 10 * epoch + 10]) == list(range(10))


@pytest.mark.parametrize("source", [PROMPTS, Stream(10)], ids=["sequence", "stream"])
def test_epochs_have_different_orders_that_depend_on_the_seed_alone(source):
    first = drawn(PromptStream(source, seed=3), 20)
    assert first == drawn(PromptStream(source, seed=3), 7, 13)
    assert first[:10] != first[10:]
    assert first != drawn(PromptStream(source, seed=4), 20)


def test_without_shuffling_the_order_is_the_datasets():
    assert drawn(PromptStream(PROMPTS, shuffle=False), 12) == [*range(10), 0, 1]


@pytest.mark.parametrize("source", [PROMPTS, Stream(10), Stream(2500)], ids=["sequence", "stream", "long stream"])
@pytest.mark.parametrize("position", [0, 3, 10, 14, 20])
def test_a_saved_position_continues_with_the_very_next_prompt(source, position):
    stream = PromptStream(source, seed=5)
    stream.next(position)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(source, seed=5)
    resumed.next(6)
    resumed.load_state_dict(state)
    assert drawn(resumed, 15) == drawn(stream, 15)


def test_one_call_may_take_more_than_an_epoch():
    assert sorted(drawn(PromptStream(PROMPTS), 30)) == sorted([*range(10)] * 3)


def test_a_stream_longer_than_the_window_is_shuffled_and_complete():
    numbers = drawn(PromptStream(Stream(2500)), 2500)
    assert sorted(numbers) == list(range(2500))
    assert numbers != sorted(numbers)


@pytest.mark.parametrize("source", [[], Stream(0)], ids=["sequence", "stream"])
def test_an_empty_source_is_an_error_and_no_endless_loop(source):
    with pytest.raises(ValueError, match="no prompts"):
        PromptStream(source).next(1)


def test_a_checkpoint_of_another_dataset_or_seed_is_refused():
    state = PromptStream(PROMPTS, seed=1).state_dict()
    with pytest.raises(ValueError, match="rows was 10, now 9"):
        PromptStream(PROMPTS[:9], seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 1, now 2"):
        PromptStream(PROMPTS, seed=2).load_state_dict(state)


def test_epoch_counts_the_part_given():
    stream = PromptStream(PROMPTS)
    stream.next(15)
    assert stream.epoch == 1.5
