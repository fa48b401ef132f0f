#!/usr/bin/env bash
# Install the sandbox of `unit_tests`, the browser and the terminal on a hosted runner. With CI=true their tests fail where they are missing.
set -euo pipefail
sudo make bubblewrap chromium tmux
# Ubuntu 24.04 lets no unprivileged program open a user namespace, which is what bubblewrap does.
sudo sysctl --write kernel.apparmor_restrict_unprivileged_userns=0
bwrap --unshare-all --ro-bind / / true
