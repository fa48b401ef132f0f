"""Find and make the plugins that the conformance kit checks."""

from __future__ import annotations

import shlex
from pathlib import Path
from unittest import SkipTest

from packaging.utils import canonicalize_name

from hf_rlhf.axes import Plugin
from hf_rlhf.registry.discovery import PluginEntry
from hf_rlhf.registry.host import Host
from hf_rlhf.registry.settings_schema import describe
from hf_rlhf.runtime.errors import UserError, did_you_mean


def entries_of(host: Host, target: str) -> list[PluginEntry]:
    """Return the plugins of a package or a file. Raise `UserError` if there are none."""
    if target.endswith(".py"):
        return host.add_file(target)
    installed = [offer for offer in host.offers() if not offer.file]
    found = [offer for offer in installed if canonicalize_name(offer.package) == canonicalize_name(target)]
    if not found and Path(target).is_dir():
        raise UserError(
            f"{target} is a folder. Install it with `pip install -e {shlex.quote(target)}` and check it by the name in its "
            "pyproject.toml, or pass its .py file"
        )
    if not found:
        packages = sorted({offer.package for offer in installed})
        raise UserError(
            f"no installed package named {target} offers plugins.{did_you_mean(target, packages)} Packages with plugins: "
            f"{', '.join(packages)}. Reinstall a package after changing its entry points"
        )
    return found


def make_plugin(host: Host, offer: PluginEntry) -> Plugin:
    """Return the plugin with its default settings. Raise `SkipTest` if it needs settings or `setup`."""
    from hf_rlhf.axes import Plugin
    from hf_rlhf.config.recipe import load_plugin
    from hf_rlhf.registry.host import use_host

    name = f"{offer.package}/{offer.name}"
    cls = host.get(offer.axis, name)
    required = [setting.name for setting in describe(cls) if setting.default == "required"]
    settings = ", ".join(f"{setting}=..." for setting in required)
    way = (
        f"`for fact in conformance({cls.__name__}({settings})): fact()`, with `from hf_rlhf.testing import conformance`"
    )
    if required:
        raise SkipTest(f"it needs {' and '.join(required)}. Test it with settings of your own: {way}")
    if cls.setup is not Plugin.setup:
        raise SkipTest(f"it needs setup(context). Set it up in a test of your own, then {way}")
    with use_host(host):
        plugin: Plugin = load_plugin(offer.axis, name)
    return plugin
