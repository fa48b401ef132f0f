#!/usr/bin/env bash
# Install the sandbox of `unit_tests` on a hosted runner. With CI=true its tests fail where it is missing.
set -euo pipefail
sudo make bubblewrap
# Ubuntu 24.04 lets no unprivileged program open a user namespace, which is what bubblewrap does.
sudo sysctl --write kernel.apparmor_restrict_unprivileged_userns=0
bwrap --unshare-all --ro-bind / / true
