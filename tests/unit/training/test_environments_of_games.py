"""Games as environments: their rules, and what the policy is shown and worth."""

from __future__ import annotations

import pytest

from hf_rlhf import load_plugin
from tests.helpers.environments import Says, play


@pytest.mark.proves("environment.guessing", how="exact enumeration", tolerance="0")
@pytest.mark.parametrize("secret", range(1, 8))
def test_halving_finds_every_number_in_three_guesses(secret: int) -> None:
    """The texts are those of a player who halves what is left after each answer, from the answers alone."""
    low, high, texts = 1, 7, []
    while not texts or texts[-1] != str(secret):
        texts.append(str((low + high) // 2))
        low, high = (low, int(texts[-1]) - 1) if int(texts[-1]) > secret else (int(texts[-1]) + 1, high)
    game = load_plugin("environment", "guessing", max_turns=3)
    played = play(game, Says(texts=tuple(texts)), columns={"secret": [str(secret)]})
    assert played.completions.columns["episode/reward"] == [1.0]
    assert played.completions.columns["episode/guesses"] == [len(texts)] <= [3]
    said = [message["content"] for message in played.messages[0] if message["role"] == "user"][1:]
    assert said == [{True: "higher", False: "lower"}[int(guess) < secret] for guess in texts[:-1]]


@pytest.mark.parametrize(("texts", "guesses"), [(("1", "2", "3"), 2), (("no idea",), 1), (("1", "it is 3"), 2)])
def test_a_game_ends_with_its_turns_or_an_answer_without_a_number(texts: tuple[str, ...], guesses: int) -> None:
    played = play(load_plugin("environment", "guessing", max_turns=2), Says(texts=texts), columns={"secret": ["3"]})
    assert played.completions.columns["episode/guesses"] == [guesses]
    assert played.completions.columns["episode/reward"] == [float("it is 3" in texts)]


@pytest.mark.proves("environment.nim", how="exact enumeration", tolerance="0")
@pytest.mark.parametrize("heap", range(1, 10))
def test_a_perfect_player_wins_where_the_heap_is_no_multiple_of_four(heap: int) -> None:
    """Backward induction over all heaps says who wins; moves are those of a first player who takes the rest modulo 4."""
    wins = [False]
    for size in range(1, heap + 1):
        wins.append(any(not wins[size - taken] for taken in (1, 2, 3) if taken <= size))
    assert wins[heap] == bool(heap % 4)
    texts, left = [], heap
    while left > 0:
        texts.append(str(left % 4 or 1))
        left -= left % 4 or 1
        left -= left % 4 or 1
    game = load_plugin("environment", "nim", opponent="perfect", max_turns=10)
    found = play(game, Says(texts=tuple(texts)), prompts=(f"{heap}:",), columns={"heap": [str(heap)]})
    assert found.completions.columns["episode/agent"] == ["first"]
    assert found.completions.columns["episode/reward"] == [float(wins[heap])]


@pytest.mark.parametrize(
    ("texts", "rewards", "moves"),
    [(("3", "2"), [0.0, 1.0], 2), (("3", "1", "1"), [1.0, 0.0], 3), (("3", "3"), [1.0, 0.0], 2), (("no",), [0.0], 1)],
)
def test_each_agent_sees_its_own_moves_and_an_answer_that_is_no_move_loses(texts, rewards, moves) -> None:
    found = play(load_plugin("environment", "nim"), Says(texts=texts), prompts=("5:",), columns={"heap": ["5"]})
    columns = found.completions.columns
    assert columns["episode/agent"] == ["first", "second"][: len(rewards)]
    assert columns["episode/reward"] == rewards
    assert columns["episode/moves"] == [moves] * len(rewards)
    said = [[message["content"] for message in talk] for talk in found.messages]
    assert said[0][:2] == ["5:", texts[0]]
    if len(said) > 1:
        assert said[1] == ["2:", texts[1]]
