#!/bin/sh
# The main process of a container, inside its namespaces: what is its own is mounted over, then it becomes the program.
# Standard input is the agent's ear: it is told which process this is, by the /proc that both see before the new one.
set -e
hostname=$1 hosts=$2 shm_bytes=$3
shift 3
read -r pid _ </proc/self/stat
mount -t proc proc /proc
hostname "$hostname"
mount --bind "$hosts" /etc/hosts
mount -t tmpfs -o "size=$shm_bytes,mode=1777" tmpfs /dev/shm
echo "$pid" >&0
exec setsid "$@" </dev/null # it leads a session, as in any container
