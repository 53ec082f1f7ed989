#!/bin/sh
# The main process of a container, inside its namespaces: what is its own is mounted over, then it becomes the program.
# Standard input is the agent's ear: it is told which process this is, by the /proc that both see before the new one.
set -e
read -r pid _ </proc/self/stat
. "${0%/*}/mount_container.sh"
shift 3
echo "$pid" >&0
exec setsid "$@" </dev/null # it leads a session, as in any container
