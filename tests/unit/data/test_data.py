"""Datasets to prompts: every format, every prompt form, every mistake named before a model is loaded."""

from __future__ import annotations

import json

import pytest

from hf_rlhf.config.sections import Dataset
from hf_rlhf.data.prompt_stream import PromptStream
from hf_rlhf.data.prompts import check_columns, load_prompts, read_columns
from tests.helpers.chats import chat_tokenizer

ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(30)]


def write(path, rows=ROWS):
    import csv

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def prompts_of(tokenizer, rows, **settings):
    return load_prompts(Dataset(**{"held_out": 0, **settings}), tokenizer, train=rows)[0]


# loading


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_file_format_gives_the_same_prompts(tmp_path, tokenizer, suffix, streaming):
    settings = Dataset(path=write(tmp_path / f"rows.{suffix}"), held_out=0, streaming=streaming)
    train, evaluation = load_prompts(settings, tokenizer)
    assert evaluation is None
    prompts = list(train)
    assert [prompt.prompt for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert [prompt.columns for prompt in prompts] == [{"answer": row["answer"]} for row in ROWS]
    assert tokenizer.decode(prompts[3].ids) == "say 3"
    assert read_columns(settings) == ({"answer"}, None if streaming else 30, 0)


def test_csv_values_stay_as_they_are_written(tmp_path, tokenizer):
    rows = [{"prompt": "a", "answer": "007"}, {"prompt": "b", "answer": ""}, {"prompt": "c", "answer": "1.50"}]
    train, _ = load_prompts(Dataset(path=write(tmp_path / "rows.csv", rows)), tokenizer)
    assert [prompt.columns["answer"] for prompt in train] == ["007", "", "1.50"]


def test_json_values_stay_as_they_are_written(tmp_path, tokenizer):
    answers = ["2020-01-01", "007", 7, 1.5, None, ["a"], {"b": None}, True]
    for suffix in ("json", "jsonl"):
        path = write(tmp_path / f"rows.{suffix}", [{"prompt": "a", "answer": answer} for answer in answers])
        train, _ = load_prompts(Dataset(path=path, held_out=0), tokenizer)
        assert [prompt.columns["answer"] for prompt in train] == answers


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_one_of_the_columns_have_none_there(tmp_path, tokenizer, streaming):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "c"}])
    train, _ = load_prompts(Dataset(path=path, held_out=0, streaming=streaming), tokenizer)
    assert [prompt.columns for prompt in train] == [{"answer": "b"}, {"answer": None}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', r"rows\.json, line 3: not JSON"),
        ('{"prompt": "a"}\n3\n', "line 2: must be an object with named columns, got a int"),
        ('[{"prompt": "a"}, "b"]', "row 2: must be an object with named columns, got a str"),
        ('[{"prompt": "a"}', "not JSON"),
    ],
)
def test_broken_json_is_named_by_its_line(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_columns(Dataset(path=str(path)))


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_saved_by_datasets_are_read_with_their_splits(tmp_path, tokenizer, streaming):
    from datasets import Dataset as Rows
    from datasets import DatasetDict

    Rows.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Rows.from_list(ROWS[:20]), test=Rows.from_list(ROWS[20:])).save_to_disk(tmp_path / "both")
    options = {"streaming": streaming, "held_out": 0}
    train, _ = load_prompts(Dataset(path=str(tmp_path / "one"), **options), tokenizer)
    assert len(list(train)) == 30
    train, evaluation = load_prompts(Dataset(path=str(tmp_path / "both"), eval_split="test", **options), tokenizer)
    assert (len(list(train)), len(list(evaluation))) == (20, 10)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, test"):
        load_prompts(Dataset(path=str(tmp_path / "both"), split="dev"), tokenizer)


def test_a_folder_of_files_is_read_as_datasets_reads_it(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", ROWS[:20])
    write(tmp_path / "test.jsonl", ROWS[20:])
    train, evaluation = load_prompts(Dataset(path=str(tmp_path), eval_split="test"), tokenizer)
    assert (len(train), len(evaluation)) == (20, 10)


def test_rows_given_in_python_need_no_path(tokenizer):
    from datasets import Dataset as Rows

    for rows in (ROWS, Rows.from_list(ROWS), Rows.from_list(ROWS).to_iterable_dataset()):
        train, evaluation = load_prompts(Dataset(held_out=0), tokenizer, train=rows, evaluation=ROWS[:2])
        assert [prompt.columns["answer"] for prompt in train] == [row["answer"] for row in ROWS]
        assert len(evaluation) == 2


def test_the_builtin_task_comes_with_its_held_out_problems(tokenizer):
    train, evaluation = load_prompts(Dataset(path="builtin:addition"), tokenizer)
    assert (len(train), len(evaluation)) == (7588, 512)
    assert read_columns(Dataset(path="builtin:addition")) == ({"answer"}, 7588, 512)
    with pytest.raises(ValueError, match=r"dataset\.split does not apply to builtin:addition"):
        read_columns(Dataset(path="builtin:addition", split="test"))


# evaluation


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (2, 2), (64, 3)])
def test_held_out_rows_are_at_most_a_tenth_and_not_trained_on(tokenizer, count, expected):
    train, evaluation = load_prompts(Dataset(held_out=count), tokenizer, train=ROWS)
    held_out = [prompt.prompt for prompt in evaluation or []]
    assert len(held_out) == expected
    assert sorted(held_out + [prompt.prompt for prompt in train]) == sorted(row["prompt"] for row in ROWS)
    again = load_prompts(Dataset(held_out=count), tokenizer, train=ROWS)[1]
    assert held_out == [prompt.prompt for prompt in again or []]


def test_a_stream_holds_out_its_first_rows(tmp_path, tokenizer):
    settings = Dataset(path=write(tmp_path / "rows.jsonl"), streaming=True, held_out=4)
    train, evaluation = load_prompts(settings, tokenizer)
    assert [prompt.prompt for prompt in evaluation] == ["say 0", "say 1", "say 2", "say 3"]
    assert len(list(train)) == len(list(train)) == 26


def test_evaluation_data_of_its_own_leaves_the_training_rows_whole(tmp_path, tokenizer):
    evaluation_path = write(tmp_path / "eval.csv", ROWS[:5])
    settings = Dataset(path=write(tmp_path / "rows.jsonl"), eval_path=evaluation_path)
    train, evaluation = load_prompts(settings, tokenizer)
    assert (len(train), len(evaluation)) == (30, 5)


def test_columns_for_rewards_are_those_that_evaluation_has_too(tmp_path):
    path = write(tmp_path / "eval.jsonl", [{"prompt": "a", "level": 1, "answer": "b"}])
    assert read_columns(Dataset(eval_path=path), train=[{"prompt": "a", "topic": "c", "answer": "b"}])[0] == {"answer"}


# prompt forms

TALK = [{"role": "user", "content": "hi"}]


def test_a_template_is_filled_from_columns_and_leaves_them_to_the_rewards(tokenizer):
    rows = [{"question": "1+1?", "answer": "2"}]
    (prompt,) = prompts_of(tokenizer, rows, prompt_template="Q: {question}\nA:")
    assert prompt.prompt == tokenizer.decode(prompt.ids) == "Q: 1+1?\nA:"
    assert prompt.columns == rows[0]


def test_messages_go_through_the_chat_template(chat_tokenizer):
    (prompt,) = prompts_of(chat_tokenizer, [{"prompt": TALK, "answer": "x"}])
    assert prompt.prompt == TALK
    assert chat_tokenizer.decode(prompt.ids) == "<|user|>hi\n<|assistant|>"


def test_an_open_assistant_turn_goes_on(chat_tokenizer):
    (prompt,) = prompts_of(chat_tokenizer, [{"prompt": [*TALK, {"role": "assistant", "content": "Well,"}]}])
    assert chat_tokenizer.decode(prompt.ids) == "<|user|>hi\n<|assistant|>Well,"


def test_chat_wraps_text_with_the_system_message_before_it(chat_tokenizer):
    (prompt,) = prompts_of(chat_tokenizer, [{"prompt": "hi"}], chat=True, system="be kind")
    assert prompt.prompt == [{"role": "system", "content": "be kind"}, *TALK]
    assert chat_tokenizer.decode(prompt.ids) == "<|system|>be kind\n<|user|>hi\n<|assistant|>"


def test_text_gets_the_tokenizers_special_tokens_and_chats_only_their_templates():
    from hf_rlhf.data.addition_task import addition_tokenizer

    tokenizer = addition_tokenizer()
    (text,) = prompts_of(tokenizer, [{"prompt": "1+1="}])
    assert text.ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (chat,) = prompts_of(tokenizer, [{"prompt": "1+1="}], chat=True)
    assert chat.ids == text.ids[1:]


def test_the_problems_of_gsm8k_load_with_a_template(gsm8k, tokenizer):
    settings = Dataset(
        path=str(gsm8k / "train.jsonl"), eval_path=str(gsm8k / "test.jsonl"), prompt_template="{question}\nAnswer:"
    )
    train, evaluation = load_prompts(settings, tokenizer)
    assert (len(train), len(evaluation)) == (25, 25)
    assert train[0].prompt.startswith("Natalia sold clips")
    assert train[0].columns["answer"].endswith("#### 72")
    assert len(PromptStream(train).next(8)) == 8


# mistakes


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "the dataset has no rows"),
        ([{"text": "a", "answer": "b"}], {}, "no column 'prompt'; the dataset has: answer, text"),
        (ROWS, {"prompt_template": "{question} {answer}"}, "prompt_template: there is no column 'question'"),
        ([*ROWS, {"prompt": "", "answer": "x"}], {}, "the prompt of row 31 is empty"),
        ([*ROWS, {"prompt": " \n", "answer": "x"}], {}, "the prompt of row 31 is empty"),
        ([*ROWS, {"prompt": None, "answer": "x"}], {}, "the prompt of row 31 is empty"),
        ([*ROWS, {"prompt": "half \ud83d", "answer": "x"}], {}, "the prompt of row 31 must be valid Unicode"),
        ([*ROWS, {"prompt": "\udc00", "answer": "x"}], {"chat": True}, "the prompt of row 31 must be valid Unicode"),
        ([{"prompt": []}], {}, "the prompt of row 1 is empty"),
        ([{"prompt": "a", "b": None}], {"prompt_template": "{b}"}, "row 1 is empty .column 'b'"),
        (
            [{"prompt": 3}],
            {},
            r"row 1 \(the first is 1\): the prompt must be a text or a list of messages with role and content, got 3",
        ),
        ([{"prompt": ["a"]}], {}, "the prompt, message 1: must have role and content, got 'a'"),
        ([{"prompt": TALK}, {"prompt": "a"}], {}, "prompts must be all text or all chat messages, got both"),
        ([{"prompt": TALK}], {"chat": True}, r"dataset\.chat wraps text prompts"),
        ([{"prompt": "a"}], {"system": "b"}, r"dataset\.system requires chat prompts"),
        ([{"prompt": [{"role": "system", "content": "a"}]}], {"system": "b"}, "row 1 has a system message of its own"),
        ([{"prompt": "123456"}], {"max_prompt_tokens": 5}, "row 1 has 6 tokens and 5 are allowed"),
        ([{"prompt": "123456"}], {"max_prompt_tokens": 5, "overlong_prompts": "drop"}, "all 1 prompts of the dataset"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(chat_tokenizer, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(chat_tokenizer, rows, **settings)


def test_row_numbers_are_the_files_also_when_rows_are_held_out(tokenizer):
    rows = [*ROWS, {"prompt": "", "answer": ""}]
    with pytest.raises(ValueError, match="row 31 is empty"):
        load_prompts(Dataset(held_out=3), tokenizer, train=rows)


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"require a chat template, and the tokenizer has none: set model\.chat_template"
    ):
        prompts_of(tokenizer, [{"prompt": TALK}])


def test_longer_prompts_can_be_dropped_with_a_count(tokenizer, caplog):
    rows = [{"prompt": "a" * length, "answer": length} for length in range(1, 9)]
    settings = Dataset(held_out=0, max_prompt_tokens=6, overlong_prompts="drop")
    train, _ = load_prompts(settings, tokenizer, max_prompt_tokens=5, train=rows)
    assert [(len(prompt.ids), prompt.columns["answer"]) for prompt in train] == [(n, n) for n in range(1, 6)]
    assert "3 of 8 prompts are longer than 5 tokens: dropped" in caplog.text


def test_tools_take_room_of_conversations_and_none_of_texts():
    rows = [{"prompt": [{"role": "user", "content": "a" * length}]} for length in range(1, 9)]
    settings, tokenizer = Dataset(held_out=0, overlong_prompts="drop"), chat_tokenizer("printing")
    lengths = [len(prompt.ids) for prompt in load_prompts(settings, tokenizer, train=rows)[0]]
    bounds = {"max_prompt_tokens": lengths[-1], "tool_tokens": 3}
    fitting, _ = load_prompts(settings, tokenizer, train=rows, **bounds)
    assert [len(prompt.ids) for prompt in fitting] == lengths[:5]
    assert fitting.longest == lengths[-4] + 3
    with pytest.raises(
        ValueError, match=rf"has {lengths[5]} tokens and {lengths[4]} are allowed beside 3 of the tools"
    ):
        load_prompts(Dataset(held_out=0), tokenizer, train=rows, **bounds)
    texts, _ = load_prompts(settings, tokenizer, train=[{"prompt": "a" * lengths[-1]}], **bounds)
    assert texts.longest == lengths[-1]


def test_places_without_a_dataset_are_named(tmp_path, tokenizer):
    (tmp_path / "rows.txt").write_text("a")
    for settings, message in (
        (Dataset(), r"no dataset: set dataset\.path"),
        (Dataset(path="missing.jsonl"), r"no dataset file or folder missing\.jsonl"),
        (Dataset(path=str(tmp_path / "missing")), "no dataset file or folder"),
        (Dataset(path=str(tmp_path / "rows.txt")), r"must end in \.json, \.jsonl, \.csv, \.parquet, got '\.txt'"),
        (Dataset(path=write(tmp_path / "a.jsonl"), split="test"), "a file has one split, 'train', got 'test'"),
        (Dataset(path=write(tmp_path / "bad.jsonl", [])), "the dataset has no rows"),
        (Dataset(path=write(tmp_path / "a.jsonl"), name="main"), r"dataset\.name does not apply"),
    ):
        with pytest.raises(ValueError, match=message):
            read_columns(settings)


def test_columns_that_rewards_read_are_checked():
    from hf_rlhf_plugins.rewards.exact_match import ExactMatch
    from hf_rlhf_plugins.rewards.format import Format

    check_columns({"answer"}, [ExactMatch(), Format()])
    with pytest.raises(ValueError, match=r"rewards\.exact_match reads truth: the dataset has answer, level"):
        check_columns({"answer", "level"}, [ExactMatch(column="truth")])


def test_a_misspelt_parameter_of_a_reward_function_names_file_function_and_near_names(tmp_path):
    from hf_rlhf_plugins.rewards.function import Function

    file = tmp_path / "mine.py"
    file.write_text("def brevity(completion, anwser, level, x=1): return [0.0]")
    with pytest.raises(ValueError) as refused:
        check_columns({"answer", "level"}, [Function(function=f"{file}:brevity", when={"levl": 3})])
    function = f"reward function {file}:brevity reads"
    assert str(refused.value) == (
        f"{function} anwser (Did you mean 'answer'?); {function} completion (Did you mean 'completions' or "
        "'completion_ids'?); rewards.function.when reads levl (Did you mean 'level'?): the dataset has answer, level"
    )
