"""Advice can be pasted: what messages, remarks, closing hints and pages tell to type parses, and is accepted where it is said."""

from __future__ import annotations

import ast
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hf_rlhf.axes import AXES
from hf_rlhf.cli.app import app
from hf_rlhf.cli.commands.evaluate import split_models
from hf_rlhf.cli.commands.train import split_words
from hf_rlhf.cli.main import add_commands
from hf_rlhf.cli.runs import run
from hf_rlhf.cli.runs.next_steps import next_steps
from hf_rlhf.config.offline_sections import OFFLINE_SECTIONS
from hf_rlhf.config.pipeline import is_pipeline
from hf_rlhf.config.recipe import OfflineRecipe, load_plugin, load_recipe, read_recipe
from hf_rlhf.config.sections import SECTIONS, Dataset
from hf_rlhf.config.training_arguments import argument_names
from hf_rlhf.contract.metric import pattern
from hf_rlhf.metrics import metrics_of, metrics_of_trainer
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import setting_types
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.answers import RewardStartError
from hf_rlhf.scoring.runners.process_runner import packed_source
from hf_rlhf.testing import tiny_policy
from tests.helpers.ill_logs import LOGS, findings
from tests.helpers.paths import ROOT
from tests.helpers.tiers import tiers
from tests.helpers.verifiers import rows

VALUE = r"\[[^\]]*\]|\{[^}]*\}|[\w./-]*\w"
ADVICE = re.compile(rf"[a-z_]+(?:\.\w+)*=(?:{VALUE})(?:(?: and | )[a-z_]+(?:\.\w+)*=(?:{VALUE}))*")
"""One or more overrides that belong together."""


def advised(text: str) -> Iterator[list[str]]:
    """Yield what a message tells to set, one alternative at a time: what follows its last `set`."""
    _, told, rest = re.sub(r"\bSet\b", "set", text).rpartition(" set ")
    for found in ADVICE.finditer(rest if told else ""):
        yield re.findall(rf"[a-z_]+(?:\.\w+)*=(?:{VALUE})", found[0])


# Refusals

REFUSED = (
    ("grpo", "kl.0.estimator.use=k1"),
    ("grpo", "kl.0.beta=0"),
    ("ppo", "kl.0.beta=0"),
    ("grpo", "kl=[{use: in_advantage, beta: 0}]"),
    ("grpo", "kl=[{use: in_advantage, estimator: exact}]"),
    ("grpo", "kl=[{use: monitor}, {use: in_loss, estimator: k1}]"),
    ("grpo", "advantages.use=maxrl", "kl=[{use: monitor}, {use: in_reward}]"),
    ("grpo", "rewards=[]", "kl=[]", "reference.use=none"),
    ("grpo", "rewards=[]", "kl=[{use: monitor}]"),
    ("grpo", "rewards=[]", "advantages.use=remax"),
    ("grpo", "reference.use=none"),
    ("grpo", "kl=[]", "reference.use=frozen"),
    ("grpo", "advantages.use=gae"),
    ("ppo", "advantages.use=group_norm"),
    ("grpo", "critic.use=value_head"),
    ("grpo", "filters=[{use: duplicates, resample: 2}]"),
    ("grpo", "filters=[{use: opsm, resample: 1}]"),
    ("grpo", "kl=[{use: in_loss, estimator: exact, level: sequence}]"),
    ("grpo", "rollout={use: scripted}", "rollout_correction.use=truncated"),
    ("grpo", "loss_terms=[{use: entropy, coef: 0}]"),
    ("grpo", "evaluation.ema=true"),
    ("grpo", "model.save_merged=true"),
    ("grpo", "reference.use=adapter_off"),
    ("grpo", "model.load_in_4bit=true"),
    ("grpo", "model.bnb_4bit_quant_type=fp4", "model.lora={r: 16}"),
    ("trpo", "training.max_grad_norm=1"),
    ("trpo", "training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={use_reentrant: true}"),
    ("trpo", "policy_loss.use=dppo_tv"),
    ("ppo", "critic={use: value_head, layers: 0, hidden: 8}"),
    ("grpo", "rewards=[{use: reward_model, model: x, workers: processes}]"),
    ("grpo", "advantages.use=gae", "critic={use: separate, init: reward}"),
    ("grpo", "reference={use: ema, decay: 1}"),
    ("grpo", "reference={use: sync, mixing: 0}"),
    ("grpo", "policy_loss={use: cispo, bound: absolute, epsilon_high: 0.2}"),
    ("grpo", "rewards=[{use: regex, pattern: x, method: fullmatch, count: 2}]"),
    ("dpo", "trainer.reference=adapter_off"),
    ("dpo", "trainer.loss_type=exo_pair", "trainer.label_smoothing=0"),
)


def refusal(name: str, words: list[str]) -> list[str]:
    """The reasons why a recipe with these overrides is refused."""
    try:
        run.check(load_recipe(name, words), forecast=False)
    except UserError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.startswith(" ")] or [str(error)]
        return [line for line in lines if "pip install" not in line]  # this machine's, not the recipe's
    return []


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, *words in REFUSED], ids=map(" ".join, REFUSED))
def test_what_a_refusal_tells_to_set_is_accepted_there(name, words):
    reasons = refusal(name, words)
    assert reasons, "accepted"
    for reason in reasons:
        alternatives = list(advised(reason))
        assert alternatives or "set " not in reason.lower(), reason
        for each in alternatives:
            left = refusal(name, [*words, *each])
            assert reason not in left, (reason, each)
            assert set(left) <= set(reasons), (reason, each, left)


REMARKED = (
    ("ppo", "advantages={use: gae, whiten: false, ddof: 0}"),
    ("ppo", "update.epochs=2"),
    ("online_dpo", "update.epochs=2"),
    ("dr_grpo", "aggregation.length=7"),
    ("grpo", "kl=[{use: in_reward, estimator: k3}, {use: in_advantage, estimator: k2, level: sequence}]"),
    ("grpo", "kl=[{use: in_loss, estimator: k3, level: sequence, clamp: 5}]"),
    ("ppo", "critic={use: separate}", "model.lora={r: 4}"),
)


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, *words in REMARKED], ids=map(" ".join, REMARKED))
def test_what_a_remark_tells_to_set_is_accepted(name, words):
    for remark in run.check(load_recipe(name, words), forecast=False).remarks:
        for each in advised(remark):
            assert not refusal(name, [*words, *each]), (remark, each)
            after = run.check(load_recipe(name, [*words, *each]), forecast=False).remarks
            assert remark not in after, (remark, each)


# Texts of the code and of the pages

TELLS = re.compile(r"\b([Ss]et|[Uu]se|[Ww]rite|[Cc]hoose|[Ss]ave with|[Gg]ive|[Aa]dd) ")
PIECE = re.compile(r"(?<![\w.{`'/§-])([a-z_§][\w§]*(?:\.[\w§*]+)*)=(?=[\w§\[{.])")


def literals(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the string literals of a module, docstrings apart; `§` stands for what is filled in."""
    tree = ast.parse(file.read_text())
    inner = {id(x) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for x in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(x.value if isinstance(x, ast.Constant) else "§" for x in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def all_settings() -> dict[str, set[str]]:
    """Axis -> every setting of its built-in plugins."""
    host = get_host()
    return {
        axis: {"use", *(name for x in host.names(axis) for name in setting_types(host.get(axis, x)))} for axis in AXES
    }


def is_key(key: str, settings: dict[str, set[str]]) -> bool:
    """Whether a dotted key, `§` for anything, can be set in some recipe."""
    first, *rest = [part for part in key.split(".") if not part.isdigit()]
    if first.isupper():
        return True
    if first == "§":
        any_axis = any(is_key(".".join([axis, *rest]), settings) for axis in (*settings, *SECTIONS, "training"))
        return not rest or any_axis or is_key(".".join(rest), settings)
    if first == "training":
        return rest == [] or rest[0] in {*argument_names(), "§"}
    if first in SECTIONS:
        return not rest or rest[0] in {
            *setting_types(SECTIONS[first]),
            *setting_types(OFFLINE_SECTIONS.get(first, Dataset)),
            "§",
        }
    if first not in settings:  # the name of a stage
        return bool(rest) and is_key(".".join(rest), settings)
    return all(any(part in names for names in settings.values()) or part == "§" for part in rest)


CODE = [file for folder in ("hf_rlhf", "plugins") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_every_setting_that_a_message_tells_to_set_is_a_key_of_a_recipe():
    settings, wrong, found = all_settings(), [], 0
    for file in CODE:
        axis = file.relative_to(ROOT / "plugins").parts[0] if file.is_relative_to(ROOT / "plugins") else ""
        own = settings.get(axis, {"kw_only"})  # a plugin names its settings without their path
        for line, text in literals(file):
            for match in PIECE.finditer(text) if TELLS.search(text) else ():
                found += 1
                if match[1].split(".")[0] not in own and not is_key(match[1], settings):
                    wrong.append(f"{file.relative_to(ROOT)}:{line}: {match[0]}")
    assert wrong == []
    assert found > 60


YAML_LINE = re.compile(r"`[a-z_§]+(?:\.[\w§]+)*: [\w.-]+`")
"""A setting as a recipe file has it, which no command line takes."""


def test_no_message_tells_to_set_a_line_of_yaml():
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {match[0]}"
        for file in CODE
        for line, text in literals(file)
        if TELLS.search(text)
        for match in YAML_LINE.finditer(text)
    ]
    assert wrong == []
    assert YAML_LINE.search("Set `workers: inline`")


def test_what_a_reward_source_tells_to_set_is_an_override_of_its_recipe():
    words = ["rewards=[{use: length, target: 4, maximum: 8}, {use: numeric, column: reward_model}]"]
    source = load_recipe("grpo", words).plugins["rewards"][1]
    with pytest.raises(ValueError, match="mapping") as refused:
        source(rows(["1"], reward_model=[{"ground_truth": "1"}]))
    (told,) = next(advised(str(refused.value)))
    assert told == "rewards.1.column=reward_model.ground_truth"
    assert load_recipe("grpo", [*words, told]).plugins["rewards"][1].column == "reward_model.ground_truth"
    for made, setting in ((source, "rewards.1.workers=inline"), (load_plugin("rewards", "numeric"), "workers=inline")):
        made.when = {"task": threading.Lock()}  # cannot be pickled
        with pytest.raises(RewardStartError, match=f"set {setting}"):
            packed_source("mine", made, None)


def test_a_wrong_key_would_be_found():
    settings = all_settings()
    for wrong in ("estimator.use", "save_steps", "workers", "training.save_stepz", "kl.0.betta", "update.epoch"):
        assert not is_key(wrong, settings), wrong
    for right in (
        "kl.0.estimator.use",
        "kl.§.level",
        "training.save_steps",
        "ppo.model.path",
        "§.use",
        "dataset.columns",
    ):
        assert is_key(right, settings), right


# Command lines

COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )*hf-rlhf [^`]+)`")


def parsed(line: str) -> list[str]:
    """Parse a command line as the shell and `hf-rlhf` do, without running it; returns the words after the command's name.

    Raises a usage error for what is no command or no option.
    """
    add_commands()
    command: Any = typer.main.get_command(app)
    words = shlex.split(re.split(r" [>|] | 2>", line)[0], comments=True)
    context, rest = None, words[words.index("hf-rlhf") + 1 :]
    while True:
        context = command.make_context(command.name, list(rest), parent=context)
        left = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "commands") or not left:
            if context.ignore_unknown_options:  # flags of Trainer's among the words
                words = [*(context.params.get("words") or ()), *left]
                split_words(split_models(words)[1] if command.name == "evaluate" else words)
            return left
        _, command, rest = command.resolve_command(context, left)


def lines_of(page: Path) -> Iterator[str]:
    """Yield the command lines in the code blocks and the text of a page."""
    for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("hf-rlhf "):
                yield line
    yield from filter(goes_on, COMMAND.findall(page.read_text()))


def goes_on(line: str) -> bool:
    """Whether a text shows more of a command than its name, and no option that ends the program."""
    words = line.partition("hf-rlhf ")[2].split()
    named = len(words) == 1 or words in (["plugins", "check"], ["recipes", "show"])
    return not named and not words[-1].endswith(("help", "completion"))


def test_every_command_line_of_pages_and_messages_parses():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    lines = [(page, line) for page in pages for line in lines_of(page)]
    lines += [
        (file, m[1]) for file in CODE for _, text in literals(file) for m in COMMAND.finditer(text) if goes_on(m[1])
    ]
    wrong = []
    for place, line in lines:
        try:
            parsed(line)
        except Exception as error:  # typer may bring a click of its own
            if "no such file" not in str(error):  # the reader's own, after -p
                wrong.append(f"{place.relative_to(ROOT)}: {line}: {error}")
    assert wrong == []
    assert len(lines) > 60
    with pytest.raises(Exception, match="no command"):
        parsed("hf-rlhf trian grpo")
    for wrong in ("hf-rlhf train grpo --learning_rat 1e-6", "hf-rlhf check grpo kl.0.beta=0 --lora_rank=8"):
        with pytest.raises(UserError, match="no option --l"):
            parsed(wrong)


# Closing hints


def shipped() -> list[str]:
    return [entry.name for entry in get_host().recipes() if not is_pipeline(entry.name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output folder of a run, with a name that the shell would split."""
    made = tmp_path_factory.mktemp("runs") / "it's a run"
    model, tokenizer = tiny_policy()
    model.config.max_position_embeddings = 131072  # room for what recipes sample
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def teacher(name: str, folder: Any) -> list[str]:
    """The teacher that a run of the recipe must have named."""
    from_another = (read_recipe(name).get("reference") or {}).get("use") == "model"
    return [f'reference.path="{folder}"'] if from_another else []


@pytest.mark.parametrize("name", tiers({name: read_recipe(name) for name in shipped()}))
def test_what_a_run_tells_to_type_next_is_accepted(name, folder, monkeypatch):
    recipe = load_recipe(name, teacher(name, folder))
    (folder / "recipe.yaml").write_text(recipe.dump())
    plan = {"plugins": []}
    steps = next_steps(recipe, folder, plan)
    commands = [shlex.split(command) for command, _ in steps]
    assert all(words[0] == "hf-rlhf" for words in commands)
    offline = isinstance(recipe, OfflineRecipe)
    kinds = [words[1] for words in commands]
    assert kinds == (["check"] * bool(offline and recipe.trainer().reward) if offline else ["show", "check"]) + [
        "train"
    ]
    for _, kind, *words in commands:
        if kind == "show":
            assert words == ["advantages", recipe.plugins["advantages"].name]
            get_host().get(*words)
        elif kind == "check":
            run.check(load_recipe(words[0], words[1:]), forecast=False)
        else:
            assert words == [str(folder / "recipe.yaml"), "--model", str(folder)]
            again = load_recipe(
                words[0], [f"model.path={words[2]!r}" if "'" not in words[2] else f'model.path="{words[2]}"']
            )
            assert again.model.path == str(folder)
            run.check(again, forecast=False)


# Findings of the run doctor


OF_REWARDS = {"dead_reward", "length_explodes", "no_answer", "no_spread", "rewards_at_war"}


def watched(name: str) -> tuple[dict[str, Any], list[str]]:
    """A packaged recipe with every setting, and the patterns that can be found in its runs."""
    recipe = load_recipe(name)
    offline = isinstance(recipe, OfflineRecipe)
    declared = metrics_of_trainer(recipe.trainer()) if offline else metrics_of(recipe.algorithm())
    forms = [pattern(named.name) for named in declared]
    found = []
    for each, log in LOGS.items():
        about = next((metric for entry in log(recipe.raw) for metric in entry), "")
        if each in OF_REWARDS and not offline and not recipe.raw["rewards"]:
            continue
        if any(form.fullmatch(about) for form in forms):
            found.append(each)
    return dict(recipe.raw), found


@pytest.mark.parametrize("name", tiers({name: read_recipe(name) for name in shipped()}))
def test_what_a_finding_tells_to_type_is_accepted_one_by_one_and_together(name):
    raw, patterns = watched(name)
    assert patterns
    for each in patterns:
        found = findings(raw, LOGS[each](raw), each)
        assert found, each
        for words in {words for x in found for words in (x.overrides, *((word,) for word in x.overrides)) if words}:
            assert not refusal(name, list(words)), (each, words)
            assert each == "nothing_moves" or load_recipe(name, list(words)).raw != raw, (each, words)


def test_every_pattern_is_found_in_some_recipe_and_most_tell_what_to_type():
    reached, told = set(), set()
    for name in shipped():
        raw, patterns = watched(name)
        reached |= set(patterns)
        told |= {each for each in patterns for x in findings(raw, LOGS[each](raw), each) if x.overrides}
    assert reached == set(get_host().names("doctor"))
    assert told >= reached - {"out_of_range"}
