"""Who offers what: metadata without imports, provenance, clashes, broken and misspelt plugins, one-off files."""

from __future__ import annotations

import hashlib
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hf_rlhf import API_VERSION, __version__, load_plugin
from hf_rlhf.axes import AXES
from hf_rlhf.batch import Completions, Rollouts, Scored
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.discovery import PluginError
from hf_rlhf.registry.host import Host, get_host, use_host
from hf_rlhf.registry.settings_schema import describe
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import conformance
from tests.helpers import environments
from tests.helpers.paths import ROOT

SIGN = '''
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator


@dataclass(kw_only=True)
class Mine(AdvantageEstimator):
    """The sign of the return."""

    name = "mine"

    scale: float = 1.0
    """Factor."""

    def __call__(self, scored):
        return self.scale * scored.returns().sign().unsqueeze(1) * scored.mask


@hookimpl
def advantages():
    return [Mine]
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with entry points on the path, as an installer leaves it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def add(package, version, points, modules, folder=site):
        info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for name, text in modules.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return info

    yield add
    for name in set(sys.modules) - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def one(install, source, *, package="foreign", version="1.2", points=None):
    """A package with one module, offering `advantages.mine` unless said otherwise."""
    module = package.replace("-", "_") + "_plugin"
    points = dict.fromkeys(points or ["advantages.mine"], module)
    install(package, version, {"hf_rlhf": points}, {f"{module}.py": source})
    return Host(disable="")


# Hooks and their examples


def test_there_is_one_hook_per_axis():
    hooks = [name for name, value in vars(hookspecs).items() if getattr(value, "hf_rlhf_spec", None) is not None]
    assert sorted(hooks) == sorted(AXES)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes))


def scored(**more):
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    return Scored(mask=mask, token_rewards=rewards, group_ids=torch.tensor([4, 4]), **more)


def runs_rollout(plugin, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from hf_rlhf.batch import Prompt
    from hf_rlhf.modeling.policy import Policy

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    policy = Policy(model=tiny_llama(), tokenizer=tokenizer, device=torch.device("cpu"))
    tokenizer.eos_token = "b"
    done = plugin(policy, [Prompt(ids=[0], prompt="a", columns={})], 3)
    assert isinstance(done, Completions)
    for ids, reason in zip(done.ids, done.finish_reasons, strict=True):
        assert ids.count(1) == (reason == "stop")
        assert reason == "stop" or len(ids) == plugin.max_new_tokens
    first, *others = plugin(policy, [Prompt(ids=[0], prompt="a", columns={})], 3, temperature=0).ids
    assert others == [first, first]


def runs_sync(plugin, tmp_path):
    import asyncio

    from hf_rlhf.axes import Weights
    from hf_rlhf.modeling.policy import Policy
    from hf_rlhf.testing import tiny_policy

    class Server:
        url = "http://127.0.0.1:8000"
        called: tuple[str, ...] = ()

        async def call(self, *said, repeat=True):
            self.called = said
            return []

    model, tokenizer = tiny_policy()
    policy, server = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu")), Server()
    plugin.path = str(tmp_path)
    plugin.collect(Weights(policy=policy, named=lambda: iter(model.state_dict().items())))
    asyncio.run(plugin.send(server))
    assert server.called == ("hf_rlhf_load", str(tmp_path / "8000"))
    loaded = type(model).from_pretrained(server.called[1]).state_dict()
    assert all(torch.equal(loaded[name].float(), x.bfloat16().float()) for name, x in model.state_dict().items())


def runs_rewards(plugin, tmp_path):
    rollouts = Rollouts(
        prompts=["p"] * 3,
        completions=["one", "two\nlines", " "],
        prompt_ids=[[1]] * 3,
        completion_ids=[[2]] * 3,
        masks=[[1]] * 3,
        finish_reasons=["stop"] * 3,
    )
    assert plugin(rollouts) == [1.0, 0.0, 0.0]


def runs_environment(plugin, tmp_path):
    played = environments.play(plugin, environments.Says(texts=("no", "yes")), columns={"answer": ["yes"]})
    assert played.completions.columns["episode/turn_rewards"] == [[0.0, 0.5]]
    assert [message["content"] for message in played.messages[0]] == ["ab", "no", "no ab", "yes"]


def runs_kl(plugin, tmp_path):
    assert plugin.loss_penalty(torch.tensor([0.0, 1.01])).tolist() == pytest.approx([0.0, 0.1])
    assert plugin.estimator.name == "k3"


def runs_kl_estimator(plugin, tmp_path):
    p, q = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    mean = (p * plugin(p.log(), q.log())).sum()
    assert mean == pytest.approx(float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()))


def runs_kl_controller(plugin, tmp_path):
    assert plugin(0.5) == 0
    for _ in range(5):
        plugin.observe({})
    assert plugin(0.5) == 0.25
    assert plugin.state_dict() == {"rollouts": 5}


def runs_baseline(plugin, tmp_path):
    returns = scored().returns()
    assert plugin(scored()).squeeze(1).tolist() == [returns.min()] * len(returns)


def runs_advantages(plugin, tmp_path):
    assert plugin(scored()).tolist() == [[-1, -1, 0], [1, 1, 1]]


def runs_critic(plugin, tmp_path):
    from hf_rlhf.modeling.policy import ActorCritic
    from hf_rlhf.modeling.token_batch import TokenBatch

    policy = tiny_llama()
    plugin.start = 0.25
    model = ActorCritic(policy, plugin.build(policy, None), 1.0)
    mask = torch.tensor([[1.0, 1.0]])
    values = model(TokenBatch([[1, 2]], [[3, 4]], mask, 0), values=True)["values"]
    assert values.tolist() == [[0.25, 0.25]]


def runs_policy_loss(plugin, tmp_path):
    logps = torch.tensor([[-1.0]], requires_grad=True)
    loss, metrics = plugin(logps, torch.tensor([[-1.0]]), torch.tensor([[2.0]]), torch.ones(1, 1))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert slope.item() == pytest.approx(-2.0)
    assert metrics["move"].item() == 0


def runs_rollout_correction(plugin, tmp_path):
    near_and_far = torch.tensor([[0.0, 1.0, -1.0]])
    assert plugin(near_and_far, torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [[1, 0, 0]]


def runs_reference(plugin, tmp_path):
    policy = tiny_llama()
    plugin.first = 2
    model = plugin.build(policy)
    assert not any(weight.requires_grad for weight in model.parameters())
    copied = []
    for step in range(1, 17):
        torch.nn.init.constant_(policy.lm_head.weight, step)
        plugin.move(model, policy, step)
        copied += [step] if model.lm_head.weight[0, 0] == step else []
    assert copied == [2, 4, 8, 16]


def runs_optimizer(plugin, tmp_path):
    layer = torch.nn.Linear(1, 1, bias=False)
    critic = torch.nn.Parameter(torch.ones(1))
    plugin.learning_rate = 0.5
    made = plugin.build(layer, [{"params": [critic], "lr": 0.25}])
    before = layer.weight.item()
    (layer(torch.ones(1, 1)).sum() + critic.sum()).backward()
    made.step()
    assert layer.weight.item() == pytest.approx(before - 0.5)
    assert critic.item() == pytest.approx(0.75)


def runs_aggregation(plugin, tmp_path):
    assert plugin(scored().mask).sum().item() == pytest.approx((2**0.5 + 3**0.5) / 2)


def runs_loss_terms(plugin, tmp_path):
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert plugin(torch.zeros(1, 3), mask, entropy=torch.tensor([[0.0, 9.0, 0.0]])).tolist() == [
        [pytest.approx(1e-3), 0, 0]
    ]


def runs_sampler(plugin, tmp_path):
    import random

    plugin.start, plugin.more = 4, 2
    assert sorted(plugin.next(4, 100, random.Random(0))) == [0, 1, 2, 3]
    plugin.observe([0, 1], [0.4, float("nan")])
    assert sorted(plugin.next(6, 100, random.Random(0))) == [*range(6)]
    assert sorted(plugin.next(5, 5, random.Random(0))) == [*range(5)]


def runs_filters(plugin, tmp_path):
    plugin.tokens = 3
    assert plugin(scored()).tolist() == [False, True]


def runs_trainer(plugin, tmp_path):
    from hf_rlhf.testing import tiny_policy

    tokenizer = tiny_policy()[1]
    row = plugin.encode({"prompt": "1+2=", "completion": "3"}, tokenizer)
    assert row["labels"] == [-100] * 4 + row["input_ids"][4:]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    plugin.learn_prompt = True
    assert plugin.encode({"prompt": "1+2=", "completion": "3"}, tokenizer)["labels"] == row["input_ids"]


def runs_doctor(plugin, tmp_path):
    from hf_rlhf.metrics.doctor import Doctor

    doctor = Doctor({}, {}, [plugin])
    assert not [x for step in range(1, 5) for x in doctor.add(step, {"rollout/length/min": 2, "rollout/length/max": 2})]
    (finding,) = doctor.add(5, {"rollout/length/min": 2, "rollout/length/max": 2})
    assert (finding.pattern, finding.step, finding.text) == ("one_length", 5, "All completions have 2 tokens.")


@pytest.mark.parametrize("axis", AXES)
def test_the_example_of_each_hook_is_a_complete_plugin(axis, tmp_path):
    file = tmp_path / f"example_{axis}.py"
    file.write_text(hookspecs.example(axis))
    host = Host(disable="")
    (offer,) = host.add_file(file)
    assert offer.axis == axis
    with use_host(host):
        plugin = load_plugin(axis, offer.name)
        for fact in conformance(plugin):
            fact()
    assert all(setting.doc for setting in describe(type(plugin)))
    globals()[f"runs_{axis}"](plugin, tmp_path)


# Listing


def test_every_built_in_is_offered_by_its_entry_point_and_passes_the_checks():
    host = Host(disable="")
    for offer in host.offers():
        if offer.package == "hf_rlhf":
            assert host.get(offer.axis, f"hf_rlhf/{offer.name}").name == offer.name


def test_offers_come_in_the_order_of_the_step():
    axes = list(dict.fromkeys(offer.axis for offer in Host(disable="").offers() if offer.axis in AXES))
    assert axes == [axis for axis in AXES if axis in axes]


def test_a_package_that_nobody_names_is_never_run(install, tmp_path):
    install(
        "hostile",
        "6.6",
        {"hf_rlhf": {"rewards.bad": "hostile_pkg.plugin"}, "hf_rlhf.recipes": {"hostile": "hostile_pkg.recipes"}},
        {
            "hostile_pkg/__init__.py": f"open({str(tmp_path / 'ran')!r}, 'w')",
            "hostile_pkg/plugin.py": "raise SystemExit(0)",
            "hostile_pkg/recipes/__init__.py": "raise SystemExit(0)",
            "hostile_pkg/recipes/evil.yaml": "# Evil.\nrewards: []\n",
        },
    )
    host = Host(disable="")
    assert "bad" in host.names("rewards")
    assert [(r.name, r.summary) for r in host.recipes() if r.package == "hostile"] == [("evil", "Evil.")]
    assert host.get("advantages", "group_norm").name == "group_norm"
    assert not (tmp_path / "ran").exists()
    assert not any(name.startswith("hostile_pkg") for name in sys.modules)


def test_a_distribution_found_twice_is_listed_once(install, tmp_path, monkeypatch):
    one(install, SIGN)
    second = tmp_path / "second"
    install("Foreign", "1.2", {"hf_rlhf": {"advantages.mine": "foreign_plugin"}}, {}, folder=second)
    monkeypatch.syspath_prepend(str(second))
    assert [offer.name for offer in Host(disable="").offers("advantages") if offer.name == "mine"] == ["mine"]


def test_wrong_entry_points_are_listed_as_problems_and_stop_nothing(install):
    points = {"advantage.mine": "m", "nodot": "m", "advantages.call": "m:function"}
    install("crooked", "0.1", {"hf_rlhf": points}, {})
    unreadable = install("unreadable", "0.2", {"hf_rlhf": {"rewards.x": "m"}}, {})
    (unreadable / "entry_points.txt").write_text("[hf_rlhf]\nno equals sign\n")
    host = Host(disable="")
    problems = {offer.axis + "." + offer.name: offer.problem for offer in host.offers() if offer.package == "crooked"}
    assert problems["advantage.mine"] == "unknown axis 'advantage'. Did you mean 'advantages'?"
    assert "must be written axis.name" in problems["nodot."]
    assert "must name a module" in problems["advantages.call"]
    assert [offer.package for offer in host.offers() if "invalid entry points" in (offer.problem or "")] == [
        "unreadable"
    ]
    assert "call" not in host.names("advantages")
    assert host.get("advantages", "gae").name == "gae"


# Choosing


def test_an_unknown_name_gets_the_nearest_and_all_choices():
    with pytest.raises(PluginError) as error:
        Host(disable="").get("advantages", "group_nrom")
    text = str(error.value)
    assert text.startswith(
        "no advantages plugin named 'group_nrom'. Did you mean 'group_norm'? There are: baseline, function, gae, "
    )
    with pytest.raises(PluginError, match=r"no axis named 'advantage'\. Did you mean 'advantages'"):
        Host(disable="").get("advantage", "gae")


def test_a_foreign_plugin_is_chosen_like_a_built_in(install):
    host = one(install, SIGN)
    cls = host.get("advantages", "mine")
    assert host.get("advantages", "foreign/mine") is cls
    with use_host(host):
        plugin = load_plugin("advantages", "mine", scale="2.5")
    assert plugin(scored()).tolist() == [[2.5, 2.5, 0], [2.5, 2.5, 2.5]]


def test_a_name_of_two_packages_is_an_error_only_when_it_is_said_without_its_package(install):
    one(install, SIGN, package="first-pkg", version="1.0")
    host = one(install, SIGN, package="second", version="2.5")
    assert host.get("advantages", "gae").name == "gae"
    with pytest.raises(PluginError) as error:
        host.get("advantages", "mine")
    assert "first-pkg 1.0 and second 2.5" in str(error.value)
    assert "`first-pkg/mine` or `second/mine`" in str(error.value)
    assert host.get("advantages", "First_Pkg/mine").__module__ == "first_pkg_plugin"
    assert host.get("advantages", "second/mine").__module__ == "second_plugin"
    with pytest.raises(PluginError, match=r"no advantages plugin named 'third/mine'.*offered by first-pkg 1.0 and sec"):
        host.get("advantages", "third/mine")


def test_a_foreign_package_cannot_replace_a_built_in_silently(install):
    host = one(install, SIGN.replace('"mine"', '"gae"'), points=["advantages.gae"])
    with pytest.raises(PluginError, match="hf_rlhf/gae"):
        host.get("advantages", "gae")
    assert host.get("advantages", "hf_rlhf/gae").__module__ == "hf_rlhf_plugins.advantages.gae"


@pytest.mark.parametrize("raised", ["ImportError('no such thing')", "SystemExit(0)"])
def test_a_broken_plugin_names_package_version_entry_point_and_cause(install, raised):
    host = one(install, f"raise {raised}")
    with pytest.raises(PluginError) as error:
        host.get("advantages", "mine")
    text = str(error.value)
    for part in ["foreign 1.2", '"advantages.mine" = "foreign_plugin"', raised.split("(")[0], "-p no:foreign"]:
        assert part in text
    assert error.value.__cause__ is not None
    assert host.get("advantages", "gae").name == "gae"


def test_a_misspelt_hook_gets_the_nearest_axis_and_harms_nobody_else(install):
    host = one(install, SIGN.replace("def advantages", "def advantage"))
    for _ in range(2):
        with pytest.raises(PluginError, match=r"foreign 1.2: .* a hook 'advantage'.* Did you mean 'advantages'\?"):
            host.get("advantages", "mine")
    assert host.get("advantages", "gae").name == "gae"


def test_hooks_are_asked_once_per_module_and_only_when_named(install, tmp_path):
    log = tmp_path / "log"
    two = SIGN.replace("return [Mine]", f"open({str(log)!r}, 'a').write('asked ')\n    return [Mine, Other]")
    two = two.replace("@hookimpl", "@dataclass(kw_only=True)\nclass Other(Mine):\n    name = 'other'\n\n\n@hookimpl")
    two += f"\n@hookimpl\ndef rewards():\n    open({str(log)!r}, 'a').write('rewards ')\n    return []\n"
    host = one(install, two, points=["advantages.mine", "advantages.other", "rewards.none"])
    assert host.get("advantages", "mine") is not host.get("advantages", "other")
    host.get("advantages", "mine")
    assert log.read_text() == "asked "


CROOKED = {
    "must define __call__": SIGN.replace("__call__", "call"),
    "subclass of hf_rlhf.axes.AdvantageEstimator": SIGN.replace("AdvantageEstimator", "RewardSource"),
    "decorated with @dataclass": SIGN.replace("@dataclass(kw_only=True)\n", ""),
    "@dataclass\\(kw_only=True\\)": SIGN.replace("@dataclass(kw_only=True)", "@dataclass"),
    "missing: scale": SIGN.replace('    """Factor."""\n', ""),
    "must have a name": SIGN.replace('    name = "mine"\n', ""),
    "needs must be a frozenset": SIGN.replace('"mine"\n', '"mine"\n    needs = "values"\n'),
    "import it outside of TYPE_CHECKING": SIGN.replace("scale: float", "scale: 'Gone'"),
    "must return a list of classes": SIGN.replace("return [Mine]", "return Mine"),
    "hook advantages .* fails: ZeroDivisionError": SIGN.replace("return [Mine]", "return [1 / 0]"),
    "offers other on advantages, and its entry points declare mine": SIGN.replace('"mine"', '"other"'),
    "has no hook for advantages": SIGN.replace("@hookimpl\n", ""),
    "has a hook for kl and no entry point": SIGN + "\n@hookimpl\ndef kl():\n    return []\n",
    "hooks take no arguments": SIGN.replace("def advantages()", "def advantages(config)"),
}


@pytest.mark.parametrize("message", CROOKED)
def test_a_plugin_that_does_not_fit_is_refused_by_package_and_version(install, message):
    host = one(install, CROOKED[message])
    with pytest.raises(PluginError, match=message) as error:
        host.get("advantages", "mine")
    assert str(error.value).startswith("foreign 1.2: ")


# Turning off and on


def test_what_is_turned_off_is_listed_with_its_reason_and_says_so_when_it_is_used(install):
    host = one(install, SIGN)
    host.configure(["no:Foreign", "no:advantages.gae"])
    for name, option in [("mine", "-p no:Foreign"), ("gae", "-p no:advantages.gae")]:
        assert name not in host.names("advantages")
        with pytest.raises(PluginError, match=f"cannot be used: turned off by {option}"):
            host.get("advantages", name)
    assert {o.name: o.problem for o in host.offers("advantages")}["mine"] == "turned off by -p no:Foreign"


def test_turning_off_one_of_two_packages_ends_the_clash(install):
    one(install, SIGN, package="first", version="1.0")
    host = one(install, SIGN, package="second", version="2.5")
    host.turn_off("first")
    assert host.get("advantages", "mine").__module__ == "second_plugin"


def test_the_environment_turns_plugins_off(install, monkeypatch):
    one(install, SIGN)
    monkeypatch.setenv("HF_RLHF_DISABLE_PLUGINS", "1")
    assert "mine" not in Host().names("advantages")
    assert "gae" in Host().names("advantages")
    monkeypatch.setenv("HF_RLHF_DISABLE_PLUGINS", "foreign, advantages.gae, not-installed")
    with pytest.raises(PluginError, match="turned off by HF_RLHF_DISABLE_PLUGINS="):
        Host().get("advantages", "gae")


def test_turning_off_what_is_not_there_is_an_error():
    with pytest.raises(UserError, match=r"Did you mean 'advantages\.gae'"):
        Host(disable="").configure(["no:advantages.gea"])
    with pytest.raises(UserError, match=r"write `-p FILE\.py`"):
        Host(disable="").configure(["my_package"])


# One-off files


def test_a_file_is_offered_with_its_path_and_hash(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SIGN)
    host = Host(disable="1")
    (offer,) = host.add_file(file)
    assert offer.source == f"file {file} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]})"
    assert host.add_file(file) == [offer]
    cls = host.get("advantages", "mine")
    assert describe(cls)[0].doc == "Factor."
    (row,) = host.manifest([cls])
    assert row["package"] == str(file)
    assert row["sha256"].startswith(row["version"])


def test_a_file_that_clashes_is_named_by_its_file_name_or_path(tmp_path):
    host = Host(disable="")
    for folder, name in [("a", "mine"), ("b", "gae")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(SIGN.replace('"mine"', f'"{name}"'))
        host.add_file(tmp_path / folder / "mine.py")
    with pytest.raises(PluginError, match=rf"file .*mine.py \(sha256 .*\) and hf_rlhf {__version__}"):
        host.get("advantages", "gae")
    assert host.get("advantages", "mine.py/gae").name == "gae"
    assert host.get("advantages", f"{tmp_path}/b/mine.py/gae").name == "gae"


def test_turning_a_built_in_off_lets_a_file_take_its_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SIGN.replace('"mine"', '"gae"'))
    for order in ([str(file), "no:advantages.gae"], ["no:advantages.gae", str(file)]):
        host = Host(disable="")
        host.configure(order)
        assert host.get("advantages", "gae").__doc__ == "The sign of the return."


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"file .*mine.py \(sha256 .*\) cannot be imported: ZeroDivisionError"),
        ("x = 1", "offers nothing: it has no function marked with @hookimpl"),
        (SIGN.replace("def advantages", "def advantagse"), "Did you mean 'advantages'"),
        (SIGN.replace('    """Factor."""\n', ""), "missing: scale"),
    ],
)
def test_a_file_that_does_not_work_is_refused_and_can_be_mended(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    host = Host(disable="")
    with pytest.raises(PluginError, match=message):
        host.add_file(file)
    file.write_text(SIGN)
    assert [offer.name for offer in host.add_file(file)] == ["mine"]
    with pytest.raises(UserError, match="no such file"):
        host.add_file(tmp_path / "gone.py")


# Recipes and records


def test_recipes_of_two_packages_clash_and_resolve_like_plugins(install):
    for package, version in [("one", "1.0"), ("two", "2.0")]:
        module = f"{package}_recipes"
        files = {f"{module}/__init__.py": "", f"{module}/grpo.yaml": f"# From {package}.\n"}
        install(package, version, {"hf_rlhf.recipes": {package: module}}, files)
    host = Host(disable="")
    with pytest.raises(PluginError, match=rf"'grpo' is offered by hf_rlhf {__version__} and one 1\.0 and two 2\.0"):
        host.find_recipe("grpo")
    assert host.find_recipe("two/grpo").summary == "From two."
    host.configure(["no:one", "no:two"])
    assert host.find_recipe("grpo").package == "hf_rlhf"
    with pytest.raises(PluginError, match=r"no recipe named 'gropo'\. Did you mean 'grpo'"):
        host.find_recipe("gropo")


def test_the_manifest_names_package_version_and_hash_of_each_plugin():
    host = Host(disable="")
    (row,) = host.manifest([host.get("advantages", "gae")])
    file = ROOT / "plugins" / "advantages" / "gae.py"
    assert row == {
        "axis": "advantages",
        "name": "gae",
        "package": "hf_rlhf",
        "version": __version__,
        "module": "hf_rlhf_plugins.advantages.gae",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def test_a_class_that_no_package_offers_is_recorded_without_one(tmp_path):
    from hf_rlhf.axes import Filter

    class Own(Filter):
        name = "own"

    (row,) = Host(disable="").manifest([Own])
    assert (row["axis"], row["name"], row["package"], row["version"]) == ("filters", "own", None, None)
    assert row["sha256"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_the_host_of_the_process_can_be_replaced_for_a_while():
    host = Host(disable="")
    before = get_host()
    with use_host(host):
        assert get_host() is host
    assert get_host() is before


# Plugin API


def test_a_folder_of_recipes_without_init_is_read(install):
    points = {"hf_rlhf": {"advantages.mine": "bare_pkg.plugin"}, "hf_rlhf.recipes": {"bare": "bare_pkg.recipes"}}
    files = {"bare_pkg/__init__.py": "", "bare_pkg/plugin.py": SIGN, "bare_pkg/recipes/signs.yaml": "# Signs.\n"}
    install("bare", "1.0", points, files)
    assert [recipe.name for recipe in Host(disable="").recipes() if recipe.package == "bare"] == ["signs"]


def api(*parts: int) -> str:
    return ".".join(map(str, parts))


MAJOR, MINOR = map(int, API_VERSION.split("."))


@pytest.mark.parametrize("said", [API_VERSION, api(MAJOR, 0)])
def test_a_plugin_of_this_api_or_an_older_minor_runs(install, said):
    host = one(install, f'hf_rlhf_api = "{said}"\n{SIGN}')
    assert host.get("advantages", "mine").name == "mine"


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (api(MAJOR, MINOR + 1), "install a newer hf_rlhf"),
        (api(MAJOR + 1, 0), "install a newer hf_rlhf"),
        (api(MAJOR - 1, 9), "install a foreign for API"),
    ],
)
def test_a_plugin_of_another_api_is_refused_before_it_is_imported(install, tmp_path, said, fix):
    host = one(install, f'open({str(tmp_path / "ran")!r}, "w")\nhf_rlhf_api = "{said}"\n{SIGN}')
    assert host.get("advantages", "gae").name == "gae"
    with pytest.raises(PluginError) as error:
        host.get("advantages", "mine")
    text = str(error.value)
    for part in (
        "advantages.mine",
        "foreign 1.2",
        f"plugin API {said}",
        f"hf_rlhf {__version__} has {API_VERSION}",
        fix,
    ):
        assert part in text
    assert not (tmp_path / "ran").exists()


def test_a_file_of_another_api_is_refused_before_it_runs(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f'hf_rlhf_api = "{api(MAJOR + 1, 0)}"\nraise SystemExit(0)\n')
    with pytest.raises(PluginError, match="was written for plugin API"):
        Host(disable="").add_file(file)


@pytest.mark.parametrize("said", ["1.0", '"one"', '"1"', "version()"])
def test_a_version_that_is_none_is_refused(install, said):
    host = one(install, f"hf_rlhf_api = {said}\n{SIGN}")
    with pytest.raises(PluginError, match="hf_rlhf_api must be a version such as"):
        host.get("advantages", "mine")


@pytest.mark.parametrize("requirement", ["hf_rlhf>=99", "hf-rlhf (<0.0.1)", 'HF.RLHF>=99; python_version > "3"'])
def test_a_package_that_requires_another_version_is_listed_as_a_problem_and_refused(install, requirement):
    one(install, SIGN)
    info = install("wanting", "2.0", {"hf_rlhf": {"rewards.wanted": "wanting_plugin"}}, {"wanting_plugin.py": ""})
    with (info / "METADATA").open("a") as file:
        file.write(f"Requires-Dist: {requirement}\nRequires-Dist: hf_rlhf_other>=99\n")
    host = Host(disable="")
    with pytest.raises(
        PluginError, match=rf"wanting 2.0 cannot be used: it requires hf_rlhf.*{__version__} is installed"
    ):
        host.get("rewards", "wanted")
    assert host.get("advantages", "mine").name == "mine"


@pytest.mark.parametrize("requirement", ["hf_rlhf", "hf_rlhf>=0.0.1", 'hf_rlhf>=99; extra == "later"'])
def test_a_requirement_that_holds_is_no_problem(install, requirement):
    info = install("wanting", "2.0", {"hf_rlhf": {"rewards.wanted": "wanting_plugin"}}, {"wanting_plugin.py": ""})
    with (info / "METADATA").open("a") as file:
        file.write(f"Requires-Dist: {requirement}\n")
    assert "wanted" in Host(disable="").names("rewards")


def test_a_hook_on_its_way_out_warns_its_author_and_breaks_nothing(tmp_path):
    """As pluggy has it: `warn_on_impl` of a hook that is still specified and no axis any more."""
    import warnings

    import pluggy

    hookspec = pluggy.HookspecMarker("hf_rlhf")

    class Old:
        @hookspec(warn_on_impl=DeprecationWarning("the hook scorers has become rewards in API 1.1"))
        def scorers(self):
            """What rewards were called."""

    file = tmp_path / "mine.py"
    file.write_text(SIGN + "\n\n@hookimpl\ndef scorers():\n    return []\n")
    host = Host(disable="")
    with pytest.raises(PluginError, match="has a hook 'scorers', which is not an axis"):
        host.add_file(file)
    host._manager.add_hookspecs(Old)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (offer,) = host.add_file(file)
    assert [str(each.message) for each in said] == ["the hook scorers has become rewards in API 1.1"]
    assert said[0].category is DeprecationWarning
    assert said[0].filename == str(file)
    assert host.get("advantages", "mine").name == offer.name == "mine"
