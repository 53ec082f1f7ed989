#!/usr/bin/env bash
# The first process of a node, inside its namespaces: what is a node's own is mounted over, then slurmd is started.
set -euo pipefail
name=$1 state=$2
hostname "$name"
mount --bind "$state/local-$name" "$state/local" # scratch: the same path on every node, with content of its own
mount --bind "$state/hosts" /etc/hosts
mount --bind "$state/nsswitch.conf" /etc/nsswitch.conf
slurmd -N "$name" -f "$state/slurm.conf"
# Adopts and reaps what daemons leave behind, until the node is switched off.
trap : TERM CHLD
while :; do
    sleep 3600 &
    wait $!
done
