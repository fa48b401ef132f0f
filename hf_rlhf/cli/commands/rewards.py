"""`score` and `serve-reward`: reward sources without a training."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Annotated

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import Json, examples, output_to_stderr
from hf_rlhf.cli.output import table as print_table
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.plain_text import escaped

Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE_OR_REWARD",
        help="A recipe (name or YAML file) for all of its rewards, a reward plugin's name, or file.py:function.",
        autocompletion=completion.reward_or_recipe,
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides of the recipe, or settings of the reward (column=answer).",
        autocompletion=completion.reward_settings,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder or Hub name of the policy's tokenizer, for sources that read token ids."),
]


@app.command(
    short_help="Score existing completions.",
    epilog=examples(
        "hf-rlhf score exact_match column=answer --dataset solutions.jsonl",
        "hf-rlhf score grpo --dataset solutions.jsonl 'rewards.0.answer_after=####' --against is_correct",
        "hf-rlhf score rewards.py:brevity --dataset solutions.parquet --json > scores.json",
    ),
)
def score(
    name: Name,
    words: Words = None,
    dataset: Annotated[
        str, typer.Option("--dataset", "--dataset_name", help="File, folder or Hub name of prompts with completions.")
    ] = "",
    split: Annotated[str, typer.Option("--split", help="Split of the dataset.")] = "train",
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", help="Column of the prompts; the recipe's, or prompt.")
    ] = None,
    completion_column: Annotated[
        str, typer.Option("--completion-column", help="Column of the completions: text or chat messages.")
    ] = "completion",
    finish_reason_column: Annotated[
        str, typer.Option("--finish-reason-column", help="Optional column of finish reasons: stop or length.")
    ] = "finish_reason",
    against: Annotated[
        str | None, typer.Option("--against", help="Column of labels: numbers, true or false. Prints the agreement.")
    ] = None,
    tokenizer: Tokenizer = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Number of disagreements and failures to list.")] = 10,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Score existing completions without a policy; with --against, compare the scores with labels.

    Exits with 0 if no row failed, 1 if the scoring of any row failed, 2 for errors.
    """
    if not dataset:
        raise UserError(
            "score needs a dataset. Pass --dataset FILE, with prompt, completion and the columns that the rewards read"
        )
    from hf_rlhf.scoring.lookup import named_rewards
    from hf_rlhf.scoring.score_dataset import HEADER, Columns, remarks, table
    from hf_rlhf.scoring.score_dataset import as_json as plain
    from hf_rlhf.scoring.score_dataset import score as run

    columns = Columns(prompt=prompt_column, completion=completion_column, finish_reason=finish_reason_column)
    with output_to_stderr():
        rewards = named_rewards(name, words or ())
        scores = run(rewards, dataset, columns=columns, against=against, tokenizer=tokenizer, split=split)
    if as_json:
        print(json.dumps(plain(scores), allow_nan=False))
    else:
        print_table(HEADER, table(scores))
        said = "\n".join(map(escaped, remarks(scores, show))).strip("\n")
        print(f"\n{said}" if said else "", end="\n" if said else "")
    if scores.failed:
        raise typer.Exit(1)


@app.command(
    "serve-reward",
    short_help="Serve reward sources over HTTP.",
    epilog=examples(
        "hf-rlhf serve-reward exact_match column=answer --port 8765",
        "hf-rlhf serve-reward mine.yaml 'rewards.0.column=solution'",
        "hf-rlhf serve-reward rewards.py:brevity --host 0.0.0.0 --token-env REWARD_TOKEN",
    ),
)
def serve_reward(
    name: Name,
    words: Words = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 127.0.0.1 accepts only this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 8765,
    token_env: Annotated[
        str | None, typer.Option("--token-env", help="Environment variable with the token that requests must send.")
    ] = None,
    max_request_mib: Annotated[
        float, typer.Option("--max-request-mib", min=0.001, help="Largest request in MiB.")
    ] = 64.0,
    max_total_mib: Annotated[
        float, typer.Option("--max-total-mib", min=0.001, help="Largest sum of the requests of all clients in MiB.")
    ] = 256.0,
    concurrency: Annotated[
        int,
        typer.Option("--concurrency", min=1, help="Requests scored at a time; one for sources with workers=inline."),
    ] = 8,
    client_timeout: Annotated[
        float, typer.Option("--client-timeout", min=0.1, help="Seconds for a client to send a request, or to read.")
    ] = 30.0,
    tokenizer: Tokenizer = None,
    plugin: PluginOptions = None,
) -> None:
    """Serve reward sources over HTTP, for `rewards.remote`: POST /score/LABEL, GET /health. Ctrl-C ends it."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"serve-reward needs {error.name}: pip install 'hf_rlhf[serve]'") from error
    from hf_rlhf.scoring.lookup import named_rewards, scorer_of, tokenizer_of
    from hf_rlhf.scoring.server import Limits, ScoringQueue, app_of, listening, paths, serve

    if max_total_mib < max_request_mib:
        raise UserError(
            f"--max-total-mib must be at least --max-request-mib ({max_request_mib:g}), got {max_total_mib:g}"
        )
    limits = Limits(
        request_bytes=int(max_request_mib * 2**20), total_bytes=int(max_total_mib * 2**20), seconds=client_timeout
    )
    token = _token(token_env)
    rewards = named_rewards(name, words or ())
    chosen, kwargs = tokenizer_of(rewards, tokenizer), rewards.model.chat_template_kwargs
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(listening(host, port, token))
        scorers = {
            source[0]: stack.enter_context(scorer_of([source], chosen, kwargs, concurrency))
            for source in rewards.sources
        }
        desk = ScoringQueue(scorers, concurrency)
        served = app_of(desk, token=token, limits=limits)
        url = f"http://{f'[{host}]' if ':' in host else host}:{where.getsockname()[1]}"
        print(f"serving {', '.join(f'{url}{path}' for path in paths(list(scorers)))}", flush=True)
        serve(desk, served, where, limits)


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"--token-env {variable}: this environment variable is not set")
    return token
